"""Residency, activations and a worker together: what runs is mapped where it lies, whatever comes late.

Here the mover's word is at once in the table, as in life; messages come in order, when the test lets them.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
from front_rig import Array
from residency_world import CHUNK, MS, SECOND
from worker_rig import Rig, X, vector_config

from overcommit.runtime import _shm
from overcommit.runtime.activation import Activations
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.bound import Loader, Opened
from overcommit.runtime.children import Child
from overcommit.runtime.config import Settings
from overcommit.runtime.fleet import Fleet
from overcommit.runtime.gate import SharedGate
from overcommit.runtime.memory import create_memfd
from overcommit.runtime.messages import Message
from overcommit.runtime.mover_messages import CANCELLED, CancelLoad, Load, LoadDone
from overcommit.runtime.parts import PartInfo
from overcommit.runtime.policy import make_policy
from overcommit.runtime.quarantine import Quarantine
from overcommit.runtime.registry import Registry
from overcommit.runtime.residency import Residency
from overcommit.runtime.residents import Terms
from overcommit.runtime.views import Tier
from overcommit.runtime.worker_messages import Activate, Coming, Placed, VersionInfo

CHUNKS = 12
TRUNK = PartInfo("trunk", CHUNK)
STEPS = ("ask", "ask", "hear", "announce", "publish", "end", "end", "tick", "tell", "tell", "rare")
PARTS = (TRUNK, PartInfo("body", 2 * CHUNK), PartInfo("tail", CHUNK))


class LoadsAtOnce:
    """The worker's loader without its thread."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._done: list[tuple[VersionInfo, Opened]] = []

    def load(self, info: VersionInfo) -> None:
        program = Program(self._desk, info.slot)
        self._done.append((info, cast(Opened, (None, program))))
        self._desk.rig.worker._was_helped = True

    def try_take(self) -> tuple[VersionInfo, Opened] | None:
        return self._done.pop(0) if self._done else None

    def close(self) -> None:
        pass


class Program:
    """Its model reads all of its weights, and the desk notes what is wrong with them."""

    key = "reads"

    def __init__(self, desk: Desk, slot: int) -> None:
        self._desk = desk
        self._slot = slot

    def mixed(self, header: object) -> None:
        return None

    def bind(self, header: object, memory: memoryview) -> Program:
        self._desk.check(self._slot)
        return self

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        self._desk.check(self._slot)
        return {"y": inputs["x"]}


class Desk:
    """A supervisor's books, and a worker's loop; the test is the mover, and carries the messages."""

    def __init__(self, host_chunks: int = 0) -> None:
        self.rig = Rig(
            lambda info: (_ for _ in ()).throw(AssertionError), arena_bytes=CHUNKS * CHUNK
        )
        for chunk in range(CHUNKS):
            self.rig.device[chunk * CHUNK] = chunk + 1
        worker = self.rig.worker
        worker.versions.loader.close()
        worker.versions.loader = cast(Loader, LoadsAtOnce(self))
        self.front = self.rig.link()
        self.wrong: list[str] = []
        self.loads: dict[int, Load] = {}
        self.cancelled: set[int] = set()
        self.to_worker: list[Message] = []
        self.to_supervisor: list[Activate] = []
        self.requests: list[int] = []
        self.now_ns = time.monotonic_ns()
        self._scratch = create_memfd("scratch", 4096)
        self._slots: dict[int, SimpleNamespace] = {}
        self._worker = SimpleNamespace(
            post=self.to_worker.append, seat=SimpleNamespace(index=0), told=set()
        )
        children = {"mover": SimpleNamespace(post=self._to_mover), "worker": self._worker}
        fleet = SimpleNamespace(
            of_kind=lambda kind, site: [children[kind]],
            worker=lambda seat: self._worker,
            mover_bells=SimpleNamespace(ring=lambda site: None),
        )
        self.residency = Residency(
            ChunkAllocator(CHUNKS * CHUNK),
            ChunkAllocator(host_chunks * CHUNK, has_tails=True) if host_chunks else None,
            lambda: make_policy("lru"),
            SharedGate(self.rig.table, lambda: (self.rig.leases,)),
        )
        self.activations = Activations(
            *(Settings(admission=False), self.residency),
            cast(Registry, SimpleNamespace(by_slot=self._slots.get)),
            *(cast(Fleet, fleet), Quarantine(), 0, lambda slot: True, self.rig.table),
        )
        self.rig.settle()
        self.rig.heard()

    def close(self) -> None:
        self.rig.close()
        os.close(self._scratch)

    # --- events ---------------------------------------------------------------------------------
    def add(self, slot: int, chunks: int, *parts: PartInfo) -> None:
        """A version of these parts, and of so many chunks of its own."""
        nbytes = sum(part.nbytes for part in parts) + chunks * CHUNK
        self._slots[slot] = SimpleNamespace(
            slot=slot,
            name=f"m{slot}",
            version="1",
            image_path="nowhere",
            nbytes=nbytes,
            config=vector_config(),
            ended=False,
        )
        self.residency.add(slot, f"m{slot}", nbytes, self.now_ns, Terms(), parts)

    def remove(self, slot: int) -> None:
        """The version is served no more."""
        del self._slots[slot]
        self.activations.remove(slot, self.now_ns)

    def _to_mover(self, message: Message) -> None:
        if isinstance(message, Load):
            self.loads[message.job] = message
        elif isinstance(message, CancelLoad):
            self.cancelled.add(message.job)

    def ask(self, slot: int) -> int:
        """A request comes."""
        request = self.front.submit(slot, [X])
        self.requests.append(request)
        self.turn()
        return request

    def turn(self) -> None:
        """The worker does all that it can do now."""
        self.rig.worker._control_ns = 0
        self.rig.settle()
        self.front.collect()
        self.to_supervisor += [m for m in self.rig.heard_in_full() if isinstance(m, Activate)]

    def hear(self) -> None:
        """The supervisor reads what the worker has asked for."""
        for message in self.to_supervisor:
            self.activations.on_activate(cast(Child, self._worker), message, self.now_ns)
        self.to_supervisor.clear()

    def tell(self, count: int = 1 << 20) -> None:
        """The worker reads the next messages."""
        for message in self.to_worker[:count]:
            self.rig.control.send(message)
            self.turn()
        del self.to_worker[:count]

    def announce(self, load: Load) -> None:
        """The mover is about to publish."""
        if load.publishes and not self.is_published(load):
            self.rig.table.set(load.slot, _shm.LOADING, load.publishes)

    def publish(self, load: Load) -> None:
        """The mover writes the word; its LoadDone is on the way."""
        if load.publishes:
            self.rig.table.set(load.slot, _shm.RESIDENT, load.publishes)

    def is_published(self, load: Load) -> bool:
        """Whether the mover did that."""
        return self.rig.table.get(load.slot) == (_shm.RESIDENT, load.publishes)

    def end(self, load: Load, *, ok: bool = True) -> None:
        """A load ends, and the supervisor hears of it."""
        is_cancelled = load.job in self.cancelled
        ok = (ok and not is_cancelled) or self.is_published(load)
        if ok:
            self.publish(load)
        del self.loads[load.job]
        self.now_ns += 1
        message = "" if ok else CANCELLED if is_cancelled else "torn"
        done = LoadDone(job=load.job, ok=ok, message=message)
        self.activations.on_load_done(done, self.now_ns)

    def lose_mover(self) -> None:
        """The mover dies, and the next one gets what had not ended."""
        self.loads.clear()
        self.cancelled.clear()
        self.activations.on_mover_ready(self.now_ns)

    def prefetch(self, slot: int, tier: Tier) -> None:
        """Bring it there unasked, if it is the time for it."""
        actions = self.residency.prefetch(slot, tier, self.now_ns, lambda version: True)
        self.activations.apply(actions or (), self.now_ns)

    def tick(self, after_ns: int) -> None:
        self.now_ns += after_ns
        self.activations.tick(self.now_ns)

    # --- looking --------------------------------------------------------------------------------
    def load_of(self, slot: int) -> Load:
        """The load that brings what this version has of its own."""
        (load,) = (load for load in self.loads.values() if load.slot == slot)
        return load

    def check_all(self) -> None:
        """Whatever may be leased is right."""
        for slot in self._slots:
            version = self.rig.worker.versions.get(slot)
            if version is None or version.generation is None:
                continue
            if self.rig.table.get(slot) == (_shm.RESIDENT, version.generation):
                self.check(slot)

    def check(self, slot: int) -> None:
        """Note it if the worker reads other weights than the version's, or none."""
        version = self.rig.worker.versions.get(slot)
        assert version is not None
        assert version.mapping is not None
        view = cast(memoryview, version.mapping.view())
        known = self.residency._pump.leaving.get(slot) or self.residency._versions[slot]
        extents, _ = self.residency._on_device.holdings.extents_of(known.parts)
        lies = [at for start, length in extents for at in range(start, start + length, CHUNK)]
        for number in range(-(-version.info.nbytes // CHUNK)):
            found = self._read(view, number * CHUNK)
            if found != lies[number] // CHUNK + 1:
                self.wrong.append(f"slot {slot}: chunk {number} reads {found}, not {lies[number]}")

    def _read(self, view: memoryview, at: int) -> int | None:
        """A byte; None where a touch of it would have ended the worker."""
        try:
            os.pwrite(self._scratch, view[at : at + 1], 0)
        except OSError:
            return None
        return os.pread(self._scratch, 1, 0)[0]


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


def test_a_word_takes_no_chunk_from_a_version_that_shares_it_since_coming(desk: Desk) -> None:
    desk.add(3, 2, TRUNK)
    desk.add(4, 2, TRUNK)
    desk.ask(4)
    desk.hear()
    assert [m.shared for m in desk.to_worker if isinstance(m, Coming)] == [()]
    desk.tell()
    trunk, _ = desk.loads.values()
    desk.end(trunk)
    desk.ask(3)
    desk.hear()
    desk.end(desk.load_of(3))
    assert [m.shared for m in desk.to_worker if isinstance(m, Placed)] == [(0,)]
    desk.tell()
    load = desk.load_of(4)
    desk.end(load)
    desk.turn()  # its word is there, its Placed is not read
    desk.check_all()
    desk.tell()
    desk.check_all()
    assert desk.wrong == []
    assert set(desk.requests) <= set(desk.front.answers)


def test_what_came_while_others_were_mapped_runs_by_its_word(desk: Desk) -> None:
    for slot in (3, 4):
        desk.add(slot, 2)
        desk.ask(slot)
    desk.hear()
    desk.tell()
    assert not desk.front.answers
    for load in list(desk.loads.values()):
        desk.publish(load)
        desk.turn()
    assert set(desk.requests) <= set(desk.front.answers)
    assert desk.wrong == []


def test_who_asks_again_before_placed_is_answered_by_it(desk: Desk) -> None:
    desk.add(3, 1)
    desk.ask(3)
    desk.hear()
    desk.tell()
    load = desk.load_of(3)
    desk.publish(load)
    desk.turn()
    assert set(desk.requests) <= set(desk.front.answers)
    # It is let go of and asked for again, and the supervisor has not heard of the end of its load.
    desk.rig.worker.versions.bound_max = 0
    assert desk.rig.worker.versions.make_room(lambda slot: False) == [3]
    desk.rig.worker.versions.bound_max = 4
    desk.ask(3)
    desk.hear()
    desk.end(load)
    assert [type(m) for m in desk.to_worker] == [Placed]
    desk.tell()
    assert set(desk.requests) <= set(desk.front.answers)
    assert desk.wrong == []


@pytest.mark.parametrize("seed", range(48))
def test_what_may_be_leased_is_mapped_where_it_lies_and_who_waits_is_answered(seed: int) -> None:
    drawn = random.Random(seed)
    desk = Desk(drawn.choice((0, 8)))
    desk.rig.worker.versions.bound_max = drawn.choice((2, 4, 64))
    slots = range(3, 10)

    def add(slot: int) -> None:
        parts = drawn.sample(PARTS, drawn.choice((0, 1, 1, 2)))
        desk.add(slot, drawn.choice((0, 1, 2, 3)) if parts else drawn.choice((1, 2, 3)), *parts)

    def step() -> None:
        slot = drawn.choice(slots)
        load = drawn.choice(list(desk.loads.values()) or [None])
        match drawn.choice(STEPS):
            case "ask":
                desk.ask(slot)
            case "hear":
                desk.hear()
            case "announce" if load is not None:
                desk.announce(load)
            case "publish" if load is not None and load.job not in desk.cancelled:
                desk.publish(load)
            case "end" if load is not None:
                desk.end(load, ok=drawn.random() < 0.93)
            case "tick":
                desk.tick(drawn.choice((MS, 30 * MS, 3 * SECOND)))
            case "rare":
                rare = drawn.choice(("lose", "prefetch", "prefetch", "replace"))
                if rare == "lose":
                    desk.lose_mover()
                elif rare == "prefetch":
                    desk.prefetch(slot, drawn.choice((Tier.DEVICE, Tier.HOST)))
                else:
                    desk.remove(slot)
                    add(slot)
            case _:
                desk.tell(1)

    for slot in slots:
        add(slot)
    for _ in range(120):
        step()
        if drawn.random() < 0.7:
            desk.turn()
        desk.check_all()
        assert desk.wrong == []
    for _ in range(50):
        desk.tell()
        desk.hear()
        for load in list(desk.loads.values()):
            desk.end(load)
        desk.tick(SECOND)
        desk.turn()
        desk.check_all()
    assert desk.wrong == []
    assert set(desk.requests) <= set(desk.front.answers), "somebody waits for ever"
    desk.close()
