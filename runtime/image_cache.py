"""The cache folder's files: which of them nothing has needed for long, and removing those.

    {cache}/images/KEY.image   what one version has for itself
    {cache}/parts/DIGEST.*     what versions share
    {cache}/programs/KEY/      the programs of versions

A file's time of modification says when it was last needed: images, parts and programs never change once
they have their names, and each server renews the times of what its versions are made of, every
CACHE_RENEW_S.  So several servers and `overcommit pack` may share a folder and know nothing of each
other.

Invariants
 1. What is in use here, or was renewed within `keep_s`, is not removed; nor is anything whose name is not
    of the three kinds above.
 2. An image is removed before its parts: one that is there is whole, unless it was needed for the first
    time in long while it was removed.  Who meets that packs it again (`kept_images.reusable`).
 3. What cannot be renewed or removed is left as it is: the folder may be read-only.

No state, no threads.  Called by the packer, by the cache keeper, in its thread, and by `overcommit prune`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from overcommit.runtime.container import TEMPORARY_PREFIX
from overcommit.runtime.parts import PACKED_SUFFIX, SUFFIX, PartInfo, path_of

BLOCK_BYTES: Final = 512  # in which `st_blocks` counts
_IMAGE: Final = re.compile(r"[0-9a-f]+p?\.image")
_PART: Final = re.compile(rf"[0-9a-f]+({re.escape(SUFFIX)}|{re.escape(PACKED_SUFFIX)})")
_PROGRAM: Final = re.compile(rf"({re.escape(TEMPORARY_PREFIX)})?[0-9a-f]+")


class Needed(msgspec.Struct, frozen=True, gc=False):
    """What one version is made of."""

    image_path: str
    program_key: str
    parts: tuple[PartInfo, ...] = ()


@dataclass(slots=True)
class Removed:
    """What was removed; bytes of disk."""

    images: int = 0
    parts: int = 0
    programs: int = 0
    nbytes: int = 0
    kept: int = 0  # files and programs that are still there
    failed: str = ""  # why something could not be removed

    def __bool__(self) -> bool:
        return bool(self.images or self.parts or self.programs)

    def __str__(self) -> str:
        return (
            f"{self.images:,} images, {self.parts:,} parts and {self.programs:,} programs, "
            f"{self.nbytes / 1e9:,.2f} GB"
        )


def program_folder(cache_dir: str, program_key: str) -> Path:
    """Where a program's files lie."""
    return Path(cache_dir).absolute() / "programs" / program_key


def touch(path: str | Path) -> None:
    """Say that this is needed now: of another user's file, who lets us write, no other time may be said."""
    with contextlib.suppress(OSError):
        os.utime(path)


def paths_of(cache_dir: str, versions: Iterable[Needed]) -> Iterator[str]:
    """Yield the files and folders that these versions are made of, shared ones once."""
    shared: set[str | PartInfo] = set()
    for version in versions:
        for part in version.parts:
            if part not in shared:
                shared.add(part)
                is_packed = bool(part.packed_bytes)
                yield str(path_of(version.image_path, part.digest, is_packed=is_packed))
        if version.program_key not in shared:
            shared.add(version.program_key)
            yield str(program_folder(cache_dir, version.program_key))
        yield version.image_path


def renew(cache_dir: str, versions: Iterable[Needed]) -> set[str]:
    """Say that these versions are needed now; return what they are made of."""
    used = set()
    for path in paths_of(cache_dir, versions):
        used.add(path)
        touch(path)
    return used


def prune(
    cache_dir: str, used: set[str], now_s: float, keep_s: float, *, is_dry: bool = False
) -> Removed:
    """Remove what is not in use and was last needed over `keep_s` ago; `is_dry`: only count it."""
    removed = Removed()
    root = Path(cache_dir).absolute()
    for folder, pattern in (("images", _IMAGE), ("parts", _PART), ("programs", _PROGRAM)):
        for entry in _entries(root / folder):
            if not pattern.fullmatch(entry.name):
                continue
            try:
                facts = entry.stat(follow_symlinks=False)
                if entry.path in used or now_s - facts.st_mtime < keep_s:
                    removed.kept += 1
                    continue
                nbytes = _disk_bytes(entry, facts)
                if not is_dry:
                    _remove(entry)
            except FileNotFoundError:
                continue  # another one was faster
            except OSError as error:
                removed.failed = str(error)
                removed.kept += 1
                continue
            setattr(removed, folder, getattr(removed, folder) + 1)
            removed.nbytes += nbytes
    return removed


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _disk_bytes(entry: os.DirEntry[str], facts: os.stat_result) -> int:
    if not entry.is_dir(follow_symlinks=False):
        return facts.st_blocks * BLOCK_BYTES
    files = (os.path.join(root, name) for root, _, names in os.walk(entry.path) for name in names)
    return sum(os.lstat(file).st_blocks for file in files) * BLOCK_BYTES


def _remove(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        # Whole or gone, whoever looks meanwhile; of a process that dies here the next one finds it.
        path = entry.path
        if not entry.name.startswith(TEMPORARY_PREFIX):
            path = os.path.join(os.path.dirname(path), f"{TEMPORARY_PREFIX}{entry.name}")
            os.rename(entry.path, path)
        shutil.rmtree(path)
    else:
        os.unlink(entry.path)
