"""What has to be fetched so that a folder here is as one elsewhere, and how that is put in its place.

    FOLDER/models/<model>/...    what is served; nothing half fetched is ever in there
    FOLDER/fetched/<model>/...   whole files of units that lack others
    FOLDER/parts/<model>/...     beginnings of files
    FOLDER/marks/<model>/...     which content each of those is (a part of) of
    FOLDER/mirror.json           what is in place: size, mark and digest of each file

A unit is what changes at once: a version's folder, or a model's whole folder where it has none.  Files beside
version folders are units of their own.

Invariants
 1. A unit is complete in `fetched` before it is put in place, by one rename or one exchange.
 2. A name from elsewhere never leads out of FOLDER.
 3. What is gone elsewhere leaves last, after everything new is in place.

Pure but for `put` and `drop`; called by `fetching`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from overcommit.runtime.errors import ConfigurationError

FILES_MAX: Final = 1_000_000
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


@dataclass(slots=True, frozen=True)
class RemoteFile:
    """A file elsewhere; `mark` changes when its content does, as far as its place tells."""

    size: int
    mark: str
    sha256: str = ""  # where the place knows it
    md5: str = ""
    git_sha1: str = ""  # of git's blob: its length, then its bytes
    crc32c: str = ""


Files = Mapping[str, RemoteFile]  # by path, relative to the repository


@dataclass(slots=True)
class Work:
    """Units to make (with all their files, by path), and units that are gone."""

    units: dict[str, list[str]]
    gone: list[str]


def check_path(path: str) -> str | None:
    """Return a path that is safe to make here; None for one that is to be left out.

    Raises ConfigurationError.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise ConfigurationError(f"the repository has a file of the unsafe name '{path}'")
    return None if any(part.startswith(".") for part in parts) else path


def unit_of(path: str, versioned: set[str]) -> str:
    """Name the unit that a file is of; `versioned`: models that have version folders."""
    parts = path.split("/")
    if parts[0] not in versioned:
        return parts[0]
    return "/".join(parts[:2])


def plan(wanted: Files, had: Files) -> Work:
    """Compare what there is elsewhere with what is in place."""
    if len(wanted) > FILES_MAX:
        raise ConfigurationError(f"the repository has over {FILES_MAX} files, which is the limit")
    split = [path.split("/") for path in wanted]
    versioned = {parts[0] for parts in split if len(parts) > 2 and parts[1].isdecimal()}
    units: dict[str, list[str]] = {}
    for path in sorted(wanted):
        units.setdefault(unit_of(path, versioned), []).append(path)
    before: dict[str, set[str]] = {}
    old_split = [path.split("/") for path in had]
    old_versioned = {parts[0] for parts in old_split if len(parts) > 2 and parts[1].isdecimal()}
    for path in had:
        before.setdefault(unit_of(path, old_versioned), set()).add(path)
    changed = {
        unit: paths
        for unit, paths in units.items()
        if set(paths) != before.get(unit) or any(wanted[path] != had[path] for path in paths)
    }
    # A model that got version folders, or lost them, is made anew under other units.
    gone = [unit for unit in before if unit not in units]
    return Work(_models_last(changed), gone)


def _models_last(units: dict[str, list[str]]) -> dict[str, list[str]]:
    """Files that say how a model is served come before the versions that they speak of."""
    return dict(
        sorted(units.items(), key=lambda unit: (unit[0].split("/")[-1].isdecimal(), unit[0]))
    )


def put(made: Path, place: Path) -> None:
    """Put a file or folder where it belongs, in place of what is there.  Raises OSError."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_dir():
        if made.is_dir() and place.exists():
            place.unlink()
        made.replace(place)
        return
    _exchange(made, place)
    drop(made)


def _exchange(one: Path, other: Path) -> None:
    """Exchange two paths at once, so that nobody ever sees neither."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(
        *(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    )
    if done == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), str(other))
    # A file system that cannot: for an instant there is nothing.
    aside = one.with_name(f"{one.name}.old")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def drop(path: Path) -> None:
    """Remove a file or folder, whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def bytes_of(work: Work, wanted: Files, had: Files) -> int:
    """How many bytes have to come."""
    paths: Iterable[str] = (path for unit in work.units.values() for path in unit)
    return sum(wanted[path].size for path in paths if had.get(path) != wanted[path])
