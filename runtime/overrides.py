"""Models as clients have loaded them: with a configuration, or files, in place of the repository's.

What a client gives holds until the model is loaded plainly or unloaded, or the server ends.  It is laid over
what the scans find, so that all else (packing, trials, taking over) goes as after a change on disk.

    (none) | held --try_out--> tried --confirm--> held --drop--> (none) | what was held before
                               tried --give_up--> what was there before

Invariants
 1. While a load is tried, all that served before stays among the sources, until `confirm`; after `give_up`
    the sources are as before.
 2. Files of clients lie in a folder of this server alone, `overrides/<its own>` in the cache folder, which is
    locked while it lives; a folder leaves when no entry is made of it any more, those of dead servers at the
    next start.
 3. A client never decides what may run: `allow_code` is the operator's, and files of clients never have it.
 4. At most OVERRIDES_MAX models are overridden, by files of OVERRIDES_BYTES_MAX in all.

Called by the catalogue and by administration, from the supervisor's one thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from overcommit.runtime import repository, triton_config
from overcommit.runtime.config import OVERRIDES_BYTES_MAX, OVERRIDES_MAX, ModelConfig
from overcommit.runtime.errors import BadRequest, OvercommitError, Overloaded, RepositoryError
from overcommit.runtime.folder_walk import CONTENT_DIGITS
from overcommit.runtime.known_configs import KnownConfigs
from overcommit.runtime.model_names import name_error
from overcommit.runtime.model_toml import to_config
from overcommit.runtime.repository import Folder, VersionSource

log = logging.getLogger("overcommit.overrides")

FOLDER: Final = "overrides"
Owner = tuple[int, int]  # a front end's seat and epoch


@dataclass(slots=True, frozen=True)
class Override:
    """What a client gave for one model; `folder`: of its files, which has the model's folder in it."""

    config: ModelConfig
    folder: str = ""
    nbytes: int = 0


class Overrides:
    """See the module.  `roots` are the repositories."""

    def __init__(self, cache_dir: str, roots: Iterable[str]) -> None:
        self._cache_dir = Path(cache_dir)
        self._roots = [os.path.realpath(root) for root in roots]
        self._home = ""
        self._lock_fd = -1
        self._held: dict[str, Override] = {}
        self._tried: dict[str, Override] = {}
        self._sought: dict[str, dict[str, str]] = {}  # of the tried: version -> fingerprint
        self._begun: dict[str, Owner] = {}  # folders that front ends write to
        self._leaving: set[str] = set()
        sweep(self._cache_dir / FOLDER)

    def close(self) -> None:
        """Remove all files of clients."""
        if self._home:
            shutil.rmtree(self._home, ignore_errors=True)
            os.close(self._lock_fd)
            self._home = ""

    # --- folders --------------------------------------------------------------------------------
    def begin(self, owner: Owner) -> str:
        """Return a new folder that a front end may write a model's folder into.

        Raises Overloaded when there are too many, OSError when it cannot be made.
        """
        if len(self._begun) + len(self._held) + len(self._tried) >= OVERRIDES_MAX:
            raise Overloaded(
                f"{OVERRIDES_MAX} models have files or configurations of clients, which is the limit; "
                f"load another one plainly, or unload it",
                retry_after_s=10,
            )
        if not self._home:
            self._home, self._lock_fd = _make_home(self._cache_dir / FOLDER)
        folder = tempfile.mkdtemp(dir=self._home)
        self._begun[folder] = owner
        return folder

    def abandon(self, owner: Owner, folder: str = "") -> None:
        """What a front end has begun does not come to anything; without a folder: all of it."""
        for each in [f for f, its in self._begun.items() if its == owner and folder in ("", f)]:
            del self._begun[each]
            self._leaving.add(each)

    def clear(self, used: Collection[str]) -> None:
        """Remove folders that nobody needs any more; `used`: those of the entries that there are."""
        for folder in list(self._leaving):
            inside = folder + os.sep
            if not any(each.startswith(inside) for each in used):
                self._leaving.discard(folder)
                # Of gigabytes it takes a while, and the supervisor has others to look after.
                threading.Thread(
                    target=shutil.rmtree, args=(folder, True), name=FOLDER, daemon=True
                ).start()

    @property
    def is_clear(self) -> bool:
        """Whether no folder waits to be removed."""
        return not self._leaving

    # --- what clients load ----------------------------------------------------------------------
    def try_out(self, name: str, config: str, folder: str, owner: Owner) -> None:
        """Lay this over the model from now on.

        `config` is Triton's JSON; `folder` is "" or one that was begun by this owner.  Raises
        BadRequest, RepositoryError and Overloaded; then the folder is gone.
        """
        try:
            made = self._checked(name, config, folder, owner)
        except OvercommitError:
            self.abandon(owner, folder or "-")
            raise
        self._begun.pop(folder, None)
        self._tried[name] = made

    def _checked(self, name: str, config: str, folder: str, owner: Owner) -> Override:
        if folder and self._begun.get(folder) != owner:
            raise BadRequest(f"model '{name}': its files are not there any more; load it again")
        problem = name_error(name)
        if problem is not None:
            raise RepositoryError(f"model '{name[:100]}': {problem}")
        if name in self._tried:
            raise Overloaded(f"model '{name}' is being loaded; try again", retry_after_s=1)
        others = self._held.keys() - {name}
        if len(others) + len(self._tried) >= OVERRIDES_MAX:
            raise Overloaded(f"{OVERRIDES_MAX} models are overridden, which is the limit")
        table, notes = triton_config.read_json(config.encode())
        for note in notes:
            log.info("model '%s', loaded by a client: %s", name, note)
        made = Override(to_config(table, "the configuration"), folder, _bytes_in(folder))
        kept = (*self._held.values(), *self._tried.values(), made)
        if sum(each.nbytes for each in kept) > OVERRIDES_BYTES_MAX:
            raise Overloaded(
                f"model '{name}': files of clients would take more than {OVERRIDES_BYTES_MAX} bytes, "
                f"which is the limit; load other models plainly, or unload them"
            )
        return made

    def confirm(self, name: str) -> None:
        """It works: what was held before is let go."""
        self._let_go(self._held.pop(name, None))
        self._held[name] = self._tried.pop(name)

    def give_up(self, name: str) -> None:
        """It does not work: what was there before holds on."""
        self._let_go(self._tried.pop(name, None))

    def drop(self, name: str) -> bool:
        """The repository's model holds again; False: it does already."""
        dropped = [self._held.pop(name, None), self._tried.pop(name, None)]
        for each in dropped:
            self._let_go(each)
        return any(dropped)

    def sought(self, name: str) -> dict[str, str]:
        """Return version -> fingerprint of what has to work, after `laid_over`."""
        return self._sought.get(name, {})

    def has(self, name: str) -> bool:
        """Whether a client's own is loaded, or tried."""
        return name in self._held or name in self._tried

    def is_tried(self, name: str) -> bool:
        """Whether a load of this model is not decided yet."""
        return name in self._tried

    def _let_go(self, override: Override | None) -> None:
        if override is not None and override.folder:
            self._leaving.add(override.folder)

    # --- what the registry gets to see ----------------------------------------------------------
    def laid_over(self, sources: Sequence[VersionSource]) -> Sequence[VersionSource]:
        """Return what a scan found, as clients have changed it."""
        if not self._held and not self._tried:
            return sources
        names = dict.fromkeys((*self._held, *self._tried))
        found: dict[str, list[VersionSource]] = {name: [] for name in names}
        result: list[VersionSource] = []
        for source in sources:
            if source.name in found:
                found[source.name].append(source)
            else:
                result.append(source)
        for name, versions in found.items():
            if name in self._held:
                versions = self._versions(name, self._held[name], versions)
            if name in self._tried:
                tried = self._versions(name, self._tried[name], found[name])
                new = {source.version for source in tried}
                self._sought[name] = {s.version: s.fingerprint for s in tried if not s.spare}
                versions = [*tried, *(source for source in versions if source.version not in new)]
            result += sorted(versions, key=lambda source: (len(source.version), source.version))
        return result

    def _versions(
        self, name: str, override: Override, found: list[VersionSource]
    ) -> list[VersionSource]:
        disk = next((each.config for each in reversed(found) if each.config), ModelConfig())
        root = override.folder
        if root:
            folder = Folder(name, os.path.join(root, name), False)
            found = repository.scan_model(root, folder, None, KnownConfigs())
            disk = ModelConfig()
        config = _merged(disk, override.config)
        versions = []
        for source in found:
            if source.config is None:  # broken, or being copied in
                versions.append(source)
                continue
            under = root or next(r for r in self._roots if source.folder.startswith(r + os.sep))
            versions.append(
                repository.configured(source, under, _fingerprint(source, config), config)
            )
        return repository.with_policy(versions)


def _make_home(place: Path) -> tuple[str, int]:
    """Return a new folder, and the descriptor that holds its lock."""
    place.mkdir(parents=True, exist_ok=True)
    while True:
        home = tempfile.mkdtemp(dir=place)
        fd = os.open(home, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.path.isdir(home):
            return home, fd
        os.close(fd)  # another server, which has just started, took it for one of the dead


def sweep(folder: Path) -> None:
    """Remove what servers have left there that are dead."""
    with contextlib.suppress(OSError):
        for home in list(folder.iterdir()):
            fd = os.open(home, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(home, ignore_errors=True)
            except BlockingIOError:
                pass  # its server lives
            finally:
                os.close(fd)


def _merged(disk: ModelConfig, given: ModelConfig) -> ModelConfig:
    """What Triton's configuration can say is the client's, all else the operator's."""
    return msgspec.structs.replace(
        disk,
        engine=given.engine or disk.engine,
        entry=given.entry or disk.entry,
        inputs=given.inputs,
        outputs=given.outputs,
        batching=given.batching,
        parameters=given.parameters,
        warmup=given.warmup,
        sequence=given.sequence,
        steps=given.steps,
        naming=given.naming,
    )


def _fingerprint(source: VersionSource, config: ModelConfig) -> str:
    said = source.fingerprint[CONTENT_DIGITS:].encode() + msgspec.msgpack.encode(config)
    digest = hashlib.blake2b(said, digest_size=CONTENT_DIGITS // 2).hexdigest()
    return source.fingerprint[:CONTENT_DIGITS] + digest


def _bytes_in(folder: str) -> int:
    nbytes = 0
    for place, _, files in os.walk(folder) if folder else ():
        nbytes += sum(os.lstat(os.path.join(place, file)).st_size for file in files)
    return nbytes
