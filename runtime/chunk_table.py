"""The chunks of a CUDA arena: how long each is, and which one holds a byte.

An arena is one range of offsets, as on the CPU, but made of chunks that exist on their own: first
those of 2 MiB, a share of the arena, then those of 64 MiB, then a rest of 2 MiB ones.  The layout is
that of `ChunkAllocator(capacity_bytes, can_split=False, small_share=...)`, which places by offsets
and need not know of chunks.

Invariants
 1. Chunks lie one behind the other, without gaps, in the order of their numbers.
 2. The layout follows from capacity and share alone: every process works it out for itself.

Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from overcommit.runtime.config import LARGE_CHUNK_BYTES, SMALL_CHUNK_BYTES
from overcommit.runtime.device_limits import CUDA_CHUNKS_MAX

_PER_LARGE: Final = LARGE_CHUNK_BYTES // SMALL_CHUNK_BYTES


class Piece(NamedTuple):
    """Bytes `[start, start + nbytes)` of a chunk."""

    chunk: int
    start: int
    nbytes: int


def small_share_of(capacity_bytes: int) -> float:
    """Return the largest share in 2 MiB chunks with which there are CUDA_CHUNKS_MAX chunks at most.

    A part that lies before another takes chunks of exactly its length, and most parts are shorter than
    64 MiB: with a share of 0.125, an eighth of DEVICE was all that a fleet of BERTs could use.
    """
    whole, rest = divmod(capacity_bytes // SMALL_CHUNK_BYTES, _PER_LARGE)
    if not whole:
        return 1.0
    split = (CUDA_CHUNKS_MAX - rest - whole) // (_PER_LARGE - 1)
    return min(1.0, max(1, split) / whole)


class ChunkTable:
    """The layout of an arena of `capacity_bytes`, rounded down to whole 2 MiB chunks."""

    def __init__(self, capacity_bytes: int, small_share: float | None = None) -> None:
        """`small_share` of it is made of small chunks, by default `small_share_of` it."""
        if small_share is None:
            small_share = small_share_of(capacity_bytes)
        self.capacity_bytes = capacity_bytes // SMALL_CHUNK_BYTES * SMALL_CHUNK_BYTES
        whole, rest = divmod(self.capacity_bytes // SMALL_CHUNK_BYTES, _PER_LARGE)
        split = math.ceil(whole * small_share)
        self._first = split * _PER_LARGE  # the number of the first large chunk ...
        self._larges = whole - split
        self._larges_at = split * LARGE_CHUNK_BYTES  # ... and its offset
        self._rest = rest

    def __len__(self) -> int:
        return self._first + self._larges + self._rest

    def nbytes(self, chunk: int) -> int:
        """Return how long a chunk is."""
        is_large = self._first <= chunk < self._first + self._larges
        return LARGE_CHUNK_BYTES if is_large else SMALL_CHUNK_BYTES

    def offset(self, chunk: int) -> int:
        """Return where a chunk begins."""
        larges = min(max(0, chunk - self._first), self._larges)
        return (chunk - larges) * SMALL_CHUNK_BYTES + larges * LARGE_CHUNK_BYTES

    def chunk_at(self, offset: int) -> int:
        """Return the number of the chunk that holds this byte."""
        assert 0 <= offset < self.capacity_bytes
        larges = min(max(0, (offset - self._larges_at) // LARGE_CHUNK_BYTES), self._larges)
        if larges < self._larges and offset >= self._larges_at:
            return self._first + larges
        return (offset - larges * LARGE_CHUNK_BYTES) // SMALL_CHUNK_BYTES + larges

    def pieces(self, extents: Iterable[tuple[int, int]]) -> list[Piece]:
        """Return the pieces of chunks that these extents are, in order.

        Raises ValueError for an extent that is not inside the arena.
        """
        found: list[Piece] = []
        for offset, length in extents:
            if offset < 0 or length <= 0 or offset + length > self.capacity_bytes:
                raise ValueError(
                    f"extent ({offset}, {length}) is not inside an arena of {self.capacity_bytes}"
                )
            end = offset + length
            while offset < end:
                chunk = self.chunk_at(offset)
                start = offset - self.offset(chunk)
                part = min(end - offset, self.nbytes(chunk) - start)
                found.append(Piece(chunk, start, part))
                offset += part
        return found
