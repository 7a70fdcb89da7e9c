"""Which files of a folder are a checkpoint's.

In a room of its own: who only looks at folders, as `overcommit check` does, need not wait for torch.

Called by `sources`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from overcommit.runtime.errors import RepositoryError

INDEX_FILE: Final = "model.safetensors.index.json"
WHOLE_FILE: Final = "model.safetensors"


def files_in(folder: Path) -> list[Path]:
    """Return the safetensors files that make up the checkpoint: all, unless an index says which.

    Raises RepositoryError when the index is no index or names a file that is not there.
    """
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise RepositoryError(f"{index} is no index of safetensors files: {error}") from error
        by_name = {path.name: path for path in found}
        if missing := [name for name in names if name not in by_name]:
            raise RepositoryError(f"{index} names {missing[:3]}, which {folder} does not hold")
        return [by_name[name] for name in names]
    whole = [path for path in found if path.name == WHOLE_FILE]
    return whole or found or _state_dicts(folder)


def _state_dicts(folder: Path) -> list[Path]:
    """Find the one file that torch.save wrote; several are several models, or an optimiser's too."""
    kinds = (".pth", ".pt")
    found = [path for path in folder.iterdir() if path.suffix in kinds and path.is_file()]
    found += [path for path in folder.glob("pytorch_model.bin") if path.is_file()]
    if len(found) > 1:
        names = sorted(path.name for path in found)
        raise RepositoryError(f"{folder} holds the state dicts {names[:5]}; leave one")
    return found
