"""DEVICE as one cudaMalloc allocation that processes share by CUDA IPC: where VMM cannot be had.

The mover allocates it and exports a handle; each worker opens it once.  Nothing is mapped for a version:
its image lies in one piece (`run_allocator`), and its address is where that is now.  So
a version that comes back elsewhere gets another mapping, and is bound anew; one that was not moved since
keeps its address.  Workers could write there: this has no PROT_READ.

Invariants
 1. An allocation lives as long as the mover that made it: when that dies, its workers have to end.
 2. A mapping has one place for good; what does not lie there needs another mapping.

Called by workers, and by the mover before it is ready.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from overcommit.runtime.device_bytes import DeviceBytes
from overcommit.runtime.driver import Driver
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.messages import Chunks, ChunksTaken


class IpcRanges:
    """A worker's view of the allocation; opens mappings over it."""

    can_map_ahead: bool = False

    def __init__(self, driver: Driver, device: int, handle: bytes, nbytes: int) -> None:
        """Open the allocation.  Raises DriverError."""
        self.driver = driver
        self.device = device
        self.nbytes = nbytes
        self.address = driver.ipc_open(handle)

    def change(self, message: Chunks, fds: dict[str, int]) -> ChunksTaken:
        """Raise ProtocolError: it has no chunks of its own."""
        raise ProtocolError("DEVICE is one allocation here")

    def open(self, nbytes: int) -> IpcMapping:
        """Make a mapping for a version's image; it has no place yet."""
        return IpcMapping(self, nbytes)

    def close(self) -> None:
        """Let go of the allocation; no work on it may be left."""
        self.driver.ipc_close(self.address)


class IpcMapping:
    """Where a version's image lies, `nbytes` long."""

    def __init__(self, ranges: IpcRanges, nbytes: int) -> None:
        self.nbytes = nbytes
        self.generation: int | None = None
        self._ranges = ranges
        self._offset: int | None = None

    @property
    def address(self) -> int:
        """Where the image begins; known once it is placed."""
        assert self._offset is not None, "placed first"
        return self._ranges.address + self._offset

    def can_hold(self, extents: Sequence[tuple[int, int]]) -> bool:
        """Whether these are where this mapping is."""
        return self._offset is None or extents[0][0] == self._offset

    def is_at(
        self, extents: Sequence[tuple[int, int]], generation: int, shared: Collection[int]
    ) -> bool:
        """Not known: mapping costs nothing."""
        return False

    def map(
        self,
        extents: Sequence[tuple[int, int]],
        generation: int,
        populate: bool = True,
        shared: Collection[int] = (),
    ) -> None:
        """Take these extents.  Raises ValueError when they are not one piece that holds the image."""
        self.generation = None
        start = end = extents[0][0]
        for offset, length in extents:
            if offset != end:
                raise ValueError(f"an image in pieces: {end} is followed by {offset}")
            end += length
        if start < 0 or end > self._ranges.nbytes:
            raise ValueError(f"extents from {start} to {end} are not inside the arena")
        if end - start < self.nbytes:
            raise ValueError(f"extents hold {end - start} bytes, the image has {self.nbytes}")
        if self._offset not in (None, start):
            raise ValueError("the image lies elsewhere: another mapping is needed")
        self._offset = start
        self.generation = generation

    def unmap(self) -> None:
        """The bytes are another version's from now on."""
        self.generation = None

    def view(self) -> DeviceBytes:
        """Return the image's bytes, to read only while mapped."""
        place = self._ranges.driver.torch_device(self._ranges.device)
        return DeviceBytes(self.address, self.nbytes, place, self._ranges)

    def close(self) -> None:
        """Unmap for good."""
        self.unmap()
