"""The repository: which model versions the operator's folders hold.

    ROOT/<model>/[<version number>/]files        optional model.toml in either folder,
                                                 or config.pbtxt, or model-settings.json
    ROOT/<folders>/<model>/...                   where that has a model-settings.json, as MLServer

A scan looks at names, sizes and times alone; of the files it reads only those that say how a model is
served (`model_files`), and those once per change.  Without version folders the model folder itself is
version "1".

Invariants
 1. Every folder of a root that does not start with "." yields at least one VersionSource, and so does a
    symlink that leads nowhere: what cannot be served says why in `error`, and never hides another one.
    While a model's folder cannot be read, each of its versions that were seen before says so.
 2. Two scans with nothing changed between them are equal, so equality means "nothing to do".  What a
    scan is told of the one before is the same object again, if it is equal.
 3. No file outside a root is ever reached: a symlink that leaves its root makes its version broken.
 4. A version whose folder changed within the last SETTLE_NS is `settling` (somebody is copying into
    it) unless this is the first scan; what it says is not final.
 5. What the model's version policy leaves out is `spare`: served only in another version's place.
 6. A folder that has no files of its own, but model-settings.json further down, is no model: what lies
    there are.

Called by the scanner and by `overcommit pack`.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import msgspec

from overcommit.runtime import ensemble, model_files
from overcommit.runtime.config import VERSIONS_MAX, ModelConfig, Naming
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.folder_walk import (
    ENTRIES_MAX,
    Entries,
    Files,
    Toml,
    fingerprint_of,
    is_folder,
    is_lost,
    is_skipped,
    outermost,
    refuse_lost,
    refuse_outside,
    walk,
)
from overcommit.runtime.known_configs import KnownConfigs
from overcommit.runtime.model_names import VERSION, is_text, name_error, printable
from overcommit.runtime.model_toml import read_file

SETTLE_NS: Final = 1_000_000_000

_VERSION: Final = re.compile(VERSION)


@dataclass(slots=True, frozen=True)
class VersionSource:
    """One version as it lies on disk.

    Unless it is `settling`, `config` is None exactly when `error` says why the version cannot be
    served.  `fingerprint` changes whenever a file of the version or a model.toml above it does; it
    begins with CONTENT_DIGITS that only the version's own files change.
    """

    name: str
    version: str
    folder: str
    fingerprint: str
    config: ModelConfig | None
    error: str | None = None
    settling: bool = False
    spare: bool = False  # left out by the version policy


class Folder(NamedTuple):
    """A folder as its parent lists it."""

    name: str
    path: str
    is_link: bool


class _Nested(Exception):
    """The models of a folder lie in these folders inside it."""

    def __init__(self, folders: list[str]) -> None:
        super().__init__()
        self.folders = folders


class _Vanished(Exception):
    """A folder or file went away between two looks at it."""


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
                found = scan_model(real_root, folder, before_ns, configs)
                sources.extend(source for source in found if not source.spare)
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
            if not is_skipped(entry.name) and (is_folder(entry) or is_lost(entry))
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
    versions = list(_versions(root, model, before_ns, configs, known))
    if versions and versions[0].name == versions[-1].name:
        versions = with_policy(versions)
    else:  # models in folders of folders
        groups = itertools.groupby(versions, key=lambda source: source.name)
        versions = [source for _, group in groups for source in with_policy([*group])]
    for source in versions:
        old = known.get(source.folder)
        found.append(old if old is not None and old == source else source)
    return found


def is_lone(versions: Sequence[VersionSource]) -> bool:
    """Whether it is one version, and no policy to choose it by; so it is with most models."""
    if len(versions) != 1 or versions[0].spare:
        return False
    config = versions[0].config
    return config is None or config.naming is None


def with_policy(versions: list[VersionSource]) -> list[VersionSource]:
    """Mark what the model's version policy, as its highest version has it, leaves out."""
    if is_lone(versions):
        return versions
    naming = next((v.config.naming for v in reversed(versions) if v.config is not None), None)
    if naming is None or not (naming.latest or naming.specific):
        return [replace(v, spare=False) if v.spare else v for v in versions]
    # A folder with a name of no version counts for nothing.
    numbers = [v.version for v in versions if _VERSION.fullmatch(v.version)]
    chosen = set(naming.specific or numbers[-naming.latest :])
    return [
        v if v.spare == (v.version not in chosen) else replace(v, spare=not v.spare)
        for v in versions
    ]


def configured(
    source: VersionSource, root: str, fingerprint: str, config: ModelConfig
) -> VersionSource:
    """Return a version with another configuration, or why it cannot be served with that."""
    try:
        config = _complete(root, source.name, source.folder, config)
    except (OSError, RepositoryError) as error:
        return replace(source, fingerprint=fingerprint, config=None, error=_reason(error))
    return replace(source, fingerprint=fingerprint, config=config, error=None, spare=False)


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
        yield VersionSource(printable(name), "1", path, "", None, problem)
        return
    try:
        if is_link:
            refuse_outside(root, path)
            refuse_lost(path)
        folders, tomls, entries = _look_at_model(root, path)
    except FileNotFoundError:
        return
    except (OSError, RepositoryError) as error:
        before = [each for each in known.values() if each.name == name and not each.spare]
        for each in before or (VersionSource(name, "1", path, "", None),):
            yield replace(each, config=None, error=_reason(error), settling=False)
        return
    for folder in folders:
        try:
            yield _scan_version(root, name, folder, tomls, entries, before_ns, configs, known)
        except _Nested as nested:
            for inner in nested.folders:
                place, _, last = os.path.join(folder.path, inner).rpartition(os.sep)
                inside = Folder(last, os.path.join(place, last), False)
                yield from _versions(os.path.realpath(place), inside, before_ns, configs, known)
        except _Vanished:
            # Somebody is at work in it: the next scan knows more.
            yield VersionSource(name, folder.name, folder.path, "", None, None, settling=True)


def _look_at_model(root: str, path: str) -> tuple[list[Folder], list[Toml], Entries | None]:
    """Return the version folders in numeric order, and the model folder's own model.toml or its like.

    Without version folders the model's folder is the version: then also what it holds.
    """
    with os.scandir(path) as listing:
        entries = list(itertools.islice(listing, ENTRIES_MAX))
    folders = [
        Folder(entry.name, entry.path, entry.is_symlink())
        for entry in entries
        if entry.name.isdecimal() and entry.name.isascii() and (is_folder(entry) or is_lost(entry))
    ]
    if not folders:
        # The walk over the version finds model.toml; the model's link was looked at already.
        return [Folder("1", path, False)], [], entries
    folders.sort(key=lambda folder: (len(folder.name), folder.name))
    tomls = []
    for entry in entries:
        if entry.name in model_files.RANKS:
            if entry.is_symlink():
                refuse_outside(root, entry.path)
                refuse_lost(entry.path)
            info = entry.stat()
            tomls.append((entry.name, entry.path, info.st_size, info.st_mtime_ns))
    return folders, tomls, None


def _scan_version(
    root: str,
    name: str,
    place: Folder,
    model_tomls: list[Toml],
    entries: Entries | None,
    before_ns: int | None,
    configs: KnownConfigs,
    known: Mapping[str, VersionSource],
) -> VersionSource:
    version, folder, is_link = place
    files = Files([])
    digest = ""
    try:
        if not _VERSION.fullmatch(version):
            raise RepositoryError(
                f"'{version}' is no version: versions are whole numbers from 1 up, without leading "
                f"zeros; rename the folder"
            )
        if not is_text(folder):
            raise RepositoryError(f"its path {printable(folder)} is no UTF-8: rename the folders")
        if is_link:
            refuse_outside(root, folder)
            refuse_lost(folder)
        walk(root, folder, "", 0, files, entries)
        if files.nested and not files.has_own and not model_tomls and entries is not None:
            raise _Nested(outermost(files.nested))
        tomls = [*model_tomls, *files.tomls]
        if len(tomls) > 1:
            tomls.sort(key=lambda toml: model_files.RANKS[toml[0]])
        digest = fingerprint_of(files, tomls)
        for *_, mtime_ns in model_tomls:
            files.newest_ns = max(files.newest_ns, mtime_ns)
        # A time far ahead of our clock is no sign of somebody at work.
        if before_ns is not None and before_ns < files.newest_ns < before_ns + 2 * SETTLE_NS:
            return VersionSource(name, version, folder, digest, None, None, settling=True)
        if files.lost:
            refuse_lost(files.lost)
        old = known.get(folder)
        if old is not None and old.fingerprint == digest and old.config is not None:
            return old
        config = configs.find(folder, digest)
        if config is None and not files.rows and not tomls:
            raise RepositoryError("the folder holds no model files; copy them in or remove it")
        if config is None:
            config = configs.parse([(file, read_file(path)) for file, path, *_ in tomls])
            config = configs.share(_complete(root, name, folder, config))
        if not files.rows and not config.steps:
            raise RepositoryError("the folder holds no model files; copy them in or remove it")
        return VersionSource(name, version, folder, digest, config)
    except FileNotFoundError as error:
        raise _Vanished from error
    except (OSError, RepositoryError) as error:
        return VersionSource(name, version, folder, digest, None, _reason(error))


def _complete(root: str, name: str, folder: str, config: ModelConfig) -> ModelConfig:
    """Find the files that a configuration names; leave an alias out that is the model's own name.

    Raises RepositoryError.
    """
    if config.sequence is not None and config.steps:
        raise RepositoryError("an ensemble has no [sequence]: its steps have")
    ensemble.check(config)
    if config.naming is not None and name in config.naming.aliases:
        aliases = {key: value for key, value in config.naming.aliases.items() if key != name}
        naming = msgspec.structs.replace(config.naming, aliases=aliases)
        config = msgspec.structs.replace(config, naming=naming if naming != Naming() else None)
    if any(each.file for warmup in config.warmup for each in warmup.inputs):
        warmups = tuple(
            msgspec.structs.replace(
                warmup,
                inputs=tuple(
                    msgspec.structs.replace(
                        each, file=each.file and _find(root, name, folder, each.file)
                    )
                    for each in warmup.inputs
                ),
            )
            for warmup in config.warmup
        )
        config = msgspec.structs.replace(config, warmup=warmups)
    sequence = config.sequence
    if sequence is not None and any(state.file for state in sequence.states):
        states = tuple(
            msgspec.structs.replace(
                state, file=state.file and _find(root, name, folder, state.file)
            )
            for state in sequence.states
        )
        sequence = msgspec.structs.replace(sequence, states=states)
        config = msgspec.structs.replace(config, sequence=sequence)
    return config


def _find(root: str, name: str, folder: str, file: str) -> str:
    """A file of the version's folder, or else of the model's."""
    for place in (folder, os.path.join(root, name)):
        path = os.path.join(place, file)
        if os.path.isfile(path) and not os.path.isabs(file):
            refuse_outside(os.path.realpath(os.path.join(root, name)), path)
            return os.path.realpath(path)
    raise RepositoryError(
        f"its configuration names the file '{printable(file)}', which is not there: put it into "
        f"{printable(os.path.join(root, name))}, or leave it out"
    )


def _reason(error: OSError | RepositoryError) -> str:
    if isinstance(error, RepositoryError):
        return error.message
    return f"its folder cannot be read: {error.strerror or error}"
