"""Chunks that go from the end: how many, what the allocator hands out meanwhile, who is told when."""

from __future__ import annotations

import random

import pytest

from overcommit.runtime.allocator import ChunkAllocator, Extent
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.config import KIB, LARGE_CHUNK_BYTES, MIB, SMALL_CHUNK_BYTES
from overcommit.runtime.gpu_pressure import shorten

CAPACITY = 8 * LARGE_CHUNK_BYTES + 6 * MIB


def allocator() -> ChunkAllocator:
    return ChunkAllocator(CAPACITY, can_split=False, small_share=0.25)


def test_chunks_go_from_the_end_until_it_is_enough() -> None:
    table = ChunkTable(CAPACITY, small_share=0.25)
    assert shorten(table, len(table), 5 * MIB) == len(table) - 3
    assert shorten(table, len(table), 7 * MIB) == len(table) - 4, "the first large one too"
    assert shorten(table, len(table), 0) == len(table)


def test_a_share_of_the_arena_stays() -> None:
    table = ChunkTable(CAPACITY, small_share=0.25)
    kept = shorten(table, len(table), 1 << 40)
    assert table.offset(kept) >= CAPACITY * 0.25
    assert shorten(table, kept, 1 << 40) == kept


def test_what_is_free_beyond_the_offset_is_gone_at_once() -> None:
    arena = allocator()
    arena.retire(4 * LARGE_CHUNK_BYTES)
    arena.check()
    assert (arena.capacity_bytes, arena.retiring_bytes) == (4 * LARGE_CHUNK_BYTES, 0)
    assert arena.try_allocate(5 * LARGE_CHUNK_BYTES) is None


def test_what_is_held_there_goes_when_it_is_freed() -> None:
    arena = allocator()
    everything = arena.try_allocate(CAPACITY)
    assert everything is not None
    arena.retire(4 * LARGE_CHUNK_BYTES)
    assert arena.retiring_bytes == CAPACITY - 4 * LARGE_CHUNK_BYTES
    arena.free(everything)
    arena.check()
    assert (arena.capacity_bytes, arena.retiring_bytes) == (4 * LARGE_CHUNK_BYTES, 0)


def test_no_small_model_moves_into_a_slab_that_goes() -> None:
    arena = allocator()
    held = arena.try_allocate(8 * KIB)
    assert held is not None
    arena.retire(held[0].offset // SMALL_CHUNK_BYTES * SMALL_CHUNK_BYTES)
    another = arena.try_allocate(8 * KIB)
    assert another is None or another[0].offset < held[0].offset
    arena.check()
    arena.free(held)
    arena.check()
    assert arena.retiring_bytes == 0


@pytest.mark.parametrize("seed", range(20))
def test_the_books_balance_whatever_is_held_while_chunks_go(seed: int) -> None:
    choice = random.Random(seed)
    arena = allocator()
    table = ChunkTable(CAPACITY, small_share=0.25)
    held: list[tuple[Extent, ...]] = []
    limit = CAPACITY
    for _ in range(300):
        what = choice.random()
        if what < 0.55:
            extents = arena.try_allocate(choice.choice((8 * KIB, 900 * KIB, 3 * MIB, 70 * MIB)))
            if extents is not None:
                assert all(sum(extent) <= limit for extent in extents)
                held.append(extents)
        elif what < 0.98 and held:
            arena.free(held.pop(choice.randrange(len(held))))
        elif what >= 0.98:
            limit = min(limit, table.offset(choice.randrange(len(table) // 2, len(table))))
            arena.retire(limit)
        arena.check()
    for extents in held:
        arena.free(extents)
    arena.check()
    assert (arena.used_bytes, arena.retiring_bytes) == (0, 0)
    assert arena.capacity_bytes == limit
