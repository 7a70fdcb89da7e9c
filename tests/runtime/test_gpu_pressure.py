"""Chunks that go and come at the end: how many, and what the allocator hands out meanwhile."""

from __future__ import annotations

import random

import pytest

from overcommit.runtime.allocator import Extent
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.config import KIB, LARGE_CHUNK_BYTES, MIB, SMALL_CHUNK_BYTES
from overcommit.runtime.gpu_pressure import shorten
from overcommit.runtime.retiring import RetiringAllocator

CAPACITY = 8 * LARGE_CHUNK_BYTES + 6 * MIB


def allocator() -> RetiringAllocator:
    return RetiringAllocator(CAPACITY, small_share=0.25)


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


def test_what_comes_back_is_handed_out_again_and_nothing_behind_it() -> None:
    arena = allocator()
    table = ChunkTable(CAPACITY, small_share=0.25)
    arena.retire(table.offset(10))
    for count in (11, 40, len(table) - 5, len(table)):
        arena.restore(table.offset(count))
        arena.check()
        assert arena.capacity_bytes == arena.free_bytes == arena.end_bytes == table.offset(count)
    assert arena.try_allocate(CAPACITY) is not None


def test_a_large_chunk_that_was_lent_to_slabs_comes_back_whole() -> None:
    arena = RetiringAllocator(2 * LARGE_CHUNK_BYTES, small_share=0.5)
    smalls = arena.try_allocate(LARGE_CHUNK_BYTES // 2, exact=True)
    assert smalls is not None
    rest = arena.try_allocate(LARGE_CHUNK_BYTES // 2, exact=True)
    slab = arena.try_allocate(8 * KIB)
    assert rest is not None
    assert slab is not None
    assert slab[0].offset >= LARGE_CHUNK_BYTES, "of the large one"
    arena.retire(LARGE_CHUNK_BYTES)
    arena.free(slab)
    assert arena.retiring_bytes == 0
    arena.restore(2 * LARGE_CHUNK_BYTES)
    arena.check()
    assert arena.try_allocate(LARGE_CHUNK_BYTES, exact=True) is not None


@pytest.mark.parametrize("seed", range(20))
def test_the_books_balance_whatever_is_held_while_chunks_go_and_come(seed: int) -> None:
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
            bound = table.offset(choice.randrange(len(table) // 2, len(table) + 1))
            if bound < limit:
                arena.retire(bound)
                limit = bound
            elif not arena.retiring_bytes:
                arena.restore(bound)
                limit = bound
        arena.check()
    for extents in held:
        arena.free(extents)
    arena.check()
    assert (arena.used_bytes, arena.retiring_bytes) == (0, 0)
    assert arena.capacity_bytes == limit
