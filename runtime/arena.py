"""Arenas (a tier's memory) and mappings (a version's stable addresses in one process).

An arena is one sealed memfd.  A mapping is a range of address space that is reserved once per
version and process; whatever chunks hold the version now are mapped into it, in order.

Invariants
 1. A mapping's address never changes while it is open: tensors that were made over it stay valid
    across eviction and reload into other chunks.
 2. What is not mapped is PROT_NONE, and so is what was moved away: a use of weights whose chunks
    another version has got here is a fault, not that version's bytes.
 3. A mapping is read-only; only the mover maps an arena writable.
 4. The address range is given back when the mapping is closed and the last view of it is gone; in
    between it is PROT_NONE, so that a tensor that was left over cannot read what comes there next.

Called by workers (Mapping) and by the mover (Arena).
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Collection, Sequence
from typing import Protocol

from overcommit.runtime import _shm
from overcommit.runtime.config import PAGE_BYTES, SLAB_MODEL_BYTES_MAX
from overcommit.runtime.device_bytes import Memory
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.memory import create_memfd
from overcommit.runtime.messages import Chunks, ChunksTaken
from overcommit.runtime.page_tables import UNIT, PageTables


class Arena:
    """One tier's memory in this process.  Owns `fd` and its whole mapping, if there is one."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.nbytes = nbytes
        self._address: int | None = None

    @classmethod
    def create(cls, name: str, nbytes: int) -> Arena:
        """Make a fresh arena of this size, a multiple of 4096."""
        assert nbytes % PAGE_BYTES == 0
        return cls(create_memfd(name, nbytes), nbytes)

    @classmethod
    def from_fd(cls, fd: int, nbytes: int) -> Arena:
        """Take over a descriptor that another process made.

        Raises ProtocolError when it is shorter: a touch of the rest would kill this process.
        """
        size = os.fstat(fd).st_size
        if size < nbytes:
            raise ProtocolError(f"an arena of {nbytes} bytes came as a descriptor of {size}")
        return cls(fd, nbytes)

    def map_all(self, writable: bool) -> int:
        """Map the whole arena, once; return its address."""
        assert self._address is None, "mapped once"
        address = _shm.reserve(self.nbytes)
        try:
            _shm.map_fixed(address, self.fd, 0, self.nbytes, writable, False)
        except OSError:
            _shm.release(address, self.nbytes)
            raise
        self._address = address
        return address

    def close(self) -> None:
        """Unmap and close; views of it must be gone."""
        if self._address is not None:
            _shm.release(self._address, self.nbytes)
            self._address = None
        os.close(self.fd)


class WeightsMapping(Protocol):
    """A version's address range in one process, whatever DEVICE is."""

    nbytes: int
    generation: int | None

    @property
    def address(self) -> int:
        """Where the image begins."""
        ...

    def can_hold(self, extents: Sequence[tuple[int, int]]) -> bool:
        """Whether these can be mapped at this address; if not, another mapping is needed."""
        ...

    def map(
        self,
        extents: Sequence[tuple[int, int]],
        generation: int,
        populate: bool = True,
        shared: Collection[int] = (),
    ) -> None:
        """Map these extents in order, over whatever was mapped before."""

    def is_at(
        self, extents: Sequence[tuple[int, int]], generation: int, shared: Collection[int]
    ) -> bool:
        """Whether `map` with these would change nothing; False where that is not known."""
        ...

    def unmap(self) -> None:
        """Give the chunks back; the address range stays."""

    def view(self) -> Memory:
        """Return the image's bytes, to read only while mapped."""
        ...

    def close(self) -> None:
        """Unmap for good; the address range goes with the last view of it."""


class Ranges(Protocol):
    """Opens a process's mappings of one arena."""

    def change(self, message: Chunks, fds: dict[str, int]) -> ChunksTaken:
        """Chunks of a GPU go or come; return the answer."""
        ...

    @property
    def can_map_ahead(self) -> bool:
        """Whether a version may be mapped before its bytes are there, and `is_at` knows of it."""
        ...

    def open(self, nbytes: int) -> WeightsMapping:
        """Reserve a range for a version's image."""
        ...


class MemfdRanges:
    """Mappings of a memfd arena."""

    def change(self, message: Chunks, fds: dict[str, int]) -> ChunksTaken:
        """Raise ProtocolError: it has no chunks of its own."""
        raise ProtocolError("DEVICE is not made of chunks here")

    can_map_ahead: bool = True

    def __init__(self, arena_fd: int) -> None:
        self.tables = PageTables(arena_fd)

    def open(self, nbytes: int) -> Mapping:
        """Reserve a range for a version's image."""
        return Mapping(self.tables, nbytes)


class Mapping:
    """A version's address range, read-only, `nbytes` long (rounded up to a page)."""

    def __init__(self, tables: PageTables, nbytes: int) -> None:
        self.nbytes = nbytes
        self.generation: int | None = None
        # Whole units for what lies in whole chunks: only those can bring their page tables along.
        unit = PAGE_BYTES if nbytes <= SLAB_MODEL_BYTES_MAX else UNIT
        self._reserved = max(unit, -(-nbytes // unit) * unit)
        self._tables = tables
        # What `map` was told last, and how the arena was mapped here then.
        self._mapped: tuple[object, ...] | None = None
        self.address = _shm.reserve(self._reserved)
        # Every view holds this object, so its end is the end of the last use of the range.
        self._range: ctypes.Array[ctypes.c_ubyte] | None = (ctypes.c_ubyte * nbytes).from_address(
            self.address
        )
        give_back = weakref.finalize(self._range, _give_back, tables, self.address, self._reserved)
        give_back.atexit = False

    def can_hold(self, extents: Sequence[tuple[int, int]]) -> bool:
        """Any can: pages are mapped wherever they are wanted."""
        return True

    def map(
        self,
        extents: Sequence[tuple[int, int]],
        generation: int,
        populate: bool = True,
        shared: Collection[int] = (),
    ) -> None:
        """Map these extents in order, over whatever was mapped before.

        `shared` are the indices of those that other mappings may have at the same time.  `populate`
        also faults the pages in, which moves that cost out of the first request.
        Raises ValueError when the extents are shorter than the image, OSError from mmap; after an
        error nothing is mapped.
        """
        assert self._range is not None, "open"
        self.generation = None
        self._mapped = None
        at = 0
        needed = -(-self.nbytes // PAGE_BYTES) * PAGE_BYTES
        try:
            for index, (offset, length) in enumerate(extents):
                length = min(length, self._reserved - at)
                if length <= 0:
                    break
                self._tables.place(self.address + at, offset, length, populate, index in shared)
                at += length
            if at < needed:
                raise ValueError(f"extents hold {at} bytes, the image has {self.nbytes}")
        except BaseException:
            self.unmap()
            raise
        self.generation = generation
        self._mapped = extents, generation, shared, self._tables.changes

    def is_at(
        self, extents: Sequence[tuple[int, int]], generation: int, shared: Collection[int]
    ) -> bool:
        """Whether `map` with these would change nothing.

        False as soon as anything else was mapped or unmapped since: it may have taken chunks along.
        """
        return self._mapped == (extents, generation, shared, self._tables.changes)

    def unmap(self) -> None:
        """Give the chunks back; the address range stays."""
        assert self._range is not None, "open"
        self.generation = None
        self._mapped = None
        self._tables.forget(self.address, self._reserved)
        _shm.unmap_fixed(self.address, self._reserved)

    def view(self) -> memoryview:
        """Return the image's bytes, read-only.  It is valid to read only while mapped."""
        assert self._range is not None, "open"
        return memoryview(self._range).cast("B").toreadonly()

    def close(self) -> None:
        """Unmap for good; the address range goes with the last view of it."""
        if self._range is not None:
            self.unmap()
            self._range = None


def _give_back(tables: PageTables, address: int, nbytes: int) -> None:
    # A mapping that was dropped without `close` must not be where page tables are moved from.
    tables.forget(address, nbytes)
    _shm.release(address, nbytes)
