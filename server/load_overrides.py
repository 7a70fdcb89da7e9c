"""A load that brings a configuration, or files, of the client's own (`config`, `file:<version>/<path>`).

The front end writes the files into a folder that the supervisor has given it, and then asks for the load; the
supervisor answers when the model works, or says why it does not, and what served before serves on.

Invariants
 1. No path of a client leads out of that folder, and no file of a client says how a model is served.
 2. A folder is handed over with the load, or given back.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fastapi import Response

from overcommit.runtime import model_files
from overcommit.runtime.config import OVERRIDE_CONFIG_BYTES_MAX
from overcommit.runtime.errors import BadRequest, Forbidden, OutOfMemory, PayloadTooLarge
from overcommit.runtime.folder_walk import DEPTH_MAX
from overcommit.runtime.model_names import VERSION, name_error
from overcommit.server.limits import OVERRIDE_FILES_MAX
from overcommit.server.questions import ask_value

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd

_FILE: Final = "file:"
_PATH: Final = re.compile(rf"({VERSION})/([^\0]{{1,1024}})")
Files = dict[str, bytes | str]  # path -> content, as it is or in base64


async def load(front: FrontEnd, name: str, parameters: Mapping[str, Any]) -> Response:
    """Load a model, with what a client gives for it.  Raises OvercommitError."""
    config, files = check(name, parameters)
    if config is None:
        return await front.ask("load", name=name)
    if not front.settings.load_overrides:
        raise Forbidden(
            f"model '{name}': this server loads what is in the repository and takes no other "
            f"configuration or files over the network; change them there and load, or start the server "
            f"with --load-overrides"
        )
    problem = name_error(name)
    if problem is not None:
        raise BadRequest(f"failed to load '{name[:100]}': {problem}")
    folder = ""
    if files:
        folder = (await ask_value(front, "load_begin"))["folder"]
        try:
            # In a thread: of megabytes it takes a while, and others wait for their answers.
            await asyncio.to_thread(_write, os.path.join(folder, name), files)
        except BaseException:
            await ask_value(front, "load_end", folder=folder)
            raise
    return await front.ask("load_override", name=name, config=config, folder=folder)


def check(name: str, parameters: Mapping[str, Any]) -> tuple[str | None, Files]:
    """Return the configuration (None: a plain load) and files that are given.

    Raises BadRequest and PayloadTooLarge.
    """
    config: str | None = None
    files: Files = {}
    for key, value in parameters.items():
        if key == "config":
            if not isinstance(value, str):
                raise BadRequest(
                    "attempt to load model with wrong parameter type: 'config' is a string"
                )
            config = value
        elif key.startswith(_FILE):
            if not isinstance(value, str | bytes):
                raise BadRequest(f"parameter '{key[:200]}' must be a file's content, in base64")
            files[_checked_path(key.removeprefix(_FILE))] = value
        else:
            raise BadRequest(
                f"unknown parameter '{key[:200]}'; known are config and file:<version>/<path>"
            )
    if config is not None and len(config.encode()) > OVERRIDE_CONFIG_BYTES_MAX:
        raise PayloadTooLarge(
            f"model '{name}': the configuration is longer than {OVERRIDE_CONFIG_BYTES_MAX} bytes"
        )
    if len(files) > OVERRIDE_FILES_MAX:
        raise BadRequest(f"model '{name}': more than {OVERRIDE_FILES_MAX} files come with the load")
    if files and config is None:
        raise BadRequest(
            f"failed to load '{name}', failed to poll from model repository: files that come with a "
            f"load need a 'config' beside them"
        )
    return config, files


def _checked_path(path: str) -> str:
    found = _PATH.fullmatch(path)
    parts = found[2].split("/") if found is not None else []
    if not parts or len(parts) > DEPTH_MAX or any(_is_wrong(part) for part in parts):
        raise BadRequest(
            f"'{_FILE}{path[:200]}' names no file of a version: it is file:<version>/<path>, without "
            f"'..' and names that begin with '.'"
        )
    if len(parts) == 1 and parts[0] in model_files.RANKS:
        raise BadRequest(f"'{_FILE}{path}': how the model is served is said by 'config'")
    return path


def _is_wrong(part: str) -> bool:
    return not part or part.startswith(".") or len(os.fsencode(part)) > 255


def _write(folder: str, files: Files) -> None:
    """Raises BadRequest, and OutOfMemory where the disk is full."""
    for path, content in files.items():
        if isinstance(content, str):
            try:
                content = base64.b64decode(content, validate=True)
            except (binascii.Error, ValueError) as error:
                raise BadRequest(f"'{_FILE}{path}' is not base64: {error}") from error
        place = os.path.join(folder, path)
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with open(place, "xb") as file:
                file.write(content)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise BadRequest(f"'{_FILE}{path}' is a file and a folder, or there twice") from error
        except OSError as error:
            raise OutOfMemory(f"'{_FILE}{path}' cannot be kept: {error.strerror}") from error
