"""What can be served: the repository watched, versions packed, front ends told.

Joins the repository scan (`watch`, a helper thread), the registry, the pack queue and the front ends' routing
tables.

Invariants
 1. Front ends learn of a version before it may be asked for, and a replaced version's successor is
    announced before the old one's route is taken away.
 2. A version leaves memory only after its route is gone, as `departures` has it.
 3. A broken model changes nothing but its own entry.

Called by the supervisor, from its one thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from overcommit.runtime.announcer import Announcer
from overcommit.runtime.cache_keeper import CacheKeeper
from overcommit.runtime.config import imaged
from overcommit.runtime.departures import Departures
from overcommit.runtime.dependents import brought_along
from overcommit.runtime.ensemble_trials import EnsembleTrials
from overcommit.runtime.ensemble_watch import EnsembleWatch
from overcommit.runtime.entries import Entry, State, to_route
from overcommit.runtime.house import House
from overcommit.runtime.kept_images import reusable
from overcommit.runtime.misfits import misfits_of
from overcommit.runtime.overrides import Overrides
from overcommit.runtime.pack_retries import PackRetries
from overcommit.runtime.packer_messages import Pack, PackDone
from overcommit.runtime.packing import Packing
from overcommit.runtime.process import Process
from overcommit.runtime.programs import Programs
from overcommit.runtime.rehearsal import Rehearsals
from overcommit.runtime.repository import VersionSource
from overcommit.runtime.rollout import Rollout
from overcommit.runtime.version_log import VersionLog
from overcommit.runtime.watch import Watch
from overcommit.runtime.welcome import Welcome

log = logging.getLogger("overcommit.catalogue")


class Catalogue:
    """The registry and everything that changes it."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.registry = house.registry
        self.packing = Packing(
            house.settings, self._start_packer, self._describe_pack, self._on_packed
        )
        settings = house.settings
        self.watch = Watch(settings.repositories, settings.cache_dir, settings.scan_interval_s)
        self.departures = Departures(
            settings.request_timeout_ms * 1_000_000,
            *(house.usage, lambda: house.fleet.of_kind("front_end"), self._end, self._release),
        )
        self._announcer = Announcer(house.fleet, house.spreading)
        self.registry.rehearses = True
        self.rollout = Rollout(settings.cache_dir, self.registry)
        self.ensembles = EnsembleWatch(
            self.registry, self.rollout, lambda: self._announcer.revision
        )
        ensembles = EnsembleTrials(self.registry, self.ensembles, self._on_rehearsed)
        self.rehearsals = Rehearsals(house.fleet, ensembles, self._on_rehearsed)
        self.overrides = Overrides(settings.cache_dir, settings.repositories)
        self._sources: list[VersionSource] = []
        self._retries = PackRetries()
        self._versions = VersionLog()
        self._keeper = CacheKeeper(
            settings.cache_dir, settings.cache_keep_days, self.registry.with_hidden
        )
        self._awaited: set[int] = set()  # slots that are being packed and that requests wait for
        self._is_scanned = False
        self.welcome = Welcome(house)
        self._programs = Programs(house.fleet)

    # --- the repository -------------------------------------------------------------------------
    def start(self) -> None:
        """Begin to watch the repository; the first result comes through `watch.fd`."""
        self.watch.start()

    def close(self) -> None:
        """End the packer and the scanner."""
        self.packing.close()
        self.watch.close()
        self._keeper.close()
        self.overrides.close()

    def on_scanned(self, now_ns: int) -> list[int]:
        """Apply what the scanner saw; return the tickets of questions that are answered."""
        answered: list[int] = []
        for seen in self.watch.take():
            answered += seen.answered
            if seen.sources is not None:
                self._sources = seen.sources
                self.apply(now_ns)
        self._is_scanned = True
        return answered

    def apply(self, now_ns: int) -> None:
        """Take over what the last scan saw, as clients have changed it."""
        changes = self.registry.apply_scan(self.overrides.laid_over(self._sources))
        for slot in changes.to_pack:
            self.packing.add(slot)
        upsert: list[Entry] = []
        for slot in (*changes.added, *changes.changed):
            entry = self.registry.by_slot(slot)
            if entry is None:
                continue
            if entry.state is State.READY:
                self._on_usable(entry, now_ns)
            upsert.append(entry)
        for slot in changes.on_trial:
            entry = self.registry.by_slot(slot)
            if entry is not None:
                self._on_usable(entry, now_ns)
        for entry in filter(None, map(self.registry.by_slot, changes.broken)):
            self._versions.broken(entry, now_ns)
        for name in changes.lacking:
            self._fill_in(name, now_ns)
        touched = (*changes.added, *changes.changed, *changes.renamed, *changes.removed)
        self._names_changed(filter(None, map(self.registry.by_slot, touched)))
        self.announce_routes(upsert, changes.removed, now_ns)
        log.info(
            "repository: %d versions, %d added, %d changed, %d removed, %d to pack",
            *(len(self.registry), len(changes.added), len(changes.changed)),
            *(len(changes.removed), len(changes.to_pack)),
        )

    def is_scanned(self, name: str) -> bool:
        """Whether the repository itself holds a model of this name."""
        return any(source.name == name for source in self._sources)

    def is_settled(self, name: str) -> bool:
        """Whether a model, and those of its steps, are what they will be: none is packed or on trial."""
        names = filter(self.registry.has, (name, *brought_along(self.registry, name)))
        return not any(
            entry.state is State.PACKING or entry.slot in self.rehearsals
            for each in names
            for entry in self.registry.with_successors(each)
        )

    # --- packing --------------------------------------------------------------------------------
    def _start_packer(self) -> Process | None:
        return self.house.fleet.start_torch("packer")

    def _describe_pack(self, slot: int, job: int) -> Pack | None:
        entry = self.registry.by_slot(slot)
        if entry is None or entry.retired or entry.source_config is None:
            return None
        settings = self.house.settings
        return Pack(
            job=job,
            name=entry.name,
            version=entry.version,
            folder=entry.folder,
            config=imaged(entry.source_config),
            cache_dir=settings.cache_dir,
            allow_code=settings.allow_code,
            packs=settings.host_packing == "on",
        )

    def _on_packed(self, slot: int, done: PackDone) -> None:
        now_ns = time.monotonic_ns()
        entry = self.registry.by_slot(slot)
        if entry is None:
            return
        key = (entry.name, entry.version)
        if done.may_pass:
            wait_s = self._retries.put_off(key, now_ns)
            message = f"{done.message}; it is tried again in {wait_s:g} s"
            done = msgspec.structs.replace(done, message=message)
        else:
            self._retries.forget(key)
        if done.is_full:
            self._keeper.make_room(now_ns)
        if not done.ok:
            self._versions.failed(entry.name, entry.version, done.message, now_ns)
        name = entry.name
        removed = self.registry.on_packed(slot, done)
        entry = self.registry.by_slot(slot)
        if entry is not None and entry.state is State.READY:
            self._on_usable(entry, now_ns)
            self.welcome.show_example(entry)
        if not done.ok:
            self._fill_in(name, now_ns)
        if entry is not None and self.registry.is_successor(entry):
            return  # it is on trial: nobody hears of it before it has worked
        changed = [] if entry is None else [entry]
        if slot not in self._awaited and not removed and entry is not None:
            self._announcer.note(entry, now_ns)
            return
        self._awaited.discard(slot)
        self.announce_routes(changed, removed, now_ns)

    def _on_usable(self, entry: Entry, now_ns: int) -> None:
        """A version has all that it needs; one on trial shows that it works first."""
        self.house.add(entry, now_ns)
        self._versions.works(entry)
        self._programs.note(entry)
        for text in misfits_of(entry.folder, entry.config, entry.source_config):
            log.warning("%s version %s: %s", entry.name, entry.version, text)
        if not entry.on_trial:
            self._let_go(entry.name, now_ns)
        else:
            self.rehearsals.add(to_route(entry), now_ns)

    def _on_rehearsed(self, slot: int, ok: bool, message: str) -> None:
        """A version on trial works, or not; or (`ok`, and why not) nothing of its name does."""
        now_ns = time.monotonic_ns()
        entry = self.registry.by_slot(slot)
        if entry is None or entry.retired:
            return
        if ok and not message:
            self._versions.takes_over(entry, now_ns)
        elif not ok:
            self._versions.on_trial(entry, message, now_ns)
        removed = self.registry.on_rehearsed(slot, ok, message)
        current = [self.registry.find(entry.name, entry.version)]
        # Who is new must be known before names lead to it, and old ones leave after that.
        self._announcer.say(current, (), now_ns)
        self._names_changed([entry])
        self.announce_routes([], removed, now_ns)
        if ok:
            self._let_go(entry.name, now_ns)

    def _let_go(self, name: str, now_ns: int) -> None:
        """Versions that the policy leaves out go when another one serves in their place."""
        removed = self.registry.drop_spares(name)
        if removed:
            self.announce_routes([], removed, now_ns)

    def _fill_in(self, name: str, now_ns: int) -> None:
        """Where nothing that the policy chooses works, the next older version serves."""
        slot = self.registry.fill_in(name)
        entry = None if slot is None else self.registry.by_slot(slot)
        if entry is None:
            return
        if entry.state is State.READY:
            self._on_usable(entry, now_ns)
        else:
            self.packing.add(entry.slot)
        self._announcer.say([entry], (), now_ns)

    def take_in(self, name: str, now_ns: int) -> None:
        """Put a model into service.  Raises NotFound and RepositoryError."""
        affected = self.registry.set_loaded(name)
        for entry in affected:
            if entry.state is State.READY:
                self.house.add(entry, now_ns)
            elif entry.state is State.PACKING:
                self.packing.add(entry.slot)
        for entry in self.registry.versions(name):
            self.mend(entry.slot, now_ns)
        self.announce_routes(affected, [], now_ns)
        self.try_again(name, now_ns)

    def take_out(self, name: str, now_ns: int) -> None:
        """Take a model out of service; what it was asked before is answered.  Raises NotFound."""
        changes = self.registry.set_unloaded(name)
        affected = map(self.registry.by_slot, (*changes.added, *changes.changed))
        self.announce_routes(list(filter(None, affected)), changes.removed, now_ns)
        for slot in changes.changed:
            self.packing.drop(slot)
            self.house.remove(slot, now_ns)

    def try_again(self, name: str, now_ns: int) -> None:
        """Somebody loads a model: its versions on trial get another one.  Raises NotFound."""
        for entry in self.registry.versions(name):
            if entry.on_trial and entry.state is State.READY:
                self._on_usable(entry, now_ns)

    def ensure(self, slot: int) -> None:
        """A request waits for this version's image."""
        if self._announcer.is_unsaid(slot):  # it is packed
            self.tell()
        elif self.packing.hurry(slot):
            self._awaited.add(slot)

    def on_bind_failed(self, slot: int, message: str) -> None:
        """A worker cannot load the program of a version."""
        entry = self.registry.by_slot(slot)
        if entry is not None:
            log.error("%s version %s cannot be bound: %s", entry.name, entry.version, message)
            self.mend(slot, time.monotonic_ns())

    def mend(self, slot: int, now_ns: int) -> None:
        """Have a version's image made again if it, or a part or the program of it, is gone."""
        entry = self.registry.by_slot(slot)
        if entry is None or not entry.image_path or reusable(Path(entry.image_path)) is not None:
            return
        new = self.registry.renew(entry)
        if new is not None:
            self._make_again(new, now_ns)
            self.packing.hurry(new.slot)

    def _make_again(self, entry: Entry, now_ns: int) -> None:
        if entry.state is State.READY:  # its image was there all the time
            self._on_usable(entry, now_ns)
        else:
            self.packing.add(entry.slot)

    def _retry(self, now_ns: int) -> None:
        """Pack once more what failed for a reason that may have passed."""
        for name, version in self._retries.take_due(now_ns):
            entry = self.registry.again(name, version)
            if entry is None:
                self._retries.forget((name, version))
                continue
            self._make_again(entry, now_ns)
            if not self.registry.is_successor(entry):
                self.announce_routes([entry], [], now_ns)

    def name(self, name: str, **said: str) -> bytes:
        """Take over what an operator says of a model's names.  Raises BadRequest, NotFound."""
        answer = self.rollout.say(name, **said)
        self._announcer.say_names(self.rollout.changes([name]))
        return answer

    def _names_changed(self, entries: Iterable[Entry]) -> None:
        """Front ends hear what the names of these models mean now, where that is something else."""
        changed = self.rollout.changes(entry.name for entry in entries)
        if changed:
            self._announcer.say_names(changed)

    # --- front ends -----------------------------------------------------------------------------
    def announce_routes(self, changed: list[Entry], removed: list[int], now_ns: int) -> None:
        """Tell every front end; take what is removed out of memory when nothing uses it."""
        self._announcer.say(changed, removed, now_ns)
        for slot in removed:
            self.packing.drop(slot)
            self.rehearsals.drop(slot)
            self._awaited.discard(slot)
            self.house.retire(slot, now_ns)
            self.departures.add(slot, now_ns)

    # --- time -----------------------------------------------------------------------------------
    def step(self, now_ns: int) -> None:
        """Pack, tell new front ends, let retired versions go."""
        run = self.house.boundary.run
        run("packing again what failed", self._retry, now_ns)
        run("packing", self.packing.step, now_ns)
        run("rehearsals", self.rehearsals.step, now_ns)
        if self.welcome.is_said:  # the first workers are forked: they would have had to wait
            run("the imports of programs", self._programs.step)
            run("looking after the cache folder", self._keeper.step, now_ns)
        if self._is_scanned:
            run("telling front ends of models", self._tell, now_ns)
            run("ensembles", self.ensembles.step, now_ns)
        run("letting versions go", self._retire, now_ns)
        run("the log of versions", self._versions.step, now_ns)

    def tell(self) -> None:
        """Whoever is answered next may ask for what has changed: front ends hear of it before."""
        self._announcer.say((), (), time.monotonic_ns())

    def _tell(self, now_ns: int) -> None:
        self._announcer.tell_new(self.registry.entries(), self.rollout.told())
        self._announcer.step(now_ns)

    def _retire(self, now_ns: int) -> None:
        """Let go of versions whose routes are gone and that nobody uses any more."""
        self.departures.step(now_ns)
        if not self.departures and not self.overrides.is_clear:
            self.overrides.clear(self.registry.folders())

    def _end(self, slot: int, is_late: bool, now_ns: int) -> None:
        if is_late:
            log.warning(
                "%s was unloaded, replaced or removed over %d ms ago, and no request may take longer: "
                "what is left is refused",
                *(self.house.title_of(slot), self.house.settings.request_timeout_ms),
            )
        self.registry.end(slot)
        self.house.remove(slot, now_ns)

    def _release(self, slot: int) -> None:
        self.house.forget(slot)
        self.registry.release(slot)

    def announce(self, age_s: str) -> None:
        """Say that the server serves."""
        entries = list(self.registry.entries())
        states = [self.ensembles.state(entry) for entry in entries]
        ready = [
            entry for entry, state in zip(entries, states, strict=True) if state is State.READY
        ]
        bad = states.count(State.UNAVAILABLE)
        self.welcome.say(age_s, len(entries), ready, len(self.packing), bad)
