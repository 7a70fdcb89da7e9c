"""The layout of a CUDA arena, against the allocator that places in it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.chunk_table import ChunkTable, small_share_of
from overcommit.runtime.config import GIB, KIB, LARGE_CHUNK_BYTES, MIB, SMALL_CHUNK_BYTES
from overcommit.runtime.device_limits import CUDA_CHUNKS_MAX

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


@pytest.mark.parametrize("gib", [0, 1, 24, 80, 81, 141, 288])
def test_as_much_as_possible_is_in_small_chunks(gib: int) -> None:
    capacity = gib * GIB + 6 * MIB
    table = ChunkTable(capacity)
    assert len(table) <= CUDA_CHUNKS_MAX
    if gib < 117:
        assert len(table) == capacity // SMALL_CHUNK_BYTES
    else:
        assert len(table) > CUDA_CHUNKS_MAX - 64, "no chunk is given away"


# Up to 117 GiB everything is small chunks; beyond, parts of less than a large chunk have those alone.
@pytest.mark.parametrize(
    ("gib", "smalls", "filled"),
    [
        (80, (8, 32), 0.99),
        (80, (33, 200), 0.99),
        (141, (8, 32), 0.85),
        (141, (33, 200), 0.99),
        (141, (8, 200), 0.99),
    ],
)
def test_parts_of_odd_lengths_fill_device(gib: int, smalls: tuple[int, int], filled: float) -> None:
    capacity = gib * GIB
    allocator = ChunkAllocator(capacity, can_split=False, small_share=small_share_of(capacity))
    choice = random.Random(1)
    while allocator.try_allocate(choice.randint(*smalls) * SMALL_CHUNK_BYTES, exact=True):
        pass
    assert allocator.used_bytes >= filled * capacity


def test_a_fleet_of_models_in_parts_fills_device() -> None:
    """A BERT's parts are 26 to 28 MiB long, and each must be in chunks of exactly its length."""
    capacity = 4 * GIB
    allocator = ChunkAllocator(capacity, can_split=False, small_share=small_share_of(capacity))
    parts = [90 * MIB, *[28 * MIB, 26 * MIB] * 6, 4 * MIB]
    models = 0
    while all(allocator.try_allocate(part, exact=True) for part in parts):
        models += 1
    assert models == capacity // sum(parts)
