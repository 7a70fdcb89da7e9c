"""The repository: which model versions the operator's folders hold.

    ROOT/<model>/[<version number>/]files        optional model.toml in either folder

A scan looks at names, sizes and times alone; of the files it reads only `model.toml`, and that once
per change.  Without version folders the model folder itself is version "1".

Invariants
 1. Every folder of a root that does not start with "." yields at least one VersionSource: a folder
    that cannot be served says why in `error`, and never hides another one.
 2. Two scans with nothing changed between them are equal, so equality means "nothing to do".  What a
    scan is told of the one before is the same object again, if it is equal.
 3. No file outside a root is ever reached: a symlink that leaves its root makes its version broken.
 4. A version whose folder changed within the last SETTLE_NS is `settling` (somebody is copying into
    it) unless this is the first scan; what it says is not final.

Called by the scanner and by `overcommit pack`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from overcommit.runtime.config import NAME_CHARS_MAX, VERSIONS_MAX, ModelConfig
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.known_configs import KnownConfigs
from overcommit.runtime.model_toml import FILE_NAME, read_file

SETTLE_NS: Final = 1_000_000_000
FILES_MAX: Final = 10_000  # of one version
DEPTH_MAX: Final = 8  # folders inside a version
ENTRIES_MAX: Final = 1_000_000  # of one root or model folder

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")
_SKIPPED: Final = frozenset({"__pycache__", "lost+found"})


@dataclass(slots=True, frozen=True)
class VersionSource:
    """One version as it lies on disk.

    Unless it is `settling`, `config` is None exactly when `error` says why the version cannot be
    served.  `fingerprint` changes whenever a file of the version or a model.toml above it does.
    """

    name: str
    version: str
    folder: str
    fingerprint: str
    config: ModelConfig | None
    error: str | None = None
    settling: bool = False


class Folder(NamedTuple):
    """A folder as its parent lists it."""

    name: str
    path: str
    is_link: bool


_Entries = list[os.DirEntry[str]]
_Toml = tuple[str, int, int]  # path, size, time of a model.toml


@dataclass(slots=True)
class _Files:
    """What a walk over one version found."""

    rows: list[str]
    newest_ns: int = 0
    toml: _Toml | None = None  # of the folder itself


class _Vanished(Exception):
    """A folder or file went away between two looks at it."""


def name_error(name: str) -> str | None:
    """Say what is wrong with a model's name; None when nothing is."""
    if len(name) > NAME_CHARS_MAX:
        return f"the name is longer than {NAME_CHARS_MAX} characters; rename the folder"
    if not _NAME.fullmatch(name) or ".." in name:
        return (
            f"'{_printable(name)}' is no model name: names consist of A-Z, a-z, 0-9, '.', '_' and "
            f"'-', start with a letter or digit and hold no '..'; rename the folder"
        )
    return None


def scan(roots: Iterable[str | os.PathLike[str]], *, is_first: bool = True) -> list[VersionSource]:
    """Look at every root; the result is ordered by root, name and version.

    A model name that two roots hold is served from the first.  Raises OSError when a root itself
    cannot be read.
    """
    configs = KnownConfigs()
    before_ns = settled_before_ns() if not is_first else None
    sources: list[VersionSource] = []
    names: set[str] = set()
    for root in roots:
        real_root = os.path.realpath(root)
        for folder in model_folders(real_root):
            if folder.name not in names:
                names.add(folder.name)
                sources.extend(scan_model(real_root, folder, before_ns, configs))
            if len(sources) >= VERSIONS_MAX:
                return sources[:VERSIONS_MAX]
    return sources


def settled_before_ns() -> int:
    """What changed before this time (as file times are) is not being changed any more."""
    return time.time_ns() - SETTLE_NS


def model_folders(root: str) -> list[Folder]:
    """List what may be models in a root, by name.  Raises OSError."""
    with os.scandir(root) as entries:
        return sorted(
            Folder(entry.name, entry.path, entry.is_symlink())
            for entry in itertools.islice(entries, ENTRIES_MAX)
            if not _is_skipped(entry.name) and _is_folder(entry)
        )


def scan_model(
    root: str,
    model: Folder,
    before_ns: int | None,
    configs: KnownConfigs,
    former: Sequence[VersionSource] = (),
) -> list[VersionSource]:
    """Look at a model's versions; whatever is wrong with one stays with it.

    `root` is a real path, `before_ns` as of `settled_before_ns` (None: everything is settled),
    `former` what the last look at this model gave.
    """
    known = {source.folder: source for source in former}
    found = []
    for source in _versions(root, model, before_ns, configs, known):
        old = known.get(source.folder)
        found.append(old if old is not None and old == source else source)
    return found


def _versions(
    root: str,
    model: Folder,
    before_ns: int | None,
    configs: KnownConfigs,
    known: Mapping[str, VersionSource],
) -> Iterator[VersionSource]:
    name, path, is_link = model
    problem = name_error(name)
    if problem is not None:
        yield VersionSource(_printable(name), "1", path, "", None, problem)
        return
    try:
        if is_link:
            _refuse_outside(root, path)
        folders, toml, entries = _look_at_model(path)
    except FileNotFoundError:
        return
    except (OSError, RepositoryError) as error:
        yield VersionSource(name, "1", path, "", None, _reason(error))
        return
    for folder in folders:
        try:
            yield _scan_version(root, name, folder, toml, entries, before_ns, configs, known)
        except _Vanished:
            # Somebody is at work in it: the next scan knows more.
            yield VersionSource(name, folder.name, folder.path, "", None, None, settling=True)


def _look_at_model(path: str) -> tuple[list[Folder], _Toml | None, _Entries | None]:
    """Return the version folders in numeric order, and the model folder's own model.toml.

    Without version folders the model's folder is the version: then also what it holds.
    """
    with os.scandir(path) as listing:
        entries = list(itertools.islice(listing, ENTRIES_MAX))
    folders = [
        Folder(entry.name, entry.path, entry.is_symlink())
        for entry in entries
        if entry.name.isdecimal() and entry.name.isascii() and _is_folder(entry)
    ]
    if not folders:
        # The walk over the version finds model.toml; the model's link was looked at already.
        return [Folder("1", path, False)], None, entries
    folders.sort(key=lambda folder: (len(folder.name), folder.name))
    toml = None
    for entry in entries:
        if entry.name == FILE_NAME:
            info = entry.stat()
            toml = (entry.path, info.st_size, info.st_mtime_ns)
    return folders, toml, None


def _scan_version(
    root: str,
    name: str,
    place: Folder,
    model_toml: _Toml | None,
    entries: _Entries | None,
    before_ns: int | None,
    configs: KnownConfigs,
    known: Mapping[str, VersionSource],
) -> VersionSource:
    version, folder, is_link = place
    files = _Files([])
    digest = ""
    try:
        if not _VERSION.fullmatch(version):
            raise RepositoryError(
                f"'{version}' is no version: versions are whole numbers from 1 up, without leading "
                f"zeros; rename the folder"
            )
        if is_link:
            _refuse_outside(root, folder)
        _walk(root, folder, "", 0, files, entries)
        tomls = [toml for toml in (model_toml, files.toml) if toml is not None]
        digest = _fingerprint(files, tomls)
        files.newest_ns = max(files.newest_ns, *(mtime_ns for _, _, mtime_ns in tomls), 0)
        # A time far ahead of our clock is no sign of somebody at work.
        if before_ns is not None and before_ns < files.newest_ns < before_ns + 2 * SETTLE_NS:
            return VersionSource(name, version, folder, digest, None, None, settling=True)
        if not files.rows:
            raise RepositoryError("the folder holds no model files; copy them in or remove it")
        old = known.get(folder)
        if old is not None and old.fingerprint == digest and old.config is not None:
            return old
        config = configs.find(folder, digest)
        if config is None:
            config = configs.parse(tuple(read_file(path) for path, _, _ in tomls))
        return VersionSource(name, version, folder, digest, config)
    except FileNotFoundError as error:
        raise _Vanished from error
    except (OSError, RepositoryError) as error:
        return VersionSource(name, version, folder, digest, None, _reason(error))


def _walk(
    root: str, folder: str, prefix: str, depth: int, files: _Files, entries: _Entries | None = None
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
        if _is_skipped(name):
            continue
        info = entry.stat(follow_symlinks=False)
        if stat.S_ISLNK(info.st_mode):
            _refuse_outside(root, entry.path)
            info = entry.stat()
        if stat.S_ISDIR(info.st_mode):
            _walk(root, entry.path, f"{prefix}{name}/", depth + 1, files)
            continue
        if not stat.S_ISREG(info.st_mode):
            continue
        files.newest_ns = max(files.newest_ns, info.st_mtime_ns)
        if name == FILE_NAME and not prefix:
            files.toml = (entry.path, info.st_size, info.st_mtime_ns)
            continue
        files.rows.append(f"{prefix}{name}\0{info.st_size}\0{info.st_mtime_ns}")
        if len(files.rows) > FILES_MAX:
            raise RepositoryError(f"it holds more than {FILES_MAX} files")


def _fingerprint(files: _Files, tomls: list[_Toml]) -> str:
    rows = sorted(files.rows) + [f"{size}\0{mtime_ns}" for _, size, mtime_ns in tomls]
    content = "\n".join(rows).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _refuse_outside(root: str, path: str) -> None:
    target = os.path.realpath(path)
    if target != root and not target.startswith(root.rstrip(os.sep) + os.sep):
        raise RepositoryError(
            f"'{_printable(os.path.basename(path))}' is a symlink that leaves the repository; "
            f"copy what it points to into the folder"
        )


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name in _SKIPPED


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _reason(error: OSError | RepositoryError) -> str:
    if isinstance(error, RepositoryError):
        return error.message
    return f"its folder cannot be read: {error.strerror or error}"


def _printable(name: str) -> str:
    """A name that JSON and a terminal can show, whatever bytes the file system holds."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text[:NAME_CHARS_MAX]
