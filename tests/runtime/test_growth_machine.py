"""DEVICE shrinks and grows while movers and workers start, lag behind, and die at any call.

The supervisor's rooms are the real ones; children take their messages when the machine says so, on the
fake driver, with the code that the real ones run.
"""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from cuda_rig import started
from fake_driver import Died, FakeGpu
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from overcommit.runtime import gpu_growth, gpu_pressure, messages
from overcommit.runtime.chunk_exchange import make_chunks, take_message
from overcommit.runtime.chunk_feed import ChunkFeed
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.chunks import Chunks
from overcommit.runtime.config import LARGE_CHUNK_BYTES, MIB, SMALL_CHUNK_BYTES
from overcommit.runtime.cuda_arena import CudaArena, CudaMapping, CudaRanges
from overcommit.runtime.driver import DriverError
from overcommit.runtime.gpu_pressure import GpuPressure
from overcommit.runtime.gpu_watch import GpuReading
from overcommit.runtime.messages import ChunksTaken, MakeChunks, Message
from overcommit.runtime.retiring import RetiringAllocator
from overcommit.runtime.vault import Vault

# 32 small chunks, a large one, 3 small ones.
SHARE = 0.5
TABLE = ChunkTable(2 * LARGE_CHUNK_BYTES + 3 * SMALL_CHUNK_BYTES, small_share=SHARE)
TOTAL_BYTES = TABLE.capacity_bytes + 100 * MIB
PLACED_MAX = 12

moments = st.none() | st.integers(1, 40)


@pytest.fixture(autouse=True)
def bounds_of_a_small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_pressure, "GPU_FREE_LOW_BYTES", 8 * MIB)
    for module in (gpu_pressure, gpu_growth):
        monkeypatch.setattr(module, "GPU_FREE_GOAL_BYTES", 30 * MIB)
    monkeypatch.setattr(gpu_growth, "GPU_FREE_GROW_BYTES", 50 * MIB)
    monkeypatch.setattr(gpu_growth, "GPU_GROW_LOOKS", 2)
    monkeypatch.setattr(gpu_growth, "GPU_GROW_LOOKS_MAX", 4)
    monkeypatch.setattr(gpu_growth, "GPU_GROW_CHUNKS", 5)


class Placed:
    """A version: where it lies, told to a worker."""

    def __init__(self, extents: Sequence[tuple[int, int]]) -> None:
        self.extents = tuple(extents)
        self.nbytes = sum(length for _, length in extents)


class Child:
    """A mover or a worker, which takes its messages one by one."""

    def __init__(self, gpu: FakeGpu, is_mover: bool, held: int, count: int) -> None:
        self.driver = started(gpu)
        self.chunks = Chunks(self.driver, TABLE, 0)
        self.chunks.limit = count
        self.takes_first = held if is_mover else count
        self.is_mover = is_mover
        self.is_ready = False
        self.arena = CudaArena(self.chunks)
        self.ranges = CudaRanges(self.chunks)
        self.mappings: dict[Placed, CudaMapping] = {}
        self.inbox: deque[tuple[Message | Placed, tuple[int, ...]]] = deque()
        self.outbox: deque[tuple[Message, tuple[int, ...]]] = deque()

    def post(self, message: Message | Placed, fds: tuple[int, ...] = ()) -> None:
        self.inbox.append((message, tuple(map(os.dup, fds))))

    def _send(self, message: Message, fds: Sequence[int]) -> None:
        self.outbox.append((message, tuple(map(os.dup, fds))))

    def run(self) -> None:
        """Take the next message, as `main` of the mover or of a worker does."""
        self._get_ready()
        if not self.inbox:
            return
        message, fds = self.inbox.popleft()
        if isinstance(message, messages.Chunks):
            named = dict(zip(message.fds, fds, strict=True))
            if not self.is_ready:
                take_message(self.chunks, message, named)
            elif self.is_mover:
                assert not named
                self.arena.shrink(message.count)
            else:
                self.ranges.change(message, named)
            self._send(ChunksTaken(count=len(self.chunks)), ())
        elif isinstance(message, MakeChunks):
            assert self.is_ready, "asked before it serves"
            self.chunks.resize(message.count)
            make_chunks(self.chunks, self._send, self.arena.map_more)
        else:
            assert isinstance(message, Placed)
            assert self.is_ready
            self.mappings[message] = self.ranges.open(message.nbytes)
            self.mappings[message].map(message.extents, 1)
        self._get_ready()

    def _get_ready(self) -> None:
        if self.is_ready or len(self.chunks) < min(self.takes_first, self.chunks.limit):
            return
        if self.is_mover:
            make_chunks(self.chunks, self._send)
            self.arena.map_all(True)
        self.is_ready = True


class StandIn:
    """Residency and activations, as far as they are asked: what lies behind an offset leaves at once."""

    def __init__(self, device: RetiringAllocator) -> None:
        self.device = device
        self.placed: list[Placed] = []

    def clear_from(self, offset: int, now_ns: int) -> list[Any]:
        for placed in [p for p in self.placed if any(sum(e) > offset for e in p.extents)]:
            self.free(placed)
        return []

    def free(self, placed: Placed) -> None:
        self.placed.remove(placed)
        self.device.free(placed.extents)

    def apply(self, actions: list[Any], now_ns: int) -> None:
        assert not actions

    def tick(self, now_ns: int) -> None:
        pass


class GrowthMachine(RuleBasedStateMachine):
    """One device: a vault, a feed, the pressure; a mover and two workers at most."""

    def __init__(self) -> None:
        super().__init__()
        self.gpu = FakeGpu(TOTAL_BYTES)
        self.vault = Vault(len(TABLE))
        self.feed = ChunkFeed(self.vault)
        self.device = RetiringAllocator(TABLE.capacity_bytes, small_share=SHARE)
        self.stand_in = StandIn(self.device)
        self.pressure = GpuPressure(
            *(TABLE, self.device, self.stand_in, self.stand_in, self.feed, self.shrink)  # type: ignore[arg-type]
        )
        self.children: list[Child] = []
        self.now_ns = 1
        self.reading: GpuReading | None = None

    # --- the supervisor -------------------------------------------------------------------------
    def shrink(self, count: int) -> None:
        self.feed.shrink(count)
        self.device.retire(TABLE.offset(count))

    def hear(self, child: Child) -> None:
        message, fds = child.outbox.popleft()
        if isinstance(message, messages.Chunks):
            self.feed.on_made(message.first, fds)
            if 0 < message.count < self.vault.count:
                self.shrink(message.count)
        else:
            assert isinstance(message, ChunksTaken)
            self.feed.on_taken(id(child), message.count)

    def begin(self, is_mover: bool) -> None:
        held = len(self.vault)
        child = Child(self.gpu, is_mover, held, self.vault.count)
        self.children.append(child)
        limit = held if is_mover else self.vault.count
        self.feed.add(id(child), child.post, limit, is_mover=is_mover)

    def reap(self, child: Child) -> None:
        self.children.remove(child)
        if not child.driver.is_dead:
            child.driver.die()
        self.feed.forget(id(child))
        for _, fds in (*child.inbox, *child.outbox):
            for fd in fds:
                os.close(fd)

    @property
    def movers(self) -> list[Child]:
        return [child for child in self.children if child.is_mover]

    def take_turn(self, child: Child, dies_at: int | None = None) -> None:
        if dies_at is not None:
            child.driver.die_at(dies_at)
        try:
            child.run()
        except (Died, DriverError):  # with which a mover ends too
            self.reap(child)

    # --- rules ----------------------------------------------------------------------------------
    @precondition(lambda self: not self.movers)
    @rule()
    def start_mover(self) -> None:
        self.begin(True)

    @precondition(lambda self: len(self.children) - len(self.movers) < 2)
    @rule()
    def start_worker(self) -> None:
        self.begin(False)

    @precondition(lambda self: self.children)
    @rule(pick=st.integers(0, 2), dies_at=moments)
    def let_run(self, pick: int, dies_at: int | None) -> None:
        child = self.children[pick % len(self.children)]
        self.take_turn(child, dies_at if dies_at is not None and dies_at < 20 else None)

    @precondition(lambda self: any(child.outbox for child in self.children))
    @rule(pick=st.integers(0, 2))
    def let_hear(self, pick: int) -> None:
        talking = [child for child in self.children if child.outbox]
        self.hear(talking[pick % len(talking)])

    @precondition(lambda self: self.children)
    @rule(pick=st.integers(0, 2), hears_first=st.booleans())
    def kill(self, pick: int, hears_first: bool) -> None:
        child = self.children[pick % len(self.children)]
        while hears_first and child.outbox:
            self.hear(child)
        self.reap(child)

    @rule(taken=st.sampled_from([0, 0, 40, 95, 150, 240]))
    def others_take(self, taken: int) -> None:
        self.gpu.total_bytes = TOTAL_BYTES - taken * MIB

    @rule(times=st.integers(1, 4))
    def look(self, times: int) -> None:
        for _ in range(times):
            self.now_ns += 6_000_000_000
            free = max(0, self.gpu.total_bytes - self.gpu.used_bytes())
            self.reading = GpuReading(
                device=0,
                name="",
                total_bytes=TOTAL_BYTES,
                used_bytes=0,
                free_bytes=free,
                taken_ns=self.now_ns,
            )
            self.tick()

    @rule()
    def tick(self) -> None:
        self.now_ns += 60_000_000
        self.pressure.tick(self.reading, self.now_ns)

    @precondition(lambda self: any(c.is_ready and not c.is_mover for c in self.children))
    @rule(pick=st.integers(0, 1), chunks=st.integers(1, 6))
    def place(self, pick: int, chunks: int) -> None:
        if len(self.stand_in.placed) == PLACED_MAX:
            return
        workers = [child for child in self.children if child.is_ready and not child.is_mover]
        extents = self.device.try_allocate(chunks * SMALL_CHUNK_BYTES, exact=True)
        if extents is not None and self.movers and self.movers[0].is_ready:
            end = max(map(sum, extents))
            assert end <= self.movers[0].arena.nbytes, "the mover has it not mapped"
        if extents is not None:
            placed = Placed(extents)
            self.stand_in.placed.append(placed)
            workers[pick % len(workers)].post(placed)

    @precondition(lambda self: self.stand_in.placed)
    @rule(pick=st.integers(0, PLACED_MAX))
    def free(self, pick: int) -> None:
        self.stand_in.free(self.stand_in.placed[pick % len(self.stand_in.placed)])

    @rule()
    def settle(self) -> None:
        """Everybody does what there is to do, nobody dies, nobody else takes memory: DEVICE is whole."""
        self.others_take(0)
        for _ in range(200):
            if not self.movers:  # it may die of a call that was chosen before
                self.start_mover()
            for child in list(self.children):
                for _ in range(len(child.inbox) + 1):
                    if child in self.children:
                        self.take_turn(child)
                while child in self.children and child.outbox:
                    self.hear(child)
            self.look(1)
            if self.feed.is_settled and self.device.end_bytes == TABLE.capacity_bytes:
                break
        assert self.device.capacity_bytes == TABLE.capacity_bytes
        assert all(len(child.chunks) == len(TABLE) for child in self.children)
        assert self.movers[0].arena.nbytes == TABLE.capacity_bytes
        assert self.gpu.live() == set(self.inodes()), "a chunk was leaked or lost"

    # --- what always holds ----------------------------------------------------------------------
    def inodes(self) -> list[int]:
        return [os.fstat(self.vault.after(n)[0]).st_ino for n in range(len(self.vault))]

    @invariant()
    def every_chunk_is_held_once_with_its_length(self) -> None:
        inodes = self.inodes()
        assert len(set(inodes)) == len(inodes) <= self.vault.count <= len(TABLE)
        assert [self.gpu.inodes[inode] for inode in inodes] == [
            TABLE.nbytes(n) for n in range(len(inodes))
        ]

    @invariant()
    def what_is_handed_out_exists_or_is_being_made_for_the_first_time(self) -> None:
        self.device.check()
        for placed in self.stand_in.placed:
            assert max(map(sum, placed.extents)) <= TABLE.offset(self.vault.count)

    @invariant()
    def who_serves_has_what_the_supervisor_has(self) -> None:
        inodes = self.inodes()
        for child in self.children:
            if not child.is_ready or child.inbox or child.outbox:
                continue
            have = [os.fstat(m.fd).st_ino for m in child.driver._handles.values()]
            assert have == inodes[: len(have)] or child.is_mover
            if self.vault.is_full:
                assert have == inodes

    def teardown(self) -> None:
        self.settle()
        for child in list(self.children):
            self.reap(child)
        assert self.gpu.live() == set(self.inodes()), "the vault alone keeps what was made"
        self.vault.close()
        gc.collect()
        assert self.gpu.used_bytes() == 0


GrowthMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestGrowthMachine = GrowthMachine.TestCase
