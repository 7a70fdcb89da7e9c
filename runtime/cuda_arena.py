"""Arenas and mappings on a GPU, behind the interface of `arena.py`.

A range of the device's addresses is reserved once per version and process; the chunks that hold the
version now are mapped into it, one `cuMemMap` each and one `cuMemSetAccess` for all.  What is in place
already stays: a reload into the same chunks costs no call.

A model that shares a chunk with others (a slab) has the whole chunk mapped, because CUDA maps nothing
smaller.  Its address is the chunk's plus where it lies inside, so a place that lies elsewhere inside
needs another mapping: `can_hold` says so.

State of a mapping

    EMPTY --[map]--> MAPPED --[map]--> MAPPED, elsewhere
    MAPPED --[unmap | lost a chunk to another version | map failed]--> EMPTY
    EMPTY | MAPPED --[close]--> CLOSED

Invariants
 1. A mapping's address never changes while it is open.
 2. Nothing is unmapped before the work that was noted on it is done (`note_work`).
 3. After `map` for one alone no other range of this process has these chunks: a use of what was
    evicted is a fault, not another version's bytes.
 4. Workers map read-only; only the mover maps an arena writable.
 5. The range is given back when the mapping is closed and the last holder of `keeper` is gone.

Called by workers (CudaMapping, by `CudaRanges.open`) and the mover (CudaArena).
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence

from overcommit.runtime import messages
from overcommit.runtime.chunk_exchange import take_message
from overcommit.runtime.chunk_table import Piece
from overcommit.runtime.chunks import Chunks
from overcommit.runtime.config import (
    LARGE_CHUNK_BYTES,
    SLAB_MODEL_BYTES_MAX,
    SMALL_CHUNK_BYTES,
)
from overcommit.runtime.device_bytes import DeviceBytes
from overcommit.runtime.driver import Driver, Event, Stream


class CudaArena:
    """A whole arena, mapped in this process."""

    def __init__(self, chunks: Chunks) -> None:
        self.chunks = chunks
        self._address: int | None = None
        self._mapped = 0  # chunks
        self._is_writable = False

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks that are mapped; of those that there will be, before that."""
        if self._address is None:
            return self.chunks.nbytes
        return self.chunks.table.offset(self._mapped)

    def map_all(self, writable: bool) -> int:
        """Map every chunk, once, in order; return the address.  Raises DriverError.

        The range has room for all that there may ever be.
        """
        assert self._address is None, "mapped once"
        assert self.chunks.is_complete
        driver, reserved = self.chunks.driver, self.chunks.table.capacity_bytes
        self._address = address = driver.address_reserve(reserved, SMALL_CHUNK_BYTES)
        self._is_writable = writable
        try:
            self.map_more()
        except BaseException:
            self._address = None
            driver.address_free(address, reserved)
            raise
        return address

    def map_more(self) -> None:
        """Map the chunks that came since.  Raises DriverError; then none of them is mapped."""
        assert self._address is not None, "mapped first"
        driver, table = self.chunks.driver, self.chunks.table
        start = at = self._address + table.offset(self._mapped)
        try:
            for chunk in range(self._mapped, len(self.chunks)):
                driver.mem_map(at, table.nbytes(chunk), self.chunks.handle(chunk))
                at += table.nbytes(chunk)
            if at > start:
                driver.mem_set_access(start, at - start, self.chunks.device, self._is_writable)
        except BaseException:
            if at > start:
                driver.mem_unmap(start, at - start)
            raise
        self._mapped = len(self.chunks)

    def shrink(self, count: int) -> None:
        """Give back all chunks from this one on; no work on them may be left."""
        assert self._address is not None, "mapped first"
        end = self.chunks.table.offset(count)
        if count < self._mapped:
            self.chunks.driver.mem_unmap(self._address + end, self.nbytes - end)
            self._mapped = count
        self.chunks.resize(count)

    def close(self) -> None:
        """Unmap and release; no work on it may be left."""
        if self._address is not None:
            driver = self.chunks.driver
            if self._mapped:
                driver.mem_unmap(self._address, self.nbytes)
            driver.address_free(self._address, self.chunks.table.capacity_bytes)
            self._address = None
        self.chunks.close()


class CudaRanges:
    """Which ranges of this process have which chunks; opens mappings over them."""

    # What a map costs there beside a copy was not measured; a chunk may not be here yet.
    can_map_ahead: bool = False

    def __init__(self, chunks: Chunks) -> None:
        self.chunks = chunks
        self._holders: dict[int, set[CudaMapping]] = {}  # by chunk

    def __len__(self) -> int:
        return len(self._holders)

    def open(self, nbytes: int) -> CudaMapping:
        """Reserve a range for a version's image.  Raises DriverError."""
        return CudaMapping(self, nbytes)

    def change(self, message: messages.Chunks, fds: dict[str, int]) -> messages.ChunksTaken:
        """Give back what is over, whoever has it mapped was evicted; take over what came.

        Return the answer.  Raises DriverError.
        """
        if message.count:
            for chunk in [chunk for chunk in self._holders if chunk >= message.count]:
                for mapping in tuple(self._holders.get(chunk, ())):
                    mapping.unmap()
        take_message(self.chunks, message, fds)
        return messages.ChunksTaken(count=len(self.chunks))

    def claim(self, chunk: int, mapping: CudaMapping, shared: bool) -> None:
        """A mapping gets this chunk; alone, unless it is shared."""
        if not shared:
            for other in tuple(self._holders.get(chunk, ())):
                if other is not mapping:
                    other.unmap()
        self._holders.setdefault(chunk, set()).add(mapping)

    def give_up(self, chunk: int, mapping: CudaMapping) -> None:
        """A mapping has this chunk no more."""
        holders = self._holders[chunk]
        holders.discard(mapping)
        if not holders:
            del self._holders[chunk]


class Keeper:
    """Held by everything that uses a range; the range is given back with the last one."""

    __slots__ = ("__weakref__", "address", "nbytes")

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self.address = driver.address_reserve(nbytes, SMALL_CHUNK_BYTES)
        self.nbytes = nbytes
        weakref.finalize(self, driver.address_free, self.address, nbytes).atexit = False


class CudaMapping:
    """A version's address range, read-only, `nbytes` long."""

    def __init__(self, ranges: CudaRanges, nbytes: int) -> None:
        self.nbytes = nbytes
        self.generation: int | None = None
        self.keeper: Keeper | None = None
        self._ranges = ranges
        self._driver = ranges.chunks.driver
        self._is_small = nbytes <= SLAB_MODEL_BYTES_MAX
        # A rest may come in a 64 MiB chunk of its own, wherever the ones before it end.
        wholes = -(-nbytes // LARGE_CHUNK_BYTES)
        self._reserved = LARGE_CHUNK_BYTES * (1 if self._is_small else wholes + 1)
        self.keeper = Keeper(self._driver, self._reserved)
        self._start = self.keeper.address
        self._inside: int | None = None if self._is_small else 0
        self._chunks: list[tuple[int, int]] = []  # (offset in the range, chunk), without gaps
        self._working: dict[Stream, Event] = {}

    @property
    def address(self) -> int:
        """Where the image begins.  Of one that may lie in a slab: known once it is placed."""
        assert self._inside is not None, "placed first"
        return self._start + self._inside

    def is_at(
        self, extents: Sequence[tuple[int, int]], generation: int, shared: Collection[int]
    ) -> bool:
        """Not known: it is mapped anew each time."""
        return False

    def can_hold(self, extents: Sequence[tuple[int, int]]) -> bool:
        """Whether these can be mapped at this address; if not, another mapping is needed."""
        if self._inside is None or not self._is_small:
            return True
        return self._ranges.chunks.table.pieces(extents[:1])[0].start == self._inside

    def map(
        self,
        extents: Sequence[tuple[int, int]],
        generation: int,
        populate: bool = True,
        shared: Collection[int] = (),
    ) -> None:
        """Map these extents in order, instead of whatever was mapped before.

        `shared` are the indices of those that other mappings may have at the same time.  `populate`
        is for memory with page faults.  Raises ValueError when the extents are not whole chunks that
        hold the image, DriverError from the driver; after an error nothing is mapped.
        """
        assert self.keeper is not None, "open"
        self.generation = None
        try:
            wanted = self._wanted(extents, shared)
            self._replace(wanted)
        except BaseException:
            self.unmap()
            raise
        self.generation = generation

    def unmap(self) -> None:
        """Give the chunks back, when the work on them is done; the address range stays."""
        assert self.keeper is not None, "open"
        self.generation = None
        self._drop(0)

    def note_work(self, stream: Stream) -> None:
        """What is on this stream now touches the weights.  Raises DriverError."""
        event = self._working.get(stream)
        if event is None:
            event = self._working[stream] = self._driver.event_create()
        self._driver.event_record(event, stream)

    def view(self) -> DeviceBytes:
        """Return the image's bytes; they may be read only while mapped."""
        assert self.keeper is not None, "open"
        chunks = self._ranges.chunks
        place = chunks.driver.torch_device(chunks.device)
        return DeviceBytes(self.address, self.nbytes, place, self.keeper)

    def close(self) -> None:
        """Unmap for good; the address range goes with the last holder of `keeper`."""
        if self.keeper is None:
            return
        self.unmap()
        for event in self._working.values():
            self._driver.event_destroy(event)
        self._working.clear()
        self.keeper = None

    # --- inside ---------------------------------------------------------------------------------
    def _wanted(
        self, extents: Sequence[tuple[int, int]], shared: Collection[int]
    ) -> list[tuple[int, int, bool]]:
        """Return (offset in the range, chunk, shared) of all that is needed."""
        table = self._ranges.chunks.table
        if self._is_small:
            (piece, *_) = table.pieces(extents[:1])
            if piece.nbytes < self.nbytes:
                raise ValueError(f"extents hold {piece.nbytes} bytes, the image has {self.nbytes}")
            if self._inside not in (None, piece.start):
                raise ValueError("the image lies elsewhere in its chunk: another mapping is needed")
            self._inside = piece.start
            return [(0, piece.chunk, True)]  # a slab is everybody's
        wanted: list[tuple[int, int, bool]] = []
        at = 0
        for index, extent in enumerate(extents):
            for piece in table.pieces((extent,)):
                if at >= self.nbytes:
                    return wanted
                self._check_whole(piece)
                wanted.append((at, piece.chunk, index in shared))
                at += piece.nbytes
        if at < self.nbytes:
            raise ValueError(f"extents hold {at} bytes, the image has {self.nbytes}")
        return wanted

    def _check_whole(self, piece: Piece) -> None:
        if piece.start or piece.nbytes != self._ranges.chunks.table.nbytes(piece.chunk):
            raise ValueError(f"extents name a part of chunk {piece.chunk}, which is mapped whole")

    def _replace(self, wanted: list[tuple[int, int, bool]]) -> None:
        """Keep what is in place from the front on; unmap the rest, map what is new."""
        kept = 0
        for have, (at, chunk, _) in zip(self._chunks, wanted, strict=False):
            if have != (at, chunk):
                break
            kept += 1
        self._drop(kept)
        chunks = self._ranges.chunks
        for index, (at, chunk, is_shared) in enumerate(wanted):
            self._ranges.claim(chunk, self, is_shared)
            if index < kept:
                continue
            try:
                nbytes = chunks.table.nbytes(chunk)
                self._driver.mem_map(self._start + at, nbytes, chunks.handle(chunk))
            except BaseException:
                if all(chunk != mapped for _, mapped in self._chunks):
                    self._ranges.give_up(chunk, self)
                raise
            self._chunks.append((at, chunk))
        if kept < len(wanted):
            first = wanted[kept][0]
            self._driver.mem_set_access(
                self._start + first, self._end - first, chunks.device, False
            )

    @property
    def _end(self) -> int:
        """How far the range is mapped."""
        if not self._chunks:
            return 0
        at, chunk = self._chunks[-1]
        return at + self._ranges.chunks.table.nbytes(chunk)

    def _drop(self, kept: int) -> None:
        """Unmap all but the first so many chunks."""
        if len(self._chunks) <= kept:
            return
        for event in self._working.values():
            self._driver.event_synchronize(event)
        first = self._chunks[kept][0]
        self._driver.mem_unmap(self._start + first, self._end - first)
        dropped = {chunk for _, chunk in self._chunks[kept:]}
        del self._chunks[kept:]
        for chunk in dropped - {chunk for _, chunk in self._chunks}:
            self._ranges.give_up(chunk, self)
