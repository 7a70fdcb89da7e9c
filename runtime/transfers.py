"""Versions that are LOADING, and the loads in flight for them: one for each part that is on its way.

A version is placed whole, then its parts come one by one; a part that several versions wait for is
loaded once.  The last part that arrives, whoever had started its load, publishes the version.

    part     (none) -> in flight          [_start: it has a place on DEVICE, and no load]
             in flight -> (none)          [end: its places are filled, or its load failed]
             ahead: in flight without a request that waits, until promoted, cancelled or ended
             saved: ahead, from DEVICE to HOST; what it reads stays where it is until it ends
    version  DISK, HOST -> LOADING        [try_begin; try_ahead]
             DISK -> HOST                 [try_ahead: a load into HOST alone; DISK if it fails]
             LOADING -> DEVICE            [try_begin, if others had all its parts there; end]
             LOADING -> DISK              [give_up]

Invariants
 1. A part has at most one load in flight.
 2. A place that is filled was filled by a load that ended well; one that is not filled has a load in
    flight, or is given back.
 3. The places of a part with a load in flight do not move and are not given back.
 4. A load that fails is the failure of every version that waits for its part, and of no other; the
    part is not trusted on HOST any more.
 5. A load that brings all that its version lacks says as which generation it publishes it: the mover
    may write the state word when the last byte is there, and until the load has ended nobody else does.
    So a number is used by one try alone: one that fails takes its number along.
 6. A load that is ahead serves prefetches alone: it is promoted at once when a version needs it that
    requests wait for, and only such a load is ever cancelled.  The forecast of waits leaves it out.
 7. A save is never promoted, and nobody's failure: a part that did not come to HOST is not there.

Called by residency; pure.
"""

from __future__ import annotations

import itertools

from overcommit.runtime._shm import ABSENT, LOADING, RESIDENT
from overcommit.runtime.admission import Forecast, Need
from overcommit.runtime.config import LOADS_IN_FLIGHT_MAX
from overcommit.runtime.device_room import DeviceRoom
from overcommit.runtime.host_room import HostRoom
from overcommit.runtime.idle import IdleClock
from overcommit.runtime.mover_messages import Urgency
from overcommit.runtime.parts import Part
from overcommit.runtime.placement import Judge
from overcommit.runtime.residents import (
    NOBODY,
    CancelStarted,
    Extents,
    Foretold,
    Origin,
    Parts,
    Port,
    PromoteStarted,
    Publish,
    Source,
    StartLoad,
    State,
    Totals,
    Version,
)
from overcommit.runtime.views import Tier

Step = StartLoad | PromoteStarted | Publish


class Transfers:
    """See the module; `loading` are the versions, by slot, in order."""

    def __init__(
        self,
        device: DeviceRoom,
        host: HostRoom | None,
        port: Port,
        totals: Totals,
        idle: IdleClock,
        forecast: Forecast,
    ) -> None:
        self._device = device
        self._host = host
        self._port = port
        self._totals = totals
        self._idle = idle
        self.forecast = forecast
        self._loads: dict[int, tuple[Part, StartLoad]] = {}
        self._jobs = itertools.count(1)
        self.loading: dict[int, Version] = {}
        self.ahead: set[int] = set()  # slots of those of them that no request waits for
        self._jobs_ahead: set[int] = set()
        self._cancelled: set[int] = set()  # of these

    def in_flight(self) -> list[StartLoad]:
        """Return every load that was started and has not ended, in order."""
        return [load for _, load in self._loads.values()]

    # --- versions -------------------------------------------------------------------------------
    def try_begin(self, version: Version, now_ns: int, *, desperate: bool) -> list[Step] | None:
        """DISK or HOST -> LOADING; None if DEVICE has and makes no room for what is not there."""
        parts = version.distinct_parts
        if not self._device.try_place(version, parts, now_ns, desperate=desperate):
            return None
        return self._begin(version, now_ns)

    def try_ahead(
        self, version: Version, tier: Tier, now_ns: int, judge: Judge
    ) -> list[Step] | None:
        """Begin to bring a version to a tier, though no request waits for it.

        None: it is there, or other loads are under way, or nobody may leave for it.
        """
        if self.loading or self._jobs_ahead:
            return None
        parts = version.distinct_parts
        if tier is Tier.DEVICE and version.state in (State.DISK, State.HOST):
            if not self._device.try_place_ahead(version, parts, now_ns, judge):
                return None
            self.ahead.add(version.slot)
            return self._begin(version, now_ns)
        if tier is not Tier.HOST or version.state is not State.DISK or self._host is None:
            return None
        # What DEVICE has would have to be read again.
        on_device, on_host = self._device.holdings.places, self._host.holdings.places
        wanted = tuple(part for part in parts if part in on_host or part not in on_device)
        if not wanted or not self._host.try_place_ahead(version, wanted, now_ns, judge):
            return None
        version.state = State.HOST
        steps: list[Step] = []
        for part in wanted:
            place = self._host.holdings.places[part]
            if not place.is_filled and not part.job:
                steps.append(self._load(version, part, "disk", place.extents, None, "prefetch"))
        return steps

    @property
    def is_busy(self) -> bool:
        """Whether a load is in flight, or a version waits for one."""
        return bool(self.loading or self._loads)

    def save(self, version: Version, part: Part) -> StartLoad:
        """Copy a part from DEVICE to its place on HOST."""
        assert self._host is not None
        self._host.on_saving(version)
        on_device, on_host = (room.holdings.places[part] for room in (self._device, self._host))
        assert on_device.is_filled
        return self._load(version, part, "device", on_host.extents, on_device.extents, "prefetch")

    def promote(self, version: Version) -> list[PromoteStarted]:
        """Requests wait for the version now, and for every load of its parts."""
        self.ahead.discard(version.slot)
        if not self._jobs_ahead:
            return []
        promotable = self._jobs_ahead - self._cancelled
        jobs = [
            part.job
            for part in version.distinct_parts
            if part.job in promotable and self._loads[part.job][1].source != "device"
        ]
        self._jobs_ahead.difference_update(jobs)
        return [PromoteStarted(job) for job in jobs]

    def cancel_ahead(self) -> list[CancelStarted]:
        """Have every load stopped that no request waits for; each is said once."""
        jobs = sorted(self._jobs_ahead - self._cancelled)
        self._cancelled.update(jobs)
        return [CancelStarted(job) for job in jobs]

    @property
    def is_full(self) -> bool:
        """Whether so many versions are loading that no wish may begin now."""
        return len(self.loading) - len(self.ahead) >= LOADS_IN_FLIGHT_MAX

    def _begin(self, version: Version, now_ns: int) -> list[Step]:
        self.loading[version.slot] = version
        version.state = State.LOADING
        version.source, version.load_ns = None, 0
        self._port.set_state(version.slot, LOADING, version.generation)
        if self._host is not None and not version.pinned:
            self._keep_on_host(self._host, version, now_ns)
        return self._carry_on(version, now_ns)

    def give_up(self, version: Version) -> None:
        """LOADING -> DISK; loads of its parts go on, for others or for nobody."""
        assert version.state is State.LOADING
        del self.loading[version.slot]
        self.ahead.discard(version.slot)
        self._device.release(version)
        version.state = State.DISK
        version.generation += 1
        if self._host is not None:
            self._host.drop(version)
        self._port.set_state(version.slot, ABSENT, version.generation)

    def answer(self, version: Version) -> Publish:
        """Tell everybody who waits where the version is."""
        extents, shared = self._device.holdings.extents_of(version.parts)
        return Publish(version.slot, version.generation, extents, version.take_waiters(), shared)

    def foretell(self, version: Version) -> Foretold:
        """Say of a version that is LOADING where it will be: its places do not move meanwhile."""
        assert version.state is State.LOADING
        extents, shared = self._device.holdings.extents_of(version.parts)
        return Foretold(version.generation + 1, extents, version.waiters - {NOBODY}, shared)

    def _keep_on_host(self, host: HostRoom, version: Version, now_ns: int) -> None:
        """Hold on HOST what is there, and what passes through, if there is room for all of it.

        What is on DEVICE and not on HOST would have to be read again, so it is left out.
        """
        if version.host and set(version.host).issuperset(version.device):
            return  # all of it is there
        places = host.holdings.places
        for passing in (self._to_come(version), ()):
            parts = tuple(p for p in version.distinct_parts if p in places or p in passing)
            if not parts:
                continue
            if version.slot in self.ahead:
                # Nobody's last copy leaves for a guess.
                is_placed = host.try_place_ahead(
                    version, parts, now_ns, lambda victim: victim.state is State.DEVICE
                )
            else:
                is_placed = host.try_place(version, parts, now_ns)
            if is_placed:
                return

    def _carry_on(self, version: Version, now_ns: int) -> list[Step]:
        """Start the loads that nobody has started; publish a version that needs none."""
        steps: list[Step] = []
        if version.slot not in self.ahead:
            steps += self.promote(version)
        to_come = self._to_come(version)
        publishes = self._generation_of(version, to_come)
        for part in to_come:
            load = self._start(version, part, now_ns, publishes)
            version.source = "disk" if "disk" in (version.source, load.source) else "host"
            steps.append(load)
        places = self._device.holdings.places
        if not to_come and all(places[part].is_filled for part in version.device):
            steps.append(self._publish(version, now_ns))
        return steps

    def start_again(self, version: Version, now_ns: int) -> list[Step]:
        """What was on DEVICE is there no more: load what nobody loads."""
        assert version.state is State.LOADING
        return self._carry_on(version, now_ns)

    def _publish(self, version: Version, now_ns: int) -> Publish:
        """LOADING -> DEVICE."""
        del self.loading[version.slot]
        self.ahead.discard(version.slot)
        version.state = State.DEVICE
        version.generation += 1
        version.published_ns = now_ns
        self._idle.watch(version, now_ns)
        version.failures, version.last_error = 0, ""
        self._totals.count_load(version)
        if version.host and self._host is not None:
            self._host.on_published(version, now_ns)
        self._device.on_published(version, now_ns)
        self._port.set_state(version.slot, RESIDENT, version.generation)
        return self.answer(version)

    def _own(self, version: Version) -> None:
        """LOADING -> DEVICE, of one that leaves: it was published by its load, and may be leased."""
        del self.loading[version.slot]
        version.state = State.DEVICE
        version.generation += 1
        self._port.set_state(version.slot, RESIDENT, version.generation)

    # --- loads ----------------------------------------------------------------------------------
    def _to_come(self, version: Version) -> Parts:
        """Return the version's parts that are not on DEVICE and have no load in flight."""
        places = self._device.holdings.places
        return tuple(p for p in version.device if not places[p].is_filled and not p.job)

    def lacks(self, version: Version) -> list[tuple[Part, Need]]:
        """Return what has to be loaded for a version that is not LOADING, and from where."""
        places = self._device.holdings.places
        return [
            (part, (self._source(part), part.nbytes))
            for part in version.distinct_parts
            if not part.job and (part not in places or not places[part].is_filled)
        ]

    def _source(self, part: Part) -> Source:
        place = None if self._host is None else self._host.holdings.places.get(part)
        return "host" if place is not None and place.is_filled else "disk"

    def _generation_of(self, version: Version, to_come: Parts) -> int:
        """Return as what the load of what is to come publishes the version; 0: more is missing."""
        if len(to_come) != 1 or version.slot in self.ahead:
            return 0
        if len(version.device) == 1:
            return version.generation + 1
        places = self._device.holdings.places
        others = (part for part in version.device if part is not to_come[0])
        return version.generation + 1 if all(places[part].is_filled for part in others) else 0

    def _start(self, version: Version, part: Part, now_ns: int, publishes: int) -> StartLoad:
        """Begin to bring a part to its places, from HOST if it is there."""
        on_device = self._device.holdings.places[part]
        on_host = None if self._host is None else self._host.holdings.places.get(part)
        source = self._source(part)
        host = None if on_host is None else on_host.extents
        if version.slot in self.ahead:
            return self._load(version, part, source, host, on_device.extents, "prefetch")
        load = self._load(
            *(version, part, source, host, on_device.extents, "foreground"), publishes
        )
        self.forecast.on_started(load.job, version.slot, source, part.nbytes, now_ns)
        return load

    def _load(
        self,
        version: Version,
        part: Part,
        source: Origin,
        host: Extents | None,
        device: Extents | None,
        urgency: Urgency,
        publishes: int = 0,
    ) -> StartLoad:
        job = next(self._jobs)
        load = StartLoad(
            *(job, version.slot, part.digest, part.nbytes, source, host, device, urgency),
            *(part.packed_bytes, publishes, version.waiters if publishes else frozenset()),
        )
        part.job = job
        self._loads[job] = (part, load)
        if urgency == "prefetch":
            self._jobs_ahead.add(job)
        return load

    def end(
        self, job: int, ok: bool, now_ns: int, load_ns: int
    ) -> tuple[list[Step], list[Version]]:
        """A load has ended: what follows, and the versions whose load has failed with it.

        A job that is not known is ignored: it was said twice.
        """
        part, load = self._loads.pop(job, (None, None))
        if part is None or load is None:
            return [], []
        part.job = 0
        self.forecast.on_ended(job, ok, now_ns)
        self._jobs_ahead.discard(job)
        self._cancelled.discard(job)
        place = self._device.holdings.places.get(part)
        if place is not None and load.device is not None and load.source != "device":
            place.is_filled = ok
        holders = () if place is None else place.holders
        waiting = [version for version in self.loading.values() if version in holders]
        if load.source == "device":
            return self._end_saving(part, ok, waiting, now_ns), []
        steps: list[Step] = []
        failed: list[Version] = []
        if ok:
            self._totals.bytes_loaded += part.nbytes
            if load.host is not None and self._host is not None:
                copy = self._host.holdings.places[part]
                copy.is_filled = True
                if load.device is None:
                    for version in copy.holders:
                        if version.state is State.HOST and not version.is_leaving:
                            self._host.on_filled(version, load_ns, now_ns)
        elif self._host is not None:
            self._host.distrust(part)
        for version in waiting:
            version.load_ns = max(version.load_ns, load_ns)
            if version.is_leaving:
                if ok and load.publishes and version.slot == load.slot:
                    self._own(version)
                continue  # it goes when none of its loads is in flight
            if ok:
                steps += self._carry_on(version, now_ns)
            else:
                self.give_up(version)
                failed.append(version)
        self._device.holdings.settle(part)
        if self._host is not None:
            self._host.holdings.settle(part)
        return steps, failed

    def _end_saving(self, part: Part, ok: bool, waiting: list[Version], now_ns: int) -> list[Step]:
        """A copy to HOST has ended; it is worth nothing if DEVICE was lost meanwhile."""
        assert self._host is not None
        on_device, on_host = (room.holdings for room in (self._device, self._host))
        is_whole = part in on_device.places and on_device.places[part].is_filled
        if ok and is_whole:
            on_host.places[part].is_filled = True
            self._host.on_saved(part)
        else:
            self._host.give_back(part)
        steps: list[Step] = []
        if not is_whole:  # who waits could not begin its load before
            for version in waiting:
                if not version.is_leaving:
                    steps += self._carry_on(version, now_ns)
        on_device.settle(part)
        on_host.settle(part)
        return steps
