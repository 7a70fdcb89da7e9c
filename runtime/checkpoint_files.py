"""Which files of a folder are a checkpoint's.

In a room of its own: who only looks at folders, as `overcommit check` does, need not wait for torch.

Called by `sources`.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Final

import msgspec

from overcommit.runtime.errors import RepositoryError

INDEX_FILE: Final = "model.safetensors.index.json"
WHOLE_FILE: Final = "model.safetensors"
HEADER_BYTES_MAX: Final = 100_000_000  # as the safetensors library has it
_LENGTH: Final = struct.Struct("<Q")  # of the header, which follows
_ONCE_MORE: Final = "copy it here once more, or wait until it is copied"


class _Row(msgspec.Struct):
    """What matters of a tensor's row."""

    data_offsets: tuple[int, int] = (0, 0)  # from the header's end


_TABLE: Final = msgspec.json.Decoder(dict[str, _Row])


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


def cut_off(path: Path) -> str:
    """Say that a safetensors file ends before its tensors do, as while it is copied; else nothing.

    Reads its header alone.  Raises OSError.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_LENGTH.size)
        if not size:
            return f"{path} is empty; {_ONCE_MORE}"
        if size < _LENGTH.size:
            return ""  # it is none
        (length,) = _LENGTH.unpack(head)
        if length > HEADER_BYTES_MAX:
            return ""
        whole = _LENGTH.size + length
        if size >= whole:
            try:
                table = _TABLE.decode(file.read(length))
            except msgspec.MsgspecError:
                return ""
            whole += max((each.data_offsets[1] for each in table.values()), default=0)
    if size >= whole:
        return ""
    return f"{path} is cut off: {size} of {whole} bytes are there; {_ONCE_MORE}"


def _state_dicts(folder: Path) -> list[Path]:
    """Find the one file that torch.save wrote; several are several models, or an optimiser's too."""
    kinds = (".pth", ".pt")
    found = [path for path in folder.iterdir() if path.suffix in kinds and path.is_file()]
    found += [path for path in folder.glob("pytorch_model.bin") if path.is_file()]
    if len(found) > 1:
        names = sorted(path.name for path in found)
        raise RepositoryError(f"{folder} holds the state dicts {names[:5]}; leave one")
    return found
