"""The layout of a CUDA arena, against the allocator that places in it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.config import KIB, LARGE_CHUNK_BYTES, MIB, SMALL_CHUNK_BYTES

capacities = st.integers(1, 700).map(lambda smalls: smalls * SMALL_CHUNK_BYTES)
shares = st.floats(0.01, 1.0)


@given(capacities, shares)
def test_chunks_lie_one_behind_the_other(capacity: int, share: float) -> None:
    table = ChunkTable(capacity, share)
    at = 0
    for chunk in range(len(table)):
        assert table.offset(chunk) == at
        assert table.nbytes(chunk) in (SMALL_CHUNK_BYTES, LARGE_CHUNK_BYTES)
        assert table.chunk_at(at) == table.chunk_at(at + table.nbytes(chunk) - 1) == chunk
        at += table.nbytes(chunk)
    assert at == table.capacity_bytes == capacity


@settings(max_examples=60, deadline=None)
@given(capacities, shares, st.data())
def test_what_the_allocator_places_are_whole_chunks(
    capacity: int, share: float, data: st.DataObject
) -> None:
    table = ChunkTable(capacity, share)
    allocator = ChunkAllocator(capacity, can_split=False, small_share=share)
    placed: list[tuple[tuple[int, int], ...]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        if placed and data.draw(st.booleans()):
            allocator.free(placed.pop(data.draw(st.integers(0, len(placed) - 1))))
            continue
        nbytes = data.draw(st.sampled_from([8 * KIB, MIB, 3 * MIB, 64 * MIB, 100 * MIB, 200 * MIB]))
        extents = allocator.try_allocate(nbytes)
        if extents is None:
            continue
        placed.append(extents)
        pieces = table.pieces(extents)
        assert sum(piece.nbytes for piece in pieces) == sum(length for _, length in extents)
        if nbytes > MIB:
            assert all(
                piece.start == 0 and piece.nbytes == table.nbytes(piece.chunk) for piece in pieces
            )
        else:
            assert len(pieces) == 1


@pytest.mark.parametrize("extent", [(-1, 10), (0, 0), (126 * MIB, 4 * MIB)])
def test_an_extent_outside_of_the_arena_is_refused(extent: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not inside"):
        ChunkTable(128 * MIB).pieces([extent])
