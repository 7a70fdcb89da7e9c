"""Movers and workers that die at any call: no chunk is lost, leaked or mapped twice."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass

from cuda_rig import started
from fake_driver import Died, FakeDriver, FakeGpu
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from overcommit.runtime import _shm, messages
from overcommit.runtime.chunk_exchange import make_chunks, take_chunks
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.chunks import Chunks
from overcommit.runtime.config import LARGE_CHUNK_BYTES, SMALL_CHUNK_BYTES
from overcommit.runtime.cuda_arena import CudaArena, CudaMapping, CudaRanges
from overcommit.runtime.messages import ChunksTaken, Message
from overcommit.runtime.vault import Vault

# 32 small chunks, 2 large ones, 3 small ones: with CONTROL_FDS_MAX at 64 one message would hold all.
TABLE = ChunkTable(3 * LARGE_CHUNK_BYTES + 3 * SMALL_CHUNK_BYTES, small_share=0.3)
VERSIONS = 3
VERSION_BYTES = 3 * SMALL_CHUNK_BYTES

moments = st.none() | st.integers(1, 160)  # before which call a process dies, if it does


@dataclass(slots=True, eq=False)
class Process:
    """A mover or a worker."""

    driver: FakeDriver
    chunks: Chunks
    arena: CudaArena | None = None
    address: int = 0
    ranges: CudaRanges | None = None
    mappings: list[CudaMapping] | None = None


class ChunkMachine(RuleBasedStateMachine):
    """A supervisor's vault, one mover at a time, two workers at most."""

    def __init__(self) -> None:
        super().__init__()
        self.gpu = FakeGpu()
        self.vault = Vault(len(TABLE))
        self.inodes: list[int] = []  # of the chunks, as they were made first
        self.content: dict[int, int] = {}
        self.mover: Process | None = None
        self.workers: list[Process] = []
        self.batch = 7  # chunks a message

    # --- the supervisor's end of the exchange -----------------------------------------------------
    def _receive(self, chunks: Chunks) -> tuple[Message, dict[str, int]]:
        first = len(chunks)
        fds = [os.dup(fd) for fd in self.vault.after(first)[: self.batch]]
        names = tuple(map(str, range(len(fds))))
        return messages.Chunks(first=first, fds=names), dict(zip(names, fds, strict=True))

    def _send(self, message: Message, fds: Sequence[int]) -> None:
        if isinstance(message, messages.Chunks):
            self.vault.accept(message.first, [os.dup(fd) for fd in fds])
        else:
            assert isinstance(message, ChunksTaken)

    def _begin(self, dies_at: int | None) -> Process:
        driver = started(self.gpu)
        if dies_at is not None:
            driver.die_at(dies_at)
        return Process(driver, Chunks(driver, TABLE, 0))

    # --- rules --------------------------------------------------------------------------------
    @precondition(lambda self: self.mover is None)
    @rule(dies_at=moments)
    def start_mover(self, dies_at: int | None) -> None:
        mover = self._begin(dies_at)
        try:
            assert take_chunks(
                mover.chunks, len(self.vault), lambda: self._receive(mover.chunks), self._send
            )
            make_chunks(mover.chunks, self._send)
            mover.arena = CudaArena(mover.chunks)
            mover.address = mover.arena.map_all(True)
        except Died:
            return
        self.mover = mover

    @precondition(lambda self: self.vault.is_full and len(self.workers) < 2)
    @rule(dies_at=moments)
    def start_worker(self, dies_at: int | None) -> None:
        worker = self._begin(dies_at)
        try:
            assert take_chunks(
                worker.chunks, len(TABLE), lambda: self._receive(worker.chunks), self._send
            )
            worker.ranges = CudaRanges(worker.chunks)
            worker.mappings = [worker.ranges.open(VERSION_BYTES) for _ in range(VERSIONS)]
        except Died:
            return
        self.workers.append(worker)

    @precondition(lambda self: self.mover is not None)
    @rule(chunk=st.integers(0, len(TABLE) - 1), value=st.integers(1, 255))
    def load(self, chunk: int, value: int) -> None:
        assert self.mover is not None
        _shm.view(self.mover.address + TABLE.offset(chunk), 1, True)[0] = value
        self.content[chunk] = value

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), dies_at=moments)
    def place(self, data: st.DataObject, dies_at: int | None) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        assert worker.mappings is not None
        mapping = data.draw(st.sampled_from(worker.mappings))
        numbers = st.integers(0, len(TABLE) - 1)
        chosen = data.draw(st.lists(numbers, min_size=3, max_size=3, unique=True))
        if dies_at is not None and dies_at <= 8:
            worker.driver.die_at(dies_at)
        try:
            mapping.map([(TABLE.offset(chunk), TABLE.nbytes(chunk)) for chunk in chosen], 1)
        except Died:
            self.workers.remove(worker)
            return
        at = 0
        for chunk in chosen:
            if at >= VERSION_BYTES:
                break
            assert _shm.view(mapping.address + at, 1, False)[0] == self.content.get(chunk, 0)
            at += TABLE.nbytes(chunk)

    @precondition(lambda self: self.mover is not None)
    @rule()
    def kill_mover(self) -> None:
        assert self.mover is not None
        self.mover.driver.die()
        self.mover = None

    @precondition(lambda self: self.workers)
    @rule(number=st.integers(0, 1))
    def kill_worker(self, number: int) -> None:
        self.workers.pop(number % len(self.workers)).driver.die()

    # --- what always holds --------------------------------------------------------------------
    @invariant()
    def every_chunk_is_held_once_and_nothing_else_is_alive(self) -> None:
        held = [os.fstat(self._fd(number)).st_ino for number in range(len(self.vault))]
        assert held[: len(self.inodes)] == self.inodes, "a chunk was exchanged for another"
        self.inodes = held
        assert len(set(held)) == len(held)
        for number, inode in enumerate(held):
            assert self.gpu.inodes[inode] == TABLE.nbytes(number)
        assert self.gpu.live() == set(held), "a chunk was leaked or lost"

    def _fd(self, number: int) -> int:
        return self.vault.after(number)[0]

    @invariant()
    def no_chunk_is_mapped_twice(self) -> None:
        if self.mover is not None:
            placed = {TABLE.offset(n): inode for n, inode in enumerate(self.inodes)}
            start = self.mover.address
            assert {at - start: i for at, i in self.mover.driver.mapped().items()} == placed
        for worker in self.workers:
            mapped = list(worker.driver.mapped().values())
            assert len(set(mapped)) == len(mapped)

    def teardown(self) -> None:
        for driver in self.gpu.drivers:
            driver.die()
        assert self.gpu.live() == set(self.inodes), "the vault alone keeps what was made"
        self.vault.close()
        gc.collect()
        assert self.gpu.used_bytes() == 0


ChunkMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
TestChunkMachine = ChunkMachine.TestCase
