"""Programs in the cache folder: `{cache}/programs/{program_key}/`, shared by versions.

Invariants
 1. A file under its final name is complete, and never changes: its folder is named by its content.

Called by the packer.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from overcommit.runtime.container import TEMPORARY_PREFIX
from overcommit.runtime.image_cache import touch


def save_once(path: Path, make: Callable[[], bytes]) -> Path:
    """Write a file atomically unless it is there; two processes may try at once."""
    touch(path.parent)
    if path.exists():
        return path
    content = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return path
