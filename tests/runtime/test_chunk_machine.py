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

BATCH = 7  # chunks a message

sites = st.integers(0, 1)
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


class Device:
    """One device as the machine sees it: the supervisor's vault, one mover at a time, two workers at most."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.vault = Vault(len(TABLE))
        self.inodes: list[int] = []  # of the chunks, as they were made first
        self.content: dict[int, int] = {}
        self.mover: Process | None = None
        self.workers: list[Process] = []

    # --- the supervisor's end of the exchange -----------------------------------------------------
    def receive(self, chunks: Chunks) -> tuple[Message, dict[str, int]]:
        first = len(chunks)
        fds = [os.dup(fd) for fd in self.vault.after(first)[:BATCH]]
        names = tuple(map(str, range(len(fds))))
        return messages.Chunks(first=first, fds=names), dict(zip(names, fds, strict=True))

    def send(self, message: Message, fds: Sequence[int]) -> None:
        if isinstance(message, messages.Chunks):
            self.vault.accept(message.first, [os.dup(fd) for fd in fds])
        else:
            assert isinstance(message, ChunksTaken)

    def begin(self, gpu: FakeGpu, dies_at: int | None) -> Process:
        driver = started(gpu, self.number)
        if dies_at is not None:
            driver.die_at(dies_at)
        return Process(driver, Chunks(driver, TABLE, self.number))


class ChunkMachine(RuleBasedStateMachine):
    """A server with two devices: what dies on one costs the other nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.gpu = FakeGpu(count=2)
        self.devices = [Device(0), Device(1)]

    # --- rules --------------------------------------------------------------------------------
    @rule(site=sites, dies_at=moments)
    def start_mover(self, site: int, dies_at: int | None) -> None:
        device = self.devices[site]
        if device.mover is not None:
            return
        mover = device.begin(self.gpu, dies_at)
        try:
            assert take_chunks(
                *(mover.chunks, len(device.vault)),
                *(lambda: device.receive(mover.chunks), device.send),
            )
            make_chunks(mover.chunks, device.send)
            mover.arena = CudaArena(mover.chunks)
            mover.address = mover.arena.map_all(True)
        except Died:
            return
        device.mover = mover

    @rule(site=sites, dies_at=moments)
    def start_worker(self, site: int, dies_at: int | None) -> None:
        device = self.devices[site]
        if not device.vault.is_full or len(device.workers) == 2:
            return
        worker = device.begin(self.gpu, dies_at)
        try:
            assert take_chunks(
                *(worker.chunks, len(TABLE)),
                *(lambda: device.receive(worker.chunks), device.send),
            )
            worker.ranges = CudaRanges(worker.chunks)
            worker.mappings = [worker.ranges.open(VERSION_BYTES) for _ in range(VERSIONS)]
        except Died:
            return
        device.workers.append(worker)

    @rule(site=sites, chunk=st.integers(0, len(TABLE) - 1), value=st.integers(1, 255))
    def load(self, site: int, chunk: int, value: int) -> None:
        device = self.devices[site]
        if device.mover is not None:
            _shm.view(device.mover.address + TABLE.offset(chunk), 1, True)[0] = value
            device.content[chunk] = value

    @precondition(lambda self: any(device.workers for device in self.devices))
    @rule(data=st.data(), dies_at=moments)
    def place(self, data: st.DataObject, dies_at: int | None) -> None:
        device = data.draw(st.sampled_from([each for each in self.devices if each.workers]))
        worker = data.draw(st.sampled_from(device.workers))
        assert worker.mappings is not None
        mapping = data.draw(st.sampled_from(worker.mappings))
        numbers = st.integers(0, len(TABLE) - 1)
        chosen = data.draw(st.lists(numbers, min_size=3, max_size=3, unique=True))
        if dies_at is not None and dies_at <= 8:
            worker.driver.die_at(dies_at)
        try:
            mapping.map([(TABLE.offset(chunk), TABLE.nbytes(chunk)) for chunk in chosen], 1)
        except Died:
            device.workers.remove(worker)
            return
        at = 0
        for chunk in chosen:
            if at >= VERSION_BYTES:
                break
            held = _shm.view(mapping.address + at, 1, False)[0]
            assert held == device.content.get(chunk, 0)
            at += TABLE.nbytes(chunk)

    @rule(site=sites)
    def kill_mover(self, site: int) -> None:
        device = self.devices[site]
        if device.mover is not None:
            device.mover.driver.die()
            device.mover = None

    @rule(site=sites, number=st.integers(0, 1))
    def kill_worker(self, site: int, number: int) -> None:
        workers = self.devices[site].workers
        if workers:
            workers.pop(number % len(workers)).driver.die()

    # --- what always holds --------------------------------------------------------------------
    @invariant()
    def every_chunk_is_held_once_and_nothing_else_is_alive(self) -> None:
        everything: list[int] = []
        for device in self.devices:
            vault = device.vault
            held = [os.fstat(vault.after(number)[0]).st_ino for number in range(len(vault))]
            assert held[: len(device.inodes)] == device.inodes, "a chunk was exchanged for another"
            device.inodes = held
            for number, inode in enumerate(held):
                assert self.gpu.inodes[inode] == TABLE.nbytes(number)
                assert self.gpu.places[inode] == device.number
            everything += held
        assert len(set(everything)) == len(everything)
        assert self.gpu.live() == set(everything), "a chunk was leaked or lost"

    @invariant()
    def no_chunk_is_mapped_twice(self) -> None:
        for device in self.devices:
            if device.mover is not None:
                placed = {TABLE.offset(n): inode for n, inode in enumerate(device.inodes)}
                start, mapped = device.mover.address, device.mover.driver.mapped()
                assert {at - start: inode for at, inode in mapped.items()} == placed
            for worker in device.workers:
                inodes = list(worker.driver.mapped().values())
                assert len(set(inodes)) == len(inodes)
                assert set(inodes) <= set(device.inodes)

    def teardown(self) -> None:
        for driver in self.gpu.drivers:
            driver.die()
        kept = {inode for device in self.devices for inode in device.inodes}
        assert self.gpu.live() == kept, "the vaults alone keep what was made"
        for device in self.devices:
            device.vault.close()
        gc.collect()
        assert self.gpu.used_bytes() == 0


ChunkMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=15, deadline=None)
TestChunkMachine = ChunkMachine.TestCase
