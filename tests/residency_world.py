"""Residency in a glass box: a fake of shared memory, and a world that plays workers and mover."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

from overcommit.runtime._shm import ABSENT, EVICTING, LOADING, RESIDENT
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.config import MIB, NEVER_NS
from overcommit.runtime.parts import PartInfo, round_up
from overcommit.runtime.policy import make_policy
from overcommit.runtime.residency import Residency
from overcommit.runtime.residents import (
    NOBODY,
    Action,
    CancelStarted,
    PromoteStarted,
    Publish,
    Refuse,
    StartLoad,
    State,
    Terms,
    Usage,
    Version,
    Withdraw,
)
from overcommit.runtime.views import Tier

CHUNK = 2 * MIB
MS = 1_000_000
SECOND = 1_000 * MS


class FakePort:
    """State words, leases and counters as plain dictionaries."""

    def __init__(self) -> None:
        self.words: dict[int, tuple[int, int]] = {}
        self.leases: Counter[int] = Counter()
        self.waiting: Counter[int] = Counter()
        self.asking: set[int] = set()  # slots that requests wait for until they are answered
        self.uses: Counter[int] = Counter()
        self.last_used_ns: Counter[int] = Counter()
        self.evicted: list[int] = []
        self.is_hungry = False
        # slot -> generation that the mover wrote, whose load has not ended
        self.early: dict[int, int] = {}
        self.lies = 0  # so many leases are taken between a look at the counters and try_evict
        self.looks = 0

    def try_evict(self, slot: int, generation: int) -> bool:
        assert self.words[slot] == (RESIDENT, generation), "only what is RESIDENT can be evicted"
        if self.lies:
            self.lies -= 1
            return False
        if self.leases[slot]:
            return False
        self.words[slot] = (EVICTING, generation)
        self.evicted.append(slot)
        return True

    def usage(self, slot: int) -> Usage:
        self.looks += 1
        return Usage(
            waiting=self.waiting[slot] + (slot in self.asking),
            uses=self.uses[slot],
            last_used_ns=self.last_used_ns[slot],
            leases=self.leases[slot],
        )

    def set_state(self, slot: int, state: int, generation: int) -> None:
        assert not self.leases[slot] or state == RESIDENT, "the word changed under a lease"
        self.words[slot] = (state, generation)

    def set_hungry(self, hungry: bool) -> None:
        self.is_hungry = hungry


class World:
    """A residency with memory of so many 2 MiB chunks, and everything that it has answered."""

    def __init__(self, device_chunks: int, host_chunks: int = 0) -> None:
        self.port = FakePort()
        self.device = ChunkAllocator(device_chunks * CHUNK)
        self.host: ChunkAllocator | None = None
        if host_chunks:
            self.host = ChunkAllocator(host_chunks * CHUNK, has_tails=True)
        self.residency = Residency(self.device, self.host, lambda: make_policy("lru"), self.port)
        self.now_ns = SECOND
        self.loads: dict[int, StartLoad] = {}
        self.published: list[Publish] = []
        self.refused: list[Refuse] = []
        self.withdrawn: list[Withdraw] = []
        self.cancelled: list[int] = []
        self.promoted: list[int] = []

    # --- events ---------------------------------------------------------------------------------
    def add(
        self,
        slot: int,
        chunks: float = 1,
        *,
        pinned: bool = False,
        priority: int = 0,
        min_resident_ns: int = 0,
        ttl_ns: int = 0,
        parts: Sequence[PartInfo] = (),
        packed_bytes: int = 0,
    ) -> None:
        """`chunks` is what the version has of its own, beside these parts; packed, it is `packed_bytes`."""
        terms = Terms(pinned, priority, min_resident_ns, ttl_ns)
        nbytes = sum(round_up(part.nbytes, CHUNK) for part in parts) + int(chunks * CHUNK)
        self.residency.add(slot, f"model-{slot}", nbytes, self.now_ns, terms, parts, packed_bytes)

    def want(self, slot: int, waiter: int = 0, latest_ns: int = NEVER_NS) -> list[Action]:
        if waiter != NOBODY:
            self.port.asking.add(slot)
        return self.take(self.residency.want(slot, waiter, self.now_ns, latest_ns))

    def finish(self, job: int | None = None, *, ok: bool = True, message: str = "") -> list[Action]:
        """The mover ends a load, by default the oldest."""
        job = next(iter(self.loads)) if job is None else job
        load = self.loads.pop(job, None)
        if load is not None and self.port.early.get(load.slot) == load.publishes:
            del self.port.early[load.slot]
        actions = self.residency.on_load_done(job, ok, message, self.now_ns, 10 * MS)
        self.take(actions)
        self.now_ns += 1  # no two events are at one time
        return actions

    def publish_early(self, job: int) -> None:
        """The mover has written the word of a load that publishes, and has not said so yet."""
        load = self.loads[job]
        assert load.publishes
        state, generation = self.port.words[load.slot]
        assert state == LOADING
        assert generation < load.publishes
        self.port.words[load.slot] = (RESIDENT, load.publishes)
        self.port.early[load.slot] = load.publishes

    def prefetch(
        self, slot: int, tier: Tier, judge: Callable[[Version], bool] = lambda version: True
    ) -> list[Action]:
        """Nothing, if it is not the time for it."""
        actions = self.residency.prefetch(slot, tier, self.now_ns, judge)
        return self.take(actions or [])

    def remove(self, slot: int) -> list[Action]:
        return self.take(self.residency.remove(slot, self.now_ns))

    def tick(self, after_ns: int = 5 * MS) -> list[Action]:
        self.now_ns += after_ns
        return self.take(self.residency.tick(self.now_ns))

    def use(self, slot: int) -> None:
        """A request ran."""
        self.port.uses[slot] += 1
        self.port.last_used_ns[slot] = self.now_ns
        self.now_ns += 1

    def load(self, *slots: int) -> None:
        """Bring these to DEVICE, one after the other."""
        for slot in slots:
            self.want(slot)
            while self.state(slot) is State.LOADING:
                self.finish()
            assert self.state(slot) is State.DEVICE

    # --- looking --------------------------------------------------------------------------------
    def state(self, slot: int) -> State:
        view = self.residency.view(slot)
        assert view is not None
        return view.state

    def has_host_copy(self, slot: int) -> bool:
        view = self.residency.view(slot)
        return view is not None and view.host_bytes > 0

    def has_bytes(self, digest: str) -> bool:
        """Whether a part that can be shared is in a tier: then no disk may be asked for it."""
        return any(
            place.is_filled and part.digest == digest != ""
            for room in self.residency._rooms
            for part, place in room.holdings.places.items()
        )

    def take(self, actions: list[Action]) -> list[Action]:
        for action in actions:
            if isinstance(action, Publish | Refuse | Withdraw):
                self.port.asking.discard(action.slot)
            if isinstance(action, StartLoad):
                assert action.job not in self.loads
                assert action.source != "disk" or not self.has_bytes(action.digest)
                self.loads[action.job] = action
            elif isinstance(action, Publish):
                assert self.port.words[action.slot] == (RESIDENT, action.generation)
                self.published.append(action)
            elif isinstance(action, Withdraw):
                self.withdrawn.append(action)
            elif isinstance(action, CancelStarted):
                assert self.loads[action.job].urgency == "prefetch"
                assert action.job not in self.promoted
                self.cancelled.append(action.job)
            elif isinstance(action, PromoteStarted):
                assert self.loads[action.job].urgency == "prefetch"
                self.promoted.append(action.job)
            else:
                self.refused.append(action)
        assert list(self.loads.values()) == self.residency.loads_in_flight()
        check(self.residency, self.port)
        return actions


_WORDS = {
    State.DISK: (ABSENT,),
    State.HOST: (ABSENT,),
    State.LOADING: (LOADING,),
    State.DEVICE: (RESIDENT,),
}


def check(residency: Residency, port: FakePort) -> None:
    """Assert the invariants of `residency` and `placement` that hold between events."""
    leaving = residency._pump.leaving
    everybody = [*residency._versions.values(), *leaving.values()]
    assert all(version.is_leaving for version in leaving.values())
    loading = residency._transfers.loading
    for version in everybody:
        is_loading = version.state is State.LOADING
        parts = set(version.parts)
        held = version.state in (State.LOADING, State.DEVICE)
        assert set(version.device) == (parts if held else set())
        assert set(version.host) <= parts
        assert version.state is not State.HOST or version.host
        assert version.state is not State.DISK or not version.host
        assert (loading.get(version.slot) is version) == is_loading
        is_queued = version.slot in residency._wishes and not version.is_leaving
        assert not version.waiters or (is_queued + is_loading == 1 and not version.is_leaving)
        assert not (is_queued and is_loading)
        if version.is_leaving or version.slot not in leaving:
            state, generation = port.words.get(version.slot, (ABSENT, 0))
            if version.slot in port.early:
                assert version.state is State.LOADING
                assert (state, generation) == (RESIDENT, version.generation + 1)
                continue
            assert state in _WORDS[version.state]
            assert generation == version.generation
    jobs = {load.job: (part, load) for part, load in residency._transfers._loads.values()}
    assert list(jobs) == list(residency._transfers._loads)
    assert all(part.job == job for job, (part, _) in jobs.items())
    in_flight = {part for part, _ in jobs.values()}
    assert len(in_flight) == len(jobs), "a part is read twice at once"
    for room in (residency._on_device, residency._on_host):
        if room is None:
            continue
        room.allocator.check()
        places = room.holdings.places
        spans = sorted(extent for place in places.values() for extent in place.extents)
        assert sum(length for _, length in spans) == room.allocator.used_bytes
        for part, place in places.items():
            whole = part.nbytes if room is residency._on_device else part.stored_bytes
            assert sum(n for _, n in place.extents) == room.allocator.footprint(whole)
        for (offset, length), (following, _) in itertools.pairwise(spans):
            assert offset + length <= following, "two parts share bytes"
        holders = {part: {v for v in everybody if part in room.held(v)} for part in places}
        assert {part: place.holders for part, place in places.items()} == holders
        assert set(room.holders.values()) == {v for v in everybody if room.held(v)}
        assert {p for v in everybody for p in room.held(v)} <= places.keys()
        for part, place in places.items():
            assert part.job or place.holders, "bytes that nobody needs"
            leaves = all(v.is_leaving for v in place.holders)
            assert place.is_filled or part in in_flight or leaves, "nobody fills a place"
        for version in everybody:
            if version.state is State.DEVICE and room is residency._on_device:
                assert all(places[part].is_filled for part in version.device)
    known = [part for version in everybody for part in version.parts]
    table = {(part.digest, part.packed_bytes): part for part in known if part.digest}
    assert table == residency._parts._parts
    assert all(part.versions == known.count(part) for part in known)
    if residency._on_host is not None:
        copies = set(residency._on_host.holders.values())
        doubles = {version for version in copies if version.state is State.DEVICE}
        on_host = residency._on_host
        known_doubles = {*on_host._doubles.values(), *on_host._saved.values()}
        assert doubles <= known_doubles <= copies, "HOST does not know what DEVICE holds too"
    for part, load in jobs.values():
        if load.device is not None:
            device = residency._on_device.holdings.places[part]
            assert load.device == device.extents, "a load lost its bytes"
        assert load.packed_bytes == part.packed_bytes
        if load.host is not None:
            assert residency._on_host is not None
            host = residency._on_host.holdings.places[part]
            assert load.host == host.extents, "a load lost its bytes on HOST"
            assert host.is_filled == (load.source == "host")
    assert port.is_hungry == residency._pump.is_hungry
