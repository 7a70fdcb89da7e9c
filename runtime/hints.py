"""What an operator most likely meant who names a folder in which there is no model.

Called by `overcommit check` and when a server starts with nothing to serve.
"""

from __future__ import annotations

import os
from typing import Final

from overcommit.runtime import model_files
from overcommit.runtime.folder_walk import is_folder

_OF_A_MODEL: Final = frozenset({"config.json", "model.py", *model_files.RANKS})
_WEIGHTS: Final = (".safetensors", ".pt2", ".onnx", ".aoti", ".lgb", ".ubj", ".pt", ".pth")


def hint_of(root: str) -> str | None:
    """Say what is wrong with a repository; None: it holds folders that may be models."""
    try:
        entries = [(entry.name, is_folder(entry)) for entry in os.scandir(root)]
    except OSError as error:
        return f"{root} cannot be read: {error.strerror or error}"
    files = sorted(name for name, is_one in entries if not is_one)
    folders = [name for name, is_one in entries if is_one and name[0] not in "._"]
    ours = [name for name in files if name in _OF_A_MODEL or name.endswith(_WEIGHTS)]
    if ours and all(name.isdecimal() for name in folders):
        return (
            f"{root} holds {ours[0]}, so it looks like one model's folder: a repository holds a folder for "
            f"each model; name {os.path.dirname(os.path.abspath(root))}"
        )
    if not folders:
        return (
            f"{root} holds no folder: a repository holds a folder for each model, or make one to try with "
            f"`overcommit demo`"
        )
    return None
