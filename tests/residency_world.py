"""Residency in a glass box: a fake of shared memory, and a world that plays workers and mover."""

from __future__ import annotations

import itertools
from collections import Counter

from overcommit.runtime._shm import ABSENT, EVICTING, LOADING, RESIDENT
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.config import MIB
from overcommit.runtime.policy import make_policy
from overcommit.runtime.residency import Action, Publish, Refuse, Residency, StartLoad, Usage
from overcommit.runtime.residents import State, Terms

CHUNK = 2 * MIB
MS = 1_000_000
SECOND = 1_000 * MS


class FakePort:
    """State words, leases and counters as plain dictionaries."""

    def __init__(self) -> None:
        self.words: dict[int, tuple[int, int]] = {}
        self.leases: Counter[int] = Counter()
        self.waiting: Counter[int] = Counter()
        self.uses: Counter[int] = Counter()
        self.last_used_ns: Counter[int] = Counter()
        self.evicted: list[int] = []
        self.is_hungry = False
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
            waiting=self.waiting[slot],
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
        self.host = ChunkAllocator(host_chunks * CHUNK) if host_chunks else None
        self.residency = Residency(self.device, self.host, make_policy("lru"), self.port)
        self.now_ns = SECOND
        self.loads: dict[int, StartLoad] = {}
        self.published: list[Publish] = []
        self.refused: list[Refuse] = []

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
    ) -> None:
        terms = Terms(pinned, priority, min_resident_ns, ttl_ns)
        self.residency.add(slot, f"model-{slot}", int(chunks * CHUNK), self.now_ns, terms)

    def want(self, slot: int, waiter: int = 0) -> list[Action]:
        return self.take(self.residency.want(slot, waiter, self.now_ns))

    def finish(self, job: int | None = None, *, ok: bool = True, message: str = "") -> list[Action]:
        """The mover ends a load, by default the oldest."""
        job = next(iter(self.loads)) if job is None else job
        self.loads.pop(job, None)
        actions = self.residency.on_load_done(job, ok, message, self.now_ns, 10 * MS)
        self.take(actions)
        self.now_ns += 1  # no two events are at one time
        return actions

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

    def take(self, actions: list[Action]) -> list[Action]:
        for action in actions:
            if isinstance(action, StartLoad):
                assert action.job not in self.loads
                self.loads[action.job] = action
            elif isinstance(action, Publish):
                assert self.port.words[action.slot] == (RESIDENT, action.generation)
                self.published.append(action)
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
    leaving = residency._leaving
    everybody = [*residency._versions.values(), *leaving.values()]
    assert all(version.is_leaving for version in leaving.values())
    for version in everybody:
        assert (version.device is not None) == (version.state in (State.LOADING, State.DEVICE))
        assert version.state is not State.HOST or version.host is not None
        assert version.state is not State.DISK or version.host is None
        in_flight = sum(v is version for v, _ in residency._loads.values())
        assert in_flight == (version.state is State.LOADING)
        is_queued = version.slot in residency._wishes and not version.is_leaving
        assert not version.waiters or (is_queued + in_flight == 1 and not version.is_leaving)
        assert not (is_queued and in_flight)
        if version.is_leaving or version.slot not in leaving:
            state, generation = port.words.get(version.slot, (ABSENT, 0))
            assert state in _WORDS[version.state]
            assert generation == version.generation
    for room in (residency._on_device, residency._on_host):
        if room is None:
            continue
        room.allocator.check()
        held = [(version, room.extents(version)) for version in everybody]
        spans = sorted(extent for _, extents in held for extent in extents or ())
        assert sum(length for _, length in spans) == room.allocator.used_bytes
        for (offset, length), (following, _) in itertools.pairwise(spans):
            assert offset + length <= following, "two versions share bytes"
        assert set(room.holders.values()) == {v for v, extents in held if extents is not None}
    if residency._on_host is not None:
        copies = set(residency._on_host.holders.values())
        doubles = {version for version in copies if version.state is State.DEVICE}
        known = set(residency._on_host._doubles.values())
        assert doubles <= known <= copies, "HOST does not know what DEVICE holds too"
    for version, load in residency._loads.values():
        assert (version.device, version.host) == (load.device, load.host), "a load lost its bytes"
    assert port.is_hungry == residency._is_hungry
