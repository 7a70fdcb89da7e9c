"""Placing weight images in one piece each: where nothing can be mapped, addresses are offsets.

The books are `ChunkAllocator`'s; only which chunks are taken differs.

Invariants
 1. Every allocation is one extent, of chunks the first run that is long enough.
 2. What is free between others may be too short, and nothing is compacted: whoever wants room evicts
    until a run is long enough.  In the worst case that is everybody.

Called by residency; pure.
"""

from __future__ import annotations

from overcommit.runtime.allocator import SMALL_PER_LARGE, ChunkAllocator, Extent
from overcommit.runtime.config import LARGE_CHUNK_BYTES, SMALL_CHUNK_BYTES

_TAKEN, _FREE = b"0", b"1"


class RunAllocator(ChunkAllocator):
    """See the module."""

    is_contiguous = True

    def _take_chunks(self, smalls: int, exact: bool) -> tuple[Extent, ...] | None:
        """First fit, over a map of the free chunks: `_FREE` where one is."""
        chunks = bytearray(_TAKEN * (self._whole + 1) * SMALL_PER_LARGE)
        for parent in self._large:
            first = parent * SMALL_PER_LARGE
            chunks[first : first + SMALL_PER_LARGE] = _FREE * SMALL_PER_LARGE
        for free in self._small.values():
            for chunk in free:
                chunks[chunk : chunk + 1] = _FREE
        first = chunks.find(_FREE * smalls)
        if first < 0:
            return None
        at, end = first, first + smalls
        while at < end:
            parent = at // SMALL_PER_LARGE
            stop = min(end, (parent + 1) * SMALL_PER_LARGE)
            if parent in self._large:
                self._large.discard(parent)
                if stop - at < SMALL_PER_LARGE:
                    self._split(parent, SMALL_PER_LARGE)
            if parent in self._small:
                self._small[parent].difference_update(range(at, stop))
                self._small_free -= stop - at
                self._parents.set(parent, len(self._small[parent]))
            at = stop
        return (Extent(first * SMALL_CHUNK_BYTES, smalls * SMALL_CHUNK_BYTES),)

    def _free_chunks(self, offset: int, length: int) -> None:
        # Parts of a version are given back one by one, and may end inside what was taken whole.
        for parent in range(
            offset // LARGE_CHUNK_BYTES, -(-(offset + length) // LARGE_CHUNK_BYTES)
        ):
            assert parent not in self._large, "freed twice"
            if parent not in self._small:
                self._small[parent] = set()
                self._parents.set(parent, 0)
        super()._free_chunks(offset, length)
