"""The buddy allocator of payload blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.blocks import BlockArena
from overcommit.runtime.config import BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, KIB, MIB


def free_lists(arena: BlockArena) -> list[set[int]]:
    return [set(offsets) for offsets in arena._free]


@given(
    st.integers(1 * KIB, 3 * MIB),
    st.lists(st.tuples(st.booleans(), st.integers(1, 400 * KIB)), max_size=120),
)
def test_blocks_never_overlap_and_come_back_whole(
    capacity: int, steps: list[tuple[bool, int]]
) -> None:
    arena = BlockArena(capacity)
    fresh = free_lists(arena)
    held: dict[int, int] = {}
    for reserve, number in steps:
        if reserve:
            block = arena.try_reserve(number)
            if block is None:
                continue
            offset, size = block
            assert size >= number
            assert offset % size == 0
            assert offset + size <= arena.capacity_bytes
            assert all(o + s <= offset or offset + size <= o for o, s in held.items())
            held[offset] = size
        elif held:
            offset = sorted(held)[number % len(held)]
            del held[offset]
            arena.release(offset)
        assert arena.used_bytes == sum(held.values())
        assert arena.blocks_used == len(held)
    for offset in held:
        arena.release(offset)
    arena.merge_all()
    assert free_lists(arena) == fresh


def test_small_blocks_that_wait_are_merged_when_memory_is_short() -> None:
    arena = BlockArena(64 * KIB)
    small = [arena.try_reserve(BLOCK_BYTES_MIN) for _ in range(64)]
    assert arena.try_reserve(1) is None
    for block in small:
        assert block is not None
        arena.release(block[0])
    assert arena.try_reserve(64 * KIB) == (0, 64 * KIB)


def test_what_cannot_be_had_is_none_and_what_was_not_reserved_cannot_come_back() -> None:
    arena = BlockArena(2 * BLOCK_BYTES_MAX)
    assert arena.try_reserve(BLOCK_BYTES_MAX + 1) is None
    with pytest.raises(KeyError):
        arena.release(0)
