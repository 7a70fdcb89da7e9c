"""A disk that is full, in words that name it.

Called by the packer.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from typing import Final

from overcommit.runtime.config import MIB

_TEXTS: Final = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))


def is_missing(message: str) -> bool:
    """Whether an error says so; libraries that write for us have errors of their own."""
    return any(text in message for text in _TEXTS)


def tightest(cache_dir: str) -> str:
    """Return the folder on whose disk there is the least room of those that packing writes to."""
    return min(cache_dir, tempfile.gettempdir(), key=lambda each: shutil.disk_usage(each).free)


def missing(name: str, folder: str, cache_dir: str) -> str:
    """Say that this folder has no room."""
    free = shutil.disk_usage(folder).free / MIB
    is_cache = folder == cache_dir
    option = "--cache-dir" if is_cache else "TMPDIR"
    hint = " (`overcommit prune` removes packed weights that nothing needs)" if is_cache else ""
    return (
        f"model '{name}' cannot be packed: there is no room left on the disk of {folder} ({free:.0f} "
        f"MiB free); make room there{hint}, or name a larger one by {option}"
    )
