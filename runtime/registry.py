"""The registry: every version that the server knows, and what can be done with it.

It decides which entry (`entries`) is current, waits to take over, or leaves; each has a slot
(`slots`) until nothing uses it any more.  Where entries are found is `shelf`.

Invariants
 1. At most one entry is current for a (name, version); a slot is one entry's until `release`.
 2. A version that changed on disk gets a new entry in a new slot.  The old entry stays current
    until the new one is READY; if the new files are broken, it stays and carries the reason.
 3. A broken version is listed with its reason and changes nothing else.
 4. An unloaded model stays unloaded until it is asked for, whatever changes on disk.

State machine

    (none) -> READY       [apply_scan: an image is known]
    (none) -> PACKING     [apply_scan: none is known]
    (none) -> UNAVAILABLE [apply_scan: the folder is broken]
    PACKING -> READY | UNAVAILABLE            [on_packed]
    PACKING -> UNLOADED                       [set_unloaded]
    READY -> retired, and an entry like it UNLOADED in its place  [set_unloaded]
    UNLOADED | UNAVAILABLE -> READY | PACKING [set_loaded]
    READY -> the same, and a successor, PACKING or READY  [apply_scan: files changed; renew: no image]
    successor -> READY, in its place | retired            [on_packed, on_rehearsed]
    UNAVAILABLE -> PACKING                    [again]
    any -> retired -> ended -> (none)         [apply_scan, on_packed or set_unloaded; end; release]

Called by the supervisor, from its one thread, and by `overcommit pack`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

from overcommit.runtime import ensemble
from overcommit.runtime.config import VERSIONS_MAX, imaged
from overcommit.runtime.entries import (
    SERVES_ON,
    Entry,
    RegistryChanges,
    State,
    facts_of,
    is_renamed,
    new_entry,
    order,
    take_facts,
)
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.pack_index import PackIndex
from overcommit.runtime.packer_messages import PackDone
from overcommit.runtime.repository import VersionSource
from overcommit.runtime.shelf import Shelf
from overcommit.runtime.slots import Slots

log = logging.getLogger("overcommit.registry")


class Registry(Shelf):
    """All entries, and what becomes of them."""

    def __init__(
        self,
        cache_dir: str | os.PathLike[str],
        slots_max: int = VERSIONS_MAX,
        *,
        packs: bool = False,
    ) -> None:
        super().__init__()
        self._cache_dir, self._packs = cache_dir, packs
        self._numbers = Slots(slots_max)
        self._leaving: set[int] = set()
        self.rehearses = False  # whether new versions show that they work before they take over
        self._spares: dict[str, list[VersionSource]] = {}  # left out by version policies
        self._unloaded: set[str] = set()

    @cached_property
    def index(self) -> PackIndex:
        """What is known from before; it is read when it is needed first, after processes were started."""
        return PackIndex(self._cache_dir, packs=self._packs)

    # --- what the disk says ---------------------------------------------------------------------
    def apply_scan(self, sources: Iterable[VersionSource]) -> RegistryChanges:
        """Take over what a scan found."""
        changes = RegistryChanges()
        seen: set[tuple[str, str]] = set()
        serving = {entry.name: entry for entry in self.entries() if entry.state is State.READY}
        self._spares = {}
        for source in sources:
            key = (source.name, source.version)
            if key in seen:
                continue
            if source.spare:
                self._spares.setdefault(source.name, []).append(source)
                continue
            seen.add(key)
            if source.settling:
                continue
            entry = self._current.get(key)
            if entry is None:
                self._add(source, changes, serving.get(source.name))
            elif source != entry.seen:
                self._change(entry, source, changes)
        self._names = None
        for key, entry in list(self._current.items()):
            if key not in seen:
                if self._is_spare(entry) and self._must_stay(entry):
                    continue
                self._retire_successor(entry, changes)
                self._retire(entry)
                del self._current[key]
                changes.removed.append(entry.slot)
        self._unloaded.intersection_update(name for name, _ in seen)
        self._names = None
        self.index.trim()
        changes.lacking = [name for name in self._spares if not self._works(name)]
        return changes

    def _is_spare(self, entry: Entry) -> bool:
        spares = self._spares.get(entry.name, ())
        return any(source.version == entry.version for source in spares)

    def _must_stay(self, entry: Entry) -> bool:
        """Whether nothing has taken over from a version that the policy leaves out."""
        if entry.state not in (State.READY, State.PACKING):
            return False
        return not any(
            other.state is State.READY and not other.on_trial and not self._is_spare(other)
            for other in self._by_name().get(entry.name, ())
        )

    def fill_in(self, name: str) -> int | None:
        """Take in the highest version that the policy leaves out; return its slot, if there is any."""
        if self._works(name):
            return None
        for source in reversed(self._spares.get(name, ())):
            if (name, source.version) not in self._current and source.config is not None:
                changes = RegistryChanges()
                self._add(source, changes, None)
                self._names = None
                return changes.added[0] if changes.added else None
        return None

    def drop_spares(self, name: str) -> list[int]:
        """Retire what the policy leaves out and nobody needs any more; return the slots."""
        if name not in self._spares or name not in self._by_name():
            return []
        changes = RegistryChanges()
        for entry in self._by_name()[name]:
            if self._is_spare(entry) and not self._must_stay(entry):
                self._retire_successor(entry, changes)
                self._retire(entry)
                del self._current[name, entry.version]
                changes.removed.append(entry.slot)
                self._names = None
        return changes.removed

    def _add(self, source: VersionSource, changes: RegistryChanges, serving: Entry | None) -> None:
        entry = self._make(source)
        if entry is None:
            return
        is_newer = serving is not None and order(serving) < order(entry)
        entry.on_trial = self.rehearses and is_newer
        self._current[source.name, source.version] = entry
        changes.added.append(entry.slot)
        changes.sort_in(entry)

    def _change(self, entry: Entry, source: VersionSource, changes: RegistryChanges) -> None:
        """The files of a known version are not what they were."""
        entry.seen = source
        self._retire_successor(entry, changes)
        if entry.state is State.READY:
            if source.fingerprint == entry.fingerprint and source.error is None:
                entry.reason = ""  # the old files are back
                return
            if source.error is not None:
                entry.reason = f"{SERVES_ON}: {source.error}"
                changes.broken.append(entry.slot)
                return
            if source.config is not None and is_renamed(entry, source):
                entry.fingerprint, entry.source_config = source.fingerprint, source.config
                entry.reason = ""
                changes.renamed.append(entry.slot)
                if entry.image_path:
                    config = imaged(source.config)
                    self.index.add(source.folder, source.fingerprint, config, facts_of(entry))
                return
        successor = self._make(source)
        if successor is None:
            return
        may_wait = (State.PACKING, State.READY) if self.rehearses else (State.PACKING,)
        if entry.state is State.READY and successor.state in may_wait:
            self._successors[entry.slot] = successor
            successor.on_trial = self.rehearses
            if successor.state is State.PACKING:
                changes.to_pack.append(successor.slot)
            else:
                changes.on_trial.append(successor.slot)
            return
        self._retire(entry)
        self._current[entry.name, entry.version] = successor
        changes.changed.append(successor.slot)
        changes.removed.append(entry.slot)
        changes.sort_in(successor)

    def again(self, name: str, version: str) -> Entry | None:
        """Return the entry to pack of a version whose packing failed; None: there is none any more."""
        entry = self._current.get((name, version))
        if entry is None:
            return None
        if entry.state is State.UNAVAILABLE and entry.source_config is not None:
            entry.state, entry.reason = State.PACKING, ""
            return entry
        return self.renew(entry) if entry.reason else None

    def renew(self, entry: Entry) -> Entry | None:
        """Have the image of a version made again, which is gone; return its new entry.

        What is in memory serves on until the new one takes over.  None: nothing can be made of its files
        now, or something is being made already.
        """
        source = entry.seen
        is_current = self._current.get((entry.name, entry.version)) is entry
        if not is_current or entry.state is not State.READY or entry.slot in self._successors:
            return None
        if source is None or source.config is None or source.config.steps:
            return None
        successor = self._make(source)
        if successor is not None:
            self._successors[entry.slot] = successor
            successor.on_trial = self.rehearses
        return successor

    def _make(self, source: VersionSource) -> Entry | None:
        """Give a source a slot and the state that it can have now."""
        slot = self._numbers.take()
        if slot is None:
            log.error(
                "%s version %s is left out: the limit of %d versions is reached",
                *(source.name, source.version, self._numbers.versions_max),
            )
            return None
        entry = new_entry(slot, source)
        self._slots[slot] = entry
        if source.config is None:
            entry.state, entry.reason = State.UNAVAILABLE, source.error or "its folder is broken"
            return entry
        if source.config.steps:
            entry.engine, entry.state = ensemble.ENGINE, State.READY  # there is nothing to pack
        else:
            known = self.index.take(source.folder, source.fingerprint, imaged(source.config))
            if known is not None:
                take_facts(entry, known)
                entry.state = State.READY
        if source.name in self._unloaded:
            entry.state = State.UNLOADED
        return entry

    # --- what the packer says -------------------------------------------------------------------
    def on_packed(self, slot: int, done: PackDone) -> list[int]:
        """Take over a packer's answer; return the slots that are to be removed now."""
        entry = self._slots.get(slot)
        if entry is None or entry.source_config is None:
            return []
        if done.ok:
            source = (entry.folder, entry.fingerprint, imaged(entry.source_config))
            take_facts(entry, self.index.add(*source, done))
        current = self._current.get((entry.name, entry.version))
        if current is None or entry.retired:
            return []
        if current is not entry:
            return self._on_successor_packed(current, entry, done)
        if entry.state is not State.UNLOADED:
            entry.state = State.READY if done.ok else State.UNAVAILABLE
        entry.reason = "" if done.ok else done.message
        return []

    def on_rehearsed(self, slot: int, ok: bool, message: str) -> list[int]:
        """A version on trial works, or not; return the slots that are to be removed now."""
        entry = self._slots.get(slot)
        if entry is None or entry.retired or not entry.on_trial:
            return []
        current = self._current.get((entry.name, entry.version))
        if current is entry or current is None:
            entry.on_trial = not ok
            why = "its steps cannot run" if entry.config.steps else "its first request failed"
            entry.reason = "" if ok else f"on trial, because {why}: {message}"
            return []
        if ok:
            entry.on_trial = False
            return self._take_over(current, entry)
        current.reason = f"{SERVES_ON}: {message}"
        if entry.config.steps:
            return []  # they may come yet
        del self._successors[current.slot]
        self._retire(entry)
        return [slot]

    def _on_successor_packed(self, old: Entry, entry: Entry, done: PackDone) -> list[int]:
        if not done.ok:
            del self._successors[old.slot]
            old.reason = f"{SERVES_ON}: {done.message}"
            del self._slots[entry.slot]
            self._numbers.give_back(entry.slot)  # nobody has heard of it
            return []
        if self.rehearses and old.state is State.READY:
            entry.state = State.READY
            return []
        return self._take_over(old, entry)

    def _take_over(self, old: Entry, entry: Entry) -> list[int]:
        del self._successors[old.slot]
        entry.state = old.state if old.state is State.UNLOADED else State.READY
        self._retire(old)
        self._swap(old, entry)
        return [old.slot]

    # --- what the operator says -----------------------------------------------------------------
    def set_unloaded(self, name: str) -> RegistryChanges:
        """Take a model out of service.  Raises NotFound.

        What serves is retired as if it were replaced; in its place is what a load begins anew with.
        """
        self.find(name)
        self._unloaded.add(name)
        changes = RegistryChanges()
        for entry in self._by_name()[name]:
            if entry.state not in (State.READY, State.PACKING):
                continue
            slot = self._numbers.take() if entry.image_path and entry.state is State.READY else None
            if slot is None:
                # Nobody waits for it in a worker; or there is no slot, and they are refused.
                entry.state = State.UNLOADED
                changes.changed.append(entry.slot)
                continue
            new = replace(entry, slot=slot, state=State.UNLOADED)
            self._slots[slot] = self._current[name, entry.version] = new
            if (successor := self._successors.pop(entry.slot, None)) is not None:
                self._successors[slot] = successor
            self._leave(entry)
            changes.added.append(slot)
            changes.removed.append(entry.slot)
        self._names = None
        return changes

    def want(self, name: str) -> bool:
        """What comes of this model from now on is loaded; return whether it was unloaded."""
        was_unloaded = name in self._unloaded
        self._unloaded.discard(name)
        return was_unloaded

    def set_loaded(self, name: str) -> list[Entry]:
        """Put a model into service, or try a failed one again; return the entries that changed.

        Those without an image are PACKING.  Raises NotFound, and RepositoryError when the model's
        folder is broken.
        """
        self.find(name)
        self._unloaded.discard(name)
        versions = self._by_name()[name]
        affected = []
        for entry in versions:
            if entry.source_config is None or entry.state in (State.READY, State.PACKING):
                continue
            has_image = bool(entry.image_path) and os.path.exists(entry.image_path)
            has_all = has_image or entry.engine == ensemble.ENGINE
            entry.state = State.READY if has_all else State.PACKING
            entry.reason = ""
            affected.append(entry)
        if all(entry.source_config is None for entry in versions):
            raise RepositoryError(f"model '{name}' cannot be loaded: {versions[-1].reason}")
        return affected

    # --- slots ----------------------------------------------------------------------------------
    def end(self, slot: int) -> None:
        """A removed version answers no more; its slot stays taken until `release`."""
        assert slot in self._leaving, f"slot {slot} is ended but was not removed"
        if (entry := self._slots.get(slot)) is not None:
            entry.ended = True

    def release(self, slot: int) -> None:
        """Nothing uses the slot of a removed version any more."""
        assert slot in self._leaving, f"slot {slot} is released but was not removed"
        self._leaving.remove(slot)
        self._slots.pop(slot, None)
        self._numbers.give_back(slot)

    def _leave(self, entry: Entry) -> None:
        entry.retired = True
        self._leaving.add(entry.slot)

    def _retire(self, entry: Entry) -> None:
        self._leave(entry)
        if not entry.image_path:
            # It never served, so nobody may ask for it; only its slot stays taken until `release`.
            del self._slots[entry.slot]
        elif entry.source_config is not None:
            # Its files may come back, as when somebody moves a folder away and regrets it.
            source = (entry.folder, entry.fingerprint, imaged(entry.source_config))
            self.index.put_back(*source, facts_of(entry))

    def _retire_successor(self, entry: Entry, changes: RegistryChanges) -> None:
        successor = self._successors.pop(entry.slot, None)
        if successor is not None:
            self._retire(successor)
            changes.removed.append(successor.slot)
