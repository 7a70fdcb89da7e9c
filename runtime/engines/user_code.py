"""Modules that a model brings itself: `model.py`, one file that defines an nn.Module.

Invariants
 1. Nothing here runs before operator and model have both allowed it (`require_allowed`).
 2. What a worker runs is what was packed: the packer copies the source into the cache, and its
    digest is checked before it is executed.

Called by the packer and by `torch_module`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from torch import nn

from overcommit.runtime.config import ModelConfig
from overcommit.runtime.errors import Forbidden, ImageError, RepositoryError

SOURCE_BYTES_MAX: Final = 4 << 20

_modules_lock = threading.Lock()


def require_allowed(
    name: str, config: ModelConfig, allow_code: bool, what: str = "model.py"
) -> None:
    """Raise Forbidden unless both the operator and the model allow its code to run."""
    if not (allow_code and config.allow_code):
        raise Forbidden(
            f"{name} brings its own code ({what}): it is served only if its model.toml says "
            f"allow_code = true and the server was started with --allow-code"
        )


def read_source(path: Path) -> bytes:
    """Read a model.py.  Raises RepositoryError."""
    with path.open("rb") as file:
        source = file.read(SOURCE_BYTES_MAX + 1)
    if len(source) > SOURCE_BYTES_MAX:
        raise RepositoryError(f"{path} is longer than {SOURCE_BYTES_MAX} bytes")
    return source


def digest_of(source: bytes) -> str:
    """Name a source by its content."""
    return hashlib.blake2b(source, digest_size=16).hexdigest()


def describe(
    path: Path, source: bytes, class_name: str, parameters: Mapping[str, object]
) -> dict[str, str]:
    """Say all that decides about the module.  Runs the source.  Raises RepositoryError."""
    cls = find_class(source, str(path), class_name)
    return {
        "kind": "user",
        "source": digest_of(source),
        "class": cls.__name__,
        "arguments": json.dumps(parameters, sort_keys=True),
    }


def find_class(source: bytes, path: str, class_name: str) -> type[nn.Module]:
    """Run a source and return its module class.  Raises RepositoryError."""
    name = f"overcommit_model_{digest_of(source)}"
    with _modules_lock:
        module = sys.modules.get(name) or _execute(source, path, name)
    classes = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == name
    }
    if class_name:
        found = classes.get(class_name)
    else:
        found = next(iter(classes.values())) if len(classes) == 1 else None
    if found is None:
        raise RepositoryError(
            f"{path} defines the modules {sorted(classes)}; name one with entry = "
            f'"{Path(path).name}:Class" in model.toml'
        )
    return found


def _execute(source: bytes, path: str, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module  # dataclasses and typing look their module up while it is made
    try:
        exec(compile(source, path, "exec"), vars(module))
    except BaseException as error:  # sys.exit() too
        del sys.modules[name]
        raise RepositoryError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return module


def build(program: Mapping[str, str]) -> nn.Module:
    """Build the module; its constructor gets [parameters].

    Raises RepositoryError when the constructor fails, ImageError when the source is not the one
    that was packed.
    """
    path = Path(program["file"])
    try:
        source = read_source(path)
    except OSError as error:
        raise ImageError(f"the model's code {path} cannot be read: {error}") from error
    if digest_of(source) != program["source"]:
        raise ImageError(f"{path} has changed since the model was packed; delete it to pack again")
    cls = find_class(source, str(path), program["class"])
    arguments = json.loads(program["arguments"])
    try:
        return cls(**arguments).eval()
    except BaseException as error:  # sys.exit() too
        raise RepositoryError(
            f"{cls.__name__}(**{arguments}) fails: {type(error).__name__}: {error}"
        ) from error
