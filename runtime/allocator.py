"""Placing weight images in an arena made of chunks.

Owns the free lists of one arena; touches no memory.  The arena is `capacity_bytes` long, cut into
64 MiB chunks; a 64 MiB chunk is whole, or split into 2 MiB chunks, and some of these are slabs that
small models share at 4 KiB granularity.

With `has_tails` what an allocation has over whole chunks goes into a slab too, however long it is: packed
weights are of any length, and 1 MiB on average of 11 would be lost.

Invariants
 1. Every 4 KiB page is free or belongs to exactly one allocation.
 2. An allocation of at most SLAB_MODEL_BYTES_MAX is one contiguous run inside one slab; any other is
    a list of whole chunks in any order (and a tail in one or two runs), so no allocation over that
    size can fail while enough 2 MiB chunks are free: there is no external fragmentation and nothing
    to compact.
 3. With `can_split` (memfd) a 64 MiB chunk splits on demand and merges when all 32 parts are free.
    Without (CUDA, whose chunks are made once) a share is split at construction, for ever; a rest
    for which the small ones do not suffice takes a 64 MiB chunk whole, unless `exact`; and when
    there is no small one for a slab, a 64 MiB chunk is lent to slabs until they are all empty (who
    lives there maps all of it).

Called by residency; pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from overcommit.runtime.config import (
    LARGE_CHUNK_BYTES,
    PAGE_BYTES,
    SLAB_MODEL_BYTES_MAX,
    SMALL_CHUNK_BYTES,
)
from overcommit.runtime.ranking import Ranking

SMALL_PER_LARGE: Final = LARGE_CHUNK_BYTES // SMALL_CHUNK_BYTES
PAGES_PER_SLAB: Final = SMALL_CHUNK_BYTES // PAGE_BYTES
TAIL_PAGES_MIN: Final = 16  # of the first part of a tail that is in two


class Extent(NamedTuple):
    """A piece of an arena: bytes `[offset, offset + length)`."""

    offset: int
    length: int


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

    is_contiguous = False  # every allocation is one extent

    def __init__(
        self,
        capacity_bytes: int,
        *,
        can_split: bool = True,
        small_share: float = 0.25,
        has_tails: bool = False,
    ) -> None:
        assert can_split or not has_tails
        assert capacity_bytes >= 0
        assert 0 < small_share <= 1
        smalls = capacity_bytes // SMALL_CHUNK_BYTES
        self.capacity_bytes = smalls * SMALL_CHUNK_BYTES
        self.can_split = can_split
        self._has_tails = has_tails
        self._whole, rest = divmod(smalls, SMALL_PER_LARGE)
        split = 0 if can_split else math.ceil(self._whole * small_share)
        self._large: set[int] = set(range(split, self._whole))
        # Free 2 MiB chunks by their 64 MiB parent; a parent that is here is split.
        self._small: dict[int, set[int]] = {}
        self._small_free = 0
        self._parents = Ranking(SMALL_PER_LARGE)  # split parents by their number of free chunks
        # 64 MiB chunks that only slabs may use, and their free parts; never with `can_split`.
        self._lent: dict[int, set[int]] = {}
        self._lent_free = 0
        for parent in range(split):
            self._split(parent, SMALL_PER_LARGE)
        if rest:  # the last, partial 64 MiB can only ever be small chunks
            self._split(self._whole, rest)
        self._slabs: dict[int, bytearray] = {}  # small chunk -> one byte a page, 1 = taken
        self._runs = Ranking(PAGES_PER_SLAB)  # slabs by their longest run of free pages
        self._used = 0

    def __repr__(self) -> str:
        return (
            f"<ChunkAllocator {self.used_bytes} of {self.capacity_bytes} bytes used, "
            f"{len(self._large)} large and {self._small_free} small chunks free, "
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
        """Bytes that an allocation of `nbytes` takes (without `can_split`: at least)."""
        unit = PAGE_BYTES if nbytes <= SLAB_MODEL_BYTES_MAX else SMALL_CHUNK_BYTES
        if self._tail(nbytes):
            unit = PAGE_BYTES
        return max(1, -(-nbytes // unit)) * unit

    def _tail(self, nbytes: int) -> int:
        """Return what of so many bytes lies in a slab, behind whole chunks."""
        if not self._has_tails or nbytes <= SLAB_MODEL_BYTES_MAX:
            return 0
        return nbytes % SMALL_CHUNK_BYTES

    def obtainable_bytes(self, nbytes: int) -> int:
        """Free bytes of which an allocation like this one, in a slab or of chunks, could get a part.

        What is missing to `free_bytes` are runs in slabs that are too short, or that are no chunk.
        """
        chunks = len(self._large) * LARGE_CHUNK_BYTES + self._small_free * SMALL_CHUNK_BYTES
        if nbytes > SLAB_MODEL_BYTES_MAX:
            return chunks
        chunks += self._lent_free * SMALL_CHUNK_BYTES
        return chunks + self._runs.highest() * PAGE_BYTES

    # --- allocating -----------------------------------------------------------------------------
    def try_allocate(self, nbytes: int, *, exact: bool = False) -> tuple[Extent, ...] | None:
        """Place `nbytes`; None when it does not fit now.

        Extent i holds the bytes that follow those of extent i - 1; neighbours are merged.  `exact`:
        other bytes lie before or behind these in one range of addresses; so where chunks are mapped
        whole they must be chunks, slabs not, and none longer than the rest that lies in it.
        """
        assert nbytes >= 0
        footprint = self.footprint(nbytes)
        exact = exact and not self.can_split
        extents: tuple[Extent, ...] | None
        if exact:
            extents = self._take_chunks(max(1, -(-nbytes // SMALL_CHUNK_BYTES)), exact)
        elif nbytes <= SLAB_MODEL_BYTES_MAX:
            run = self._take_run(footprint // PAGE_BYTES)
            extents = None if run is None else (run,)
        elif tail := self._tail(nbytes):
            extents = self._take_with_tail(nbytes // SMALL_CHUNK_BYTES, -(-tail // PAGE_BYTES))
        else:
            extents = self._take_chunks(footprint // SMALL_CHUNK_BYTES, exact)
        if extents is not None:
            self._used += sum(extent.length for extent in extents)
        return extents

    def _take_chunks(self, smalls: int, exact: bool) -> tuple[Extent, ...] | None:
        larges = min(smalls // SMALL_PER_LARGE, len(self._large))
        rest = smalls - larges * SMALL_PER_LARGE
        missing = -(-max(0, rest - self._small_free) // SMALL_PER_LARGE)
        if missing > len(self._large) - larges or (missing and exact):
            return None
        if missing and not self.can_split:
            larges, rest = larges + 1, 0  # cannot be more: otherwise larges would be used up
        # Whole ones from the front, splits from the back: what stays whole stays together.
        chosen = sorted(self._large)[:larges]
        self._large.difference_update(chosen)
        extents = [Extent(parent * LARGE_CHUNK_BYTES, LARGE_CHUNK_BYTES) for parent in chosen]
        chunks = sorted(self._take_smalls(rest))
        extents += [Extent(chunk * SMALL_CHUNK_BYTES, SMALL_CHUNK_BYTES) for chunk in chunks]
        return _merge(extents)

    def _take_with_tail(self, smalls: int, pages: int) -> tuple[Extent, ...] | None:
        """Take chunks and a tail, which may be in two: slabs would be left with gaps of half a chunk."""
        runs: list[Extent] = []
        longest = self._runs.highest()
        if TAIL_PAGES_MIN <= longest < pages and (first := self._take_run(longest)) is not None:
            runs.append(first)
            pages -= longest
        last = self._take_run(pages)
        chunks = None if last is None else self._take_chunks(smalls, exact=False)
        if last is not None:
            runs.append(last)
        if chunks is None:
            for offset, length in runs:
                self._free_run(offset // SMALL_CHUNK_BYTES, offset, length)
            return None
        return (*chunks, *runs)  # not merged: a run and a chunk are freed differently

    def _split(self, parent: int, smalls: int) -> None:
        first = parent * SMALL_PER_LARGE
        self._small[parent] = set(range(first, first + smalls))
        self._parents.set(parent, smalls)
        self._small_free += smalls

    def _take_smalls(self, count: int) -> list[int]:
        """Take so many 2 MiB chunks, which must be there."""
        taken: list[int] = []
        while len(taken) < count:
            # The fullest parent first, so that others empty and can merge.
            parent = self._parents.find(1)
            if parent is None:
                parent = max(self._large)
                self._large.discard(parent)
                self._split(parent, SMALL_PER_LARGE)
            chunks = self._small[parent]
            part = sorted(chunks)[: count - len(taken)]
            chunks.difference_update(part)
            self._small_free -= len(part)
            self._parents.set(parent, len(chunks))
            taken += part
        return taken

    def _take_slab(self) -> int | None:
        """Take a 2 MiB chunk for small models."""
        if self._lent_free:
            parent = next(parent for parent, chunks in self._lent.items() if chunks)
        elif self._small_free or (self.can_split and self._large):
            return self._take_smalls(1)[0]
        elif self._large:
            parent = max(self._large)
            self._large.discard(parent)
            first = parent * SMALL_PER_LARGE
            self._lent[parent] = set(range(first, first + SMALL_PER_LARGE))
            self._lent_free += SMALL_PER_LARGE
        else:
            return None
        chunk = min(self._lent[parent])
        self._lent[parent].discard(chunk)
        self._lent_free -= 1
        return chunk

    def _take_run(self, pages: int) -> Extent | None:
        """Best fit: the slab whose longest free run is the shortest that is long enough."""
        slab = self._runs.find(pages)
        if slab is None:
            slab = self._take_slab()
            if slab is None:
                return None
            self._slabs[slab] = bytearray(PAGES_PER_SLAB)
        taken = self._slabs[slab]
        at = taken.find(bytes(pages))
        taken[at : at + pages] = b"\1" * pages
        self._rank_slab(slab)
        return Extent(slab * SMALL_CHUNK_BYTES + at * PAGE_BYTES, pages * PAGE_BYTES)

    def _rank_slab(self, slab: int) -> None:
        run = 0 if self._is_retired(slab) else max(map(len, self._slabs[slab].split(b"\1")))
        self._runs.set(slab, run)

    def _is_retired(self, chunk: int) -> bool:
        """Whether nothing of this 2 MiB chunk is handed out any more; see `retiring`."""
        return False

    def _drop_retired(self) -> None:
        """Take what is free and is not handed out any more out of the books."""

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
        self._drop_retired()

    def _free_run(self, slab: int, offset: int, length: int) -> None:
        at = (offset - slab * SMALL_CHUNK_BYTES) // PAGE_BYTES
        pages = length // PAGE_BYTES
        taken = self._slabs[slab]
        assert taken[at : at + pages] == b"\1" * pages, "freed twice"
        taken[at : at + pages] = bytes(pages)
        self._rank_slab(slab)
        if not any(taken):
            del self._slabs[slab]
            self._runs.discard(slab)
            self._give_slab(slab)

    def _free_chunks(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            parent = offset // LARGE_CHUNK_BYTES
            if parent in self._small:
                stop = min(end, (parent + 1) * LARGE_CHUNK_BYTES)
                self._give_smalls(
                    parent, range(offset // SMALL_CHUNK_BYTES, stop // SMALL_CHUNK_BYTES)
                )
                offset = stop
            else:
                assert parent not in self._large, "freed twice"
                assert offset % LARGE_CHUNK_BYTES == 0, "a part of a whole chunk"
                self._large.add(parent)
                offset += LARGE_CHUNK_BYTES

    def _give_slab(self, chunk: int) -> None:
        parent = chunk // SMALL_PER_LARGE
        if parent not in self._lent:
            self._give_smalls(parent, range(chunk, chunk + 1))
            return
        self._lent[parent].add(chunk)
        self._lent_free += 1
        if len(self._lent[parent]) == SMALL_PER_LARGE:
            del self._lent[parent]
            self._lent_free -= SMALL_PER_LARGE
            self._large.add(parent)

    def _give_smalls(self, parent: int, given: range) -> None:
        chunks = self._small[parent]
        assert chunks.isdisjoint(given), "freed twice"
        chunks.update(given)
        self._small_free += len(given)
        self._parents.set(parent, len(chunks))
        if self.can_split and parent < self._whole and len(chunks) == SMALL_PER_LARGE:
            del self._small[parent]
            self._parents.discard(parent)
            self._small_free -= SMALL_PER_LARGE
            self._large.add(parent)

    def check(self) -> None:
        """Assert that the books balance."""
        assert self._small_free == sum(map(len, self._small.values()))
        slab_pages = sum(taken.count(0) for taken in self._slabs.values())
        assert self._lent_free == sum(map(len, self._lent.values()))
        assert not self._lent or not self.can_split
        assert self._lent.keys().isdisjoint(self._large | self._small.keys())
        smalls = self._small_free + self._lent_free
        free = len(self._large) * LARGE_CHUNK_BYTES + smalls * SMALL_CHUNK_BYTES
        assert free + slab_pages * PAGE_BYTES == self.free_bytes
        assert not self._large & self._small.keys()
        assert len(self._parents) == len(self._small)
        for parent, chunks in self._small.items():
            assert all(chunk // SMALL_PER_LARGE == parent for chunk in chunks)
            assert self._parents.level(parent) == len(chunks)
        assert len(self._runs) == len(self._slabs)
        for slab, taken in self._slabs.items():
            parent = slab // SMALL_PER_LARGE
            assert slab not in (self._lent[parent] if parent in self._lent else self._small[parent])
            run = self._runs.level(slab)
            if self._is_retired(slab):
                assert not run
                continue
            assert bytes(run) in taken
            assert bytes(run + 1) not in taken
            assert run < PAGES_PER_SLAB, "an empty slab is a chunk"
