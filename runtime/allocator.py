"""Placing weight images in an arena made of chunks.

Owns the free lists of one arena; touches no memory.  The arena is `capacity_bytes` long, cut into
64 MiB chunks; a 64 MiB chunk is whole, or split into 2 MiB chunks, and some of these are slabs that
small models share at 4 KiB granularity.

Invariants
 1. Every 4 KiB page is free or belongs to exactly one allocation.
 2. An allocation of at most SLAB_MODEL_BYTES_MAX is one contiguous run inside one slab; any other is
    a list of whole chunks in any order, so no allocation over that size can fail while enough 2 MiB
    chunks are free: there is no external fragmentation and nothing to compact.
 3. With `can_split` (memfd) a 64 MiB chunk splits on demand and merges when all 32 parts are free.
    Without (CUDA, whose chunks are made once) a share is split at construction, for ever.

Called by residency; pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from overcommit.runtime.config import (
    LARGE_CHUNK_BYTES,
    PAGE_BYTES,
    SLAB_MODEL_BYTES_MAX,
    SMALL_CHUNK_BYTES,
)

SMALL_PER_LARGE: Final = LARGE_CHUNK_BYTES // SMALL_CHUNK_BYTES
PAGES_PER_SLAB: Final = SMALL_CHUNK_BYTES // PAGE_BYTES


class Extent(NamedTuple):
    """A piece of an arena: bytes `[offset, offset + length)`."""

    offset: int
    length: int


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES)


def _merge(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    merged: list[Extent] = []
    for extent in extents:
        if merged and merged[-1].offset + merged[-1].length == extent.offset:
            merged[-1] = Extent(merged[-1].offset, merged[-1].length + extent.length)
        else:
            merged.append(extent)
    return tuple(merged)


class ChunkAllocator:
    """Free space of one arena.  `capacity_bytes` is rounded down to whole 2 MiB chunks."""

    def __init__(
        self, capacity_bytes: int, *, can_split: bool = True, small_share: float = 0.25
    ) -> None:
        smalls = capacity_bytes // SMALL_CHUNK_BYTES
        self.capacity_bytes = smalls * SMALL_CHUNK_BYTES
        self.can_split = can_split
        whole, rest = divmod(smalls, SMALL_PER_LARGE)
        split = 0 if can_split else min(whole, round(whole * small_share + 0.499))
        self._large: set[int] = set(range(split, whole))
        # Free 2 MiB chunks by their 64 MiB parent; a parent that is here is split.
        self._small: dict[int, set[int]] = {
            parent: set(range(parent * SMALL_PER_LARGE, (parent + 1) * SMALL_PER_LARGE))
            for parent in range(split)
        }
        if rest:  # the last, partial 64 MiB can only ever be small chunks
            self._small[whole] = set(range(whole * SMALL_PER_LARGE, smalls))
        self._whole = whole
        self._slabs: dict[int, bytearray] = {}  # small chunk -> one byte a page, 1 = taken
        self._slab_free: dict[int, int] = {}
        self._used = 0

    def __repr__(self) -> str:
        return (
            f"<ChunkAllocator {self.used_bytes} of {self.capacity_bytes} bytes used, "
            f"{len(self._large)} large and {self._free_smalls()} small chunks free, "
            f"{len(self._slabs)} slabs>"
        )

    @property
    def used_bytes(self) -> int:
        """Bytes that allocations hold (pages of slabs, chunks otherwise)."""
        return self._used

    @property
    def free_bytes(self) -> int:
        """Bytes that no allocation holds, the free pages of slabs included."""
        return self.capacity_bytes - self._used

    def footprint(self, nbytes: int) -> int:
        """Bytes that an allocation of `nbytes` really takes."""
        if nbytes <= SLAB_MODEL_BYTES_MAX:
            return max(1, _pages(nbytes)) * PAGE_BYTES
        return -(-nbytes // SMALL_CHUNK_BYTES) * SMALL_CHUNK_BYTES

    # --- allocating -----------------------------------------------------------------------------
    def try_allocate(self, nbytes: int) -> tuple[Extent, ...] | None:
        """Place `nbytes`; None when it does not fit now.

        Extent i holds the bytes that follow those of extent i - 1; neighbours are merged.  The
        extents together are `footprint(nbytes)` long.
        """
        assert nbytes >= 0
        if nbytes <= SLAB_MODEL_BYTES_MAX:
            run = self._take_run(max(1, _pages(nbytes)))
            extents: tuple[Extent, ...] | None = None if run is None else (run,)
        else:
            extents = self._take_chunks(-(-nbytes // SMALL_CHUNK_BYTES))
        if extents is not None:
            self._used += sum(extent.length for extent in extents)
        return extents

    def _take_chunks(self, smalls: int) -> tuple[Extent, ...] | None:
        free_smalls = self._free_smalls()
        larges = min(smalls // SMALL_PER_LARGE, len(self._large))
        rest = smalls - larges * SMALL_PER_LARGE
        spare_larges = len(self._large) - larges
        if rest > free_smalls + (spare_larges * SMALL_PER_LARGE if self.can_split else 0):
            return None
        extents = []
        for _ in range(larges):
            parent = min(self._large)
            self._large.discard(parent)
            extents.append(Extent(parent * LARGE_CHUNK_BYTES, LARGE_CHUNK_BYTES))
        chunks = sorted(self._take_small() for _ in range(rest))
        extents += [Extent(chunk * SMALL_CHUNK_BYTES, SMALL_CHUNK_BYTES) for chunk in chunks]
        return _merge(extents)

    def _free_smalls(self) -> int:
        return sum(len(chunks) for chunks in self._small.values())

    def _take_small(self) -> int:
        # The fullest parent first, so that others empty and can merge.
        parents = [parent for parent, chunks in self._small.items() if chunks]
        if not parents:
            parent = max(self._large)
            self._large.discard(parent)
            first = parent * SMALL_PER_LARGE
            self._small[parent] = set(range(first, first + SMALL_PER_LARGE))
        else:
            parent = min(parents, key=lambda p: (len(self._small[p]), p))
        chunk = min(self._small[parent])
        self._small[parent].discard(chunk)
        return chunk

    def _take_run(self, pages: int) -> Extent | None:
        """First fit of a run of pages, in the fullest slab that has it."""
        for slab in sorted(self._slab_free, key=lambda s: (self._slab_free[s], s)):
            if self._slab_free[slab] >= pages:
                at = self._slabs[slab].find(bytes(pages))
                if at >= 0:
                    return self._mark_run(slab, at, pages)
        if not self._free_smalls() and not (self.can_split and self._large):
            return None
        slab = self._take_small()
        self._slabs[slab] = bytearray(PAGES_PER_SLAB)
        self._slab_free[slab] = PAGES_PER_SLAB
        return self._mark_run(slab, 0, pages)

    def _mark_run(self, slab: int, at: int, pages: int) -> Extent:
        self._slabs[slab][at : at + pages] = b"\1" * pages
        self._slab_free[slab] -= pages
        return Extent(slab * SMALL_CHUNK_BYTES + at * PAGE_BYTES, pages * PAGE_BYTES)

    # --- freeing --------------------------------------------------------------------------------
    def free(self, extents: Iterable[Extent | tuple[int, int]]) -> None:
        """Give back what one `try_allocate` returned."""
        for offset, length in extents:
            self._used -= length
            slab = offset // SMALL_CHUNK_BYTES
            if slab in self._slabs:
                self._free_run(slab, offset, length)
            else:
                self._free_chunks(offset, length)

    def _free_run(self, slab: int, offset: int, length: int) -> None:
        at = (offset - slab * SMALL_CHUNK_BYTES) // PAGE_BYTES
        pages = length // PAGE_BYTES
        taken = self._slabs[slab]
        assert taken[at : at + pages] == b"\1" * pages, "freed twice"
        taken[at : at + pages] = bytes(pages)
        self._slab_free[slab] += pages
        if self._slab_free[slab] == PAGES_PER_SLAB:
            del self._slabs[slab], self._slab_free[slab]
            self._give_small(slab)

    def _free_chunks(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            parent, inside = divmod(offset, LARGE_CHUNK_BYTES)
            if inside == 0 and end - offset >= LARGE_CHUNK_BYTES and parent not in self._small:
                assert parent not in self._large, "freed twice"
                self._large.add(parent)
                offset += LARGE_CHUNK_BYTES
            else:
                self._give_small(offset // SMALL_CHUNK_BYTES)
                offset += SMALL_CHUNK_BYTES

    def _give_small(self, chunk: int) -> None:
        parent = chunk // SMALL_PER_LARGE
        chunks = self._small[parent]
        assert chunk not in chunks, "freed twice"
        chunks.add(chunk)
        if self.can_split and parent < self._whole and len(chunks) == SMALL_PER_LARGE:
            del self._small[parent]
            self._large.add(parent)

    def check(self) -> None:
        """Assert that the books balance."""
        free = len(self._large) * LARGE_CHUNK_BYTES + self._free_smalls() * SMALL_CHUNK_BYTES
        free += sum(self._slab_free.values()) * PAGE_BYTES
        assert free == self.free_bytes, (free, self.free_bytes)
        for slab, taken in self._slabs.items():
            assert taken.count(0) == self._slab_free[slab]
            assert slab not in self._small.get(slab // SMALL_PER_LARGE, ())
        assert not self._large & set(self._small)
