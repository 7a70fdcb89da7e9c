"""Walking over the files of one version: names, sizes and times, and the state that they make.

Invariants
 1. No file is opened.  A symlink that leaves the root is refused.
 2. Depth and number of files are bounded.
 3. A symlink that leads nowhere is noted (`Files.lost`): its target may be on its way.

Called by the repository scan.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from dataclasses import dataclass, field
from typing import Final

from overcommit.runtime import mlserver_config, model_files
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.model_names import printable

CONTENT_DIGITS: Final = 16
FILES_MAX: Final = 10_000  # of one version
DEPTH_MAX: Final = 8  # folders inside a version
ENTRIES_MAX: Final = 1_000_000  # of one root or model folder

_SKIPPED: Final = frozenset({"__pycache__", "lost+found"})

Entries = list[os.DirEntry[str]]
Toml = tuple[str, str, int, int]  # name, path, size, time of a model.toml or its like


@dataclass(slots=True)
class Files:
    """What a walk over one version found."""

    rows: list[str]
    newest_ns: int = 0
    has_own: bool = False  # files in the folder itself
    nested: list[str] = field(default_factory=list)  # folders further down with an MLServer model
    tomls: list[Toml] = field(default_factory=list)  # of the folder itself
    lost: str = ""  # the path of a symlink that leads nowhere


def walk(
    root: str, folder: str, prefix: str, depth: int, files: Files, entries: Entries | None = None
) -> None:
    """Collect relative path, size and time of every file; `entries` if it was listed already."""
    if depth > DEPTH_MAX:
        raise RepositoryError(f"its folders are nested more than {DEPTH_MAX} deep")
    files.newest_ns = max(files.newest_ns, os.stat(folder).st_mtime_ns)
    if entries is None:
        with os.scandir(folder) as listing:
            entries = list(itertools.islice(listing, ENTRIES_MAX))
    for entry in entries:
        name = entry.name
        if is_skipped(name):
            continue
        info = entry.stat(follow_symlinks=False)
        if stat.S_ISLNK(info.st_mode):
            refuse_outside(root, entry.path)
            if not os.path.exists(entry.path):
                files.newest_ns = max(files.newest_ns, info.st_mtime_ns)
                files.lost = entry.path
                continue
            info = entry.stat()
        if stat.S_ISDIR(info.st_mode):
            walk(root, entry.path, f"{prefix}{name}/", depth + 1, files)
            continue
        if not stat.S_ISREG(info.st_mode):
            continue
        files.newest_ns = max(files.newest_ns, info.st_mtime_ns)
        if not prefix:
            files.has_own = True
            if name in model_files.RANKS:
                files.tomls.append((name, entry.path, info.st_size, info.st_mtime_ns))
                continue
        elif name == mlserver_config.FILE_NAME:
            files.nested.append(prefix[:-1])
        files.rows.append(f"{prefix}{name}\0{info.st_size}\0{info.st_mtime_ns}")
        if len(files.rows) > FILES_MAX:
            raise RepositoryError(f"it holds more than {FILES_MAX} files")


def outermost(folders: list[str]) -> list[str]:
    """Leave out what lies inside others; a version's folder stands for its model's."""
    kept: list[str] = []
    for path in sorted(folders):
        above, _, last = path.rpartition("/")
        folder = above if last.isdecimal() and above else path
        if not kept or not f"{folder}/".startswith(kept[-1] + "/"):
            kept.append(folder)
    return sorted(kept, key=lambda folder: folder.rpartition("/")[2])


def fingerprint_of(files: Files, tomls: list[Toml]) -> str:
    """Name the state of a version's files, and behind CONTENT_DIGITS that of `tomls`."""
    digests = []
    for rows in (sorted(files.rows), [f"{name} {size} {at}" for name, _, size, at in tomls]):
        content = "\n".join(rows).encode("utf-8", "surrogateescape")
        digests.append(hashlib.blake2b(content, digest_size=CONTENT_DIGITS // 2).hexdigest())
    return "".join(digests)


def refuse_outside(root: str, path: str) -> None:
    """Raise RepositoryError for what leads out of its root."""
    target = os.path.realpath(path)
    if target != root and not target.startswith(root.rstrip(os.sep) + os.sep):
        raise RepositoryError(
            f"'{printable(os.path.basename(path))}' is a symlink that leaves the repository; "
            f"copy what it points to into the folder"
        )


def refuse_lost(path: str) -> None:
    """Raise RepositoryError for a symlink that leads nowhere."""
    if not os.path.exists(path):
        raise RepositoryError(
            f"'{printable(os.path.basename(path))}' is a symlink that leads nowhere; copy what it should "
            f"point to into its place, or remove it"
        )


def is_skipped(name: str) -> bool:
    """Whether a name is that of nobody's model."""
    return name.startswith(".") or name in _SKIPPED


def is_lost(entry: os.DirEntry[str]) -> bool:
    """Whether it is a symlink that leads nowhere."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is one, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False
