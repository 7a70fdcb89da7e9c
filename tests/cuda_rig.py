"""Arenas of both kinds behind one face, for the tests that both must pass."""

from __future__ import annotations

import os
from typing import Protocol

from fake_driver import FakeDriver, FakeGpu

from overcommit.runtime import _shm
from overcommit.runtime.arena import Arena, Mapping
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.chunks import Chunks
from overcommit.runtime.config import LARGE_CHUNK_BYTES, SMALL_CHUNK_BYTES
from overcommit.runtime.cuda_arena import CudaArena, CudaMapping, CudaRanges
from overcommit.runtime.page_tables import PageTables

# 32 chunks of 2 MiB, then one of 64 MiB, then 4 of 2 MiB.
SMALLS_BEFORE = 32
CAPACITY = 2 * LARGE_CHUNK_BYTES + 4 * SMALL_CHUNK_BYTES
TABLE = ChunkTable(CAPACITY, small_share=0.5)


def started(gpu: FakeGpu, device: int = 0) -> FakeDriver:
    """A process whose driver is up, with a context of the device in this thread."""
    driver = FakeDriver(gpu)
    driver.init()
    driver.context_set_current(driver.primary_context_retain(device))
    return driver


def passed(fd: int) -> int:
    """What a receiver gets of a descriptor that is sent and then closed."""
    got = os.dup(fd)
    os.close(fd)
    return got


class ArenaRig(Protocol):
    """A mover's arena that can be written, and a worker's that opens mappings."""

    def open(self, nbytes: int) -> Mapping | CudaMapping:
        """A worker's mapping for an image of so many bytes."""

    def write(self, offset: int, data: bytes) -> None:
        """As the mover does."""

    def close(self) -> None:
        """Both."""


class MemfdRig:
    """The arena of `arena.py`."""

    def __init__(self) -> None:
        self.arena = Arena.create("test", CAPACITY)
        self.address = self.arena.map_all(True)
        self._tables = PageTables(self.arena.fd)

    def open(self, nbytes: int) -> Mapping:
        return Mapping(self._tables, nbytes)

    def write(self, offset: int, data: bytes) -> None:
        _shm.view(self.address + offset, len(data), True)[:] = data

    def close(self) -> None:
        self.arena.close()


class CudaRig:
    """The arena of `cuda_arena.py` on the fake driver: a mover's process and a worker's."""

    def __init__(self) -> None:
        self.gpu = FakeGpu()
        self.mover, self.worker = started(self.gpu), started(self.gpu)
        made, taken = Chunks(self.mover, TABLE, 0), Chunks(self.worker, TABLE, 0)
        while not made.is_complete:
            taken.take(made.make())
        self.arena = CudaArena(made)
        self.address = self.arena.map_all(True)
        self.chunks = taken
        self.ranges = CudaRanges(taken)

    def open(self, nbytes: int) -> CudaMapping:
        return self.ranges.open(nbytes)

    def write(self, offset: int, data: bytes) -> None:
        _shm.view(self.address + offset, len(data), True)[:] = data

    def close(self) -> None:
        self.arena.close()
        self.chunks.close()
        assert self.gpu.used_bytes() == 0, "memory was leaked"
