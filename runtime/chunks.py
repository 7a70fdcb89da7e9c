"""The chunks of a CUDA arena in one process: made here, or taken over from descriptors.

    ABSENT --[make: cuMemCreate, export]--> HERE, and a descriptor for the supervisor
    ABSENT --[take: import, the descriptor is closed]--> HERE
    HERE --[close, resize to less, or the process's death]--> ABSENT

Invariants
 1. Chunks come in the order of their numbers, so a count says which are here.
 2. Making and taking are all or nothing: after an error no handle and no descriptor is left over.
 3. A chunk's memory outlives this process while the supervisor has its descriptor.

Called by the mover, which makes what the supervisor lacks, and by workers, which only take.
"""

from __future__ import annotations

import os

from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.driver import Driver, MemoryHandle


class Chunks:
    """One process's handles."""

    def __init__(self, driver: Driver, table: ChunkTable, device: int) -> None:
        self.driver = driver
        self.table = table
        self.device = device
        self.limit = len(table)  # how many there will be; less where the GPU has no more memory
        self._handles: list[MemoryHandle] = []

    def __len__(self) -> int:
        return len(self._handles)

    @property
    def is_complete(self) -> bool:
        """Whether every chunk is here."""
        return len(self._handles) >= self.limit

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks that there will be."""
        whole = self.limit == len(self.table)
        return self.table.capacity_bytes if whole else self.table.offset(self.limit)

    def handle(self, chunk: int) -> MemoryHandle:
        """Return the handle of a chunk that is here."""
        return self._handles[chunk]

    def make(self) -> int:
        """Make the next chunk; return a descriptor of it, the caller's to send and close.

        Raises DriverError.
        """
        assert not self.is_complete
        handle = self.driver.mem_create(self.table.nbytes(len(self._handles)), self.device)
        try:
            fd = self.driver.mem_export(handle)
        except BaseException:
            self.driver.mem_release(handle)
            raise
        self._handles.append(handle)
        return fd

    def take(self, fd: int) -> None:
        """Take over the next chunk; the descriptor is closed, whatever happens.

        Raises DriverError.
        """
        try:
            assert not self.is_complete
            self._handles.append(self.driver.mem_import(fd))
        finally:
            os.close(fd)

    def resize(self, count: int) -> None:
        """There are so many from now on; release the others, which nobody has mapped any more."""
        assert 0 < count <= len(self.table)
        self.limit = count
        while len(self._handles) > self.limit:
            self.driver.mem_release(self._handles.pop())

    def close(self) -> None:
        """Release every handle; what is mapped stays mapped."""
        while self._handles:
            self.driver.mem_release(self._handles.pop())
