"""The allocator against a set of intervals, and what is left usable after a long life."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from overcommit.runtime.allocator import ChunkAllocator, Extent
from overcommit.runtime.config import (
    GIB,
    KIB,
    LARGE_CHUNK_BYTES,
    MIB,
    PAGE_BYTES,
    SLAB_MODEL_BYTES_MAX,
    SMALL_CHUNK_BYTES,
)

sizes = st.one_of(
    st.integers(0, SLAB_MODEL_BYTES_MAX),
    st.integers(SLAB_MODEL_BYTES_MAX + 1, 8 * MIB),
    st.integers(60 * MIB, 200 * MIB),
    st.sampled_from(
        [
            *(0, 1, PAGE_BYTES, SLAB_MODEL_BYTES_MAX, SLAB_MODEL_BYTES_MAX + 1),
            *(SMALL_CHUNK_BYTES, SMALL_CHUNK_BYTES + 1),
            *(LARGE_CHUNK_BYTES - 1, LARGE_CHUNK_BYTES, LARGE_CHUNK_BYTES + 1),
        ]
    ),
)


def total(extents: tuple[Extent, ...]) -> int:
    return sum(extent.length for extent in extents)


class AgainstIntervals(RuleBasedStateMachine):
    """The model: a list of disjoint intervals.  What is in no interval is free."""

    allocations = Bundle("allocations")

    @initialize(
        capacity=st.integers(0, 600 * MIB),
        can_split=st.booleans(),
        share=st.floats(0.05, 1.0),
        has_tails=st.booleans(),
    )
    def make(self, capacity: int, can_split: bool, share: float, has_tails: bool) -> None:
        self.has_tails = can_split and has_tails
        self.capacity = capacity - capacity % SMALL_CHUNK_BYTES
        self.allocator = ChunkAllocator(
            capacity, can_split=can_split, small_share=share, has_tails=self.has_tails
        )
        self.held: list[Extent] = []

    def free_chunks(self) -> int:
        """Whole free 2 MiB chunks by the model."""
        touched: set[int] = set()
        for offset, length in self.held:
            touched.update(
                range(offset // SMALL_CHUNK_BYTES, -(-(offset + length) // SMALL_CHUNK_BYTES))
            )
        return self.capacity // SMALL_CHUNK_BYTES - len(touched)

    @rule(target=allocations, nbytes=sizes)
    def allocate(self, nbytes: int) -> tuple[Extent, ...]:
        free_chunks = self.free_chunks()
        extents = self.allocator.try_allocate(nbytes)
        footprint = self.allocator.footprint(nbytes)
        if extents is None:
            # No external fragmentation: chunks that are free anywhere are enough.
            if self.allocator.can_split or nbytes <= SLAB_MODEL_BYTES_MAX:
                assert free_chunks < -(-footprint // SMALL_CHUNK_BYTES)
            return ()
        if self.allocator.can_split or nbytes <= SLAB_MODEL_BYTES_MAX:
            assert total(extents) == footprint
        else:
            assert footprint <= total(extents) < footprint + LARGE_CHUNK_BYTES
        is_fine = nbytes <= SLAB_MODEL_BYTES_MAX or self.has_tails
        unit = PAGE_BYTES if is_fine else SMALL_CHUNK_BYTES
        assert footprint - nbytes < unit or nbytes == 0
        assert all(offset % unit == 0 and length % unit == 0 for offset, length in extents)
        if nbytes <= SLAB_MODEL_BYTES_MAX:
            assert len(extents) == 1
            (offset, length) = extents[0]
            assert offset // SMALL_CHUNK_BYTES == (offset + length - 1) // SMALL_CHUNK_BYTES
        chunks = [extent for extent in extents if extent.length % SMALL_CHUNK_BYTES == 0]
        assert extents[: len(chunks)] == tuple(chunks), "tails come last"
        assert len(extents) - len(chunks) <= 2
        for left, right in itertools.pairwise(chunks):
            assert left.offset + left.length != right.offset, "neighbours are merged"
        self.held.extend(extents)
        return extents

    @rule(extents=consumes(allocations))
    def free(self, extents: tuple[Extent, ...]) -> None:
        self.allocator.free(extents)
        for extent in extents:
            self.held.remove(extent)

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "allocator"):
            return
        self.allocator.check()
        assert self.allocator.capacity_bytes == self.capacity
        assert self.allocator.used_bytes == sum(length for _, length in self.held)
        assert self.allocator.free_bytes == self.capacity - self.allocator.used_bytes
        end = 0
        for offset, length in sorted(self.held):
            assert offset >= end, "two allocations overlap"
            end = offset + length
        assert end <= self.capacity

    def teardown(self) -> None:
        if hasattr(self, "allocator"):
            self.allocator.free(self.held)
            self.allocator.check()
            if self.capacity:
                assert self.allocator.try_allocate(self.capacity) is not None


TestAgainstIntervals = AgainstIntervals.TestCase
TestAgainstIntervals.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# --- a long life ----------------------------------------------------------------------------------
def log_uniform(low: int, high: int) -> Callable[[random.Random], int]:
    return lambda dice: int(math.exp(dice.uniform(math.log(low), math.log(high))))


def live_long(
    allocator: ChunkAllocator, loads: int, size: Callable[[random.Random], int]
) -> list[int]:
    """Load that many models, evicting at random for room; return how full it was at each eviction.

    Nothing is ever moved: extents are freed exactly as they were given.
    """
    dice = random.Random(7)
    live: list[tuple[Extent, ...]] = []
    free_bytes = []
    for _ in range(loads):
        nbytes = size(dice)
        while (extents := allocator.try_allocate(nbytes)) is None:
            free_bytes.append(allocator.free_bytes - nbytes)
            at = dice.randrange(len(live))
            live[at], live[-1] = live[-1], live[at]
            allocator.free(live.pop())
        live.append(extents)
    allocator.check()
    return free_bytes


def usable_share(allocator: ChunkAllocator) -> float:
    """Fill up with models of one chunk, and say how much is then in use."""
    while allocator.try_allocate(SMALL_CHUNK_BYTES) is not None:
        pass
    return allocator.used_bytes / allocator.capacity_bytes


@pytest.mark.parametrize(
    "loads",
    [10_000, pytest.param(100_000, marks=(pytest.mark.slow, pytest.mark.no_cover))],
    ids=["quick", "long"],
)
@pytest.mark.parametrize(
    "size",
    [log_uniform(64 * KIB, 512 * MIB), log_uniform(1 * MIB + 1, 300 * MIB)],
    ids=["mixed", "chunks"],
)
def test_all_but_a_fiftieth_stays_usable_without_compaction(
    loads: int, size: Callable[[random.Random], int]
) -> None:
    allocator = ChunkAllocator(4 * GIB)
    live_long(allocator, loads, size)
    assert usable_share(allocator) >= 0.98


def test_a_load_fails_only_for_want_of_bytes() -> None:
    allocator = ChunkAllocator(4 * GIB)
    spare = live_long(allocator, 3000, log_uniform(SLAB_MODEL_BYTES_MAX + 1, 512 * MIB))
    # Free bytes less the size, when an allocation failed: the tail of a chunk is all that is lost.
    assert max(spare) < SMALL_CHUNK_BYTES


def test_twenty_thousand_small_models_cost_about_what_they_weigh() -> None:
    allocator = ChunkAllocator(8 * GIB)
    size = log_uniform(16 * KIB, 512 * KIB)
    dice = random.Random(3)
    weights = [size(dice) for _ in range(20_000)]
    placed = [allocator.try_allocate(nbytes) for nbytes in weights]
    assert all(extents is not None for extents in placed)
    assert allocator.used_bytes <= sum(weights) + 20_000 * PAGE_BYTES
    chunks = {e.offset // SMALL_CHUNK_BYTES for extents in placed if extents for e in extents}
    assert len(chunks) * SMALL_CHUNK_BYTES <= 1.05 * allocator.used_bytes
    allocator.check()


# --- single rules -------------------------------------------------------------------------------
def test_capacity_is_rounded_down_to_small_chunks() -> None:
    assert ChunkAllocator(5 * MIB).capacity_bytes == 4 * MIB
    assert ChunkAllocator(0).try_allocate(1) is None


def test_whole_multiples_take_large_chunks_and_the_tail_small_ones() -> None:
    extents = ChunkAllocator(256 * MIB).try_allocate(64 * MIB + 1)
    assert extents == (Extent(0, LARGE_CHUNK_BYTES), Extent(192 * MIB, SMALL_CHUNK_BYTES))


def test_a_large_model_takes_small_chunks_when_no_large_one_is_whole() -> None:
    allocator = ChunkAllocator(128 * MIB)
    pieces = [allocator.try_allocate(SMALL_CHUNK_BYTES) for _ in range(64)]
    for piece in pieces[::2]:
        assert piece is not None
        allocator.free(piece)
    extents = allocator.try_allocate(64 * MIB)
    assert extents is not None
    assert len(extents) == 32
    assert allocator.free_bytes == 0


def test_parts_merge_to_a_large_chunk_when_all_are_free() -> None:
    allocator = ChunkAllocator(64 * MIB)
    pieces = [allocator.try_allocate(SMALL_CHUNK_BYTES) for _ in range(32)]
    for piece in pieces:
        assert piece is not None
        allocator.free(piece)
    assert allocator.try_allocate(64 * MIB) == (Extent(0, 64 * MIB),)


def test_an_empty_slab_becomes_a_chunk_again() -> None:
    allocator = ChunkAllocator(SMALL_CHUNK_BYTES)
    first, second = allocator.try_allocate(1), allocator.try_allocate(SLAB_MODEL_BYTES_MAX)
    assert allocator.try_allocate(SMALL_CHUNK_BYTES) is None
    assert first is not None
    assert second is not None
    allocator.free(first)
    allocator.free(second)
    assert allocator.try_allocate(SMALL_CHUNK_BYTES) == (Extent(0, SMALL_CHUNK_BYTES),)


def test_small_models_share_the_slab_that_fits_them_best() -> None:
    allocator = ChunkAllocator(64 * MIB)
    runs = [allocator.try_allocate(600 * KIB) for _ in range(4)]  # three to a slab
    slabs = [run[0].offset // SMALL_CHUNK_BYTES for run in runs if run]
    small = allocator.try_allocate(100 * KIB)
    assert len(set(slabs)) == 2
    assert small is not None
    assert small[0].offset // SMALL_CHUNK_BYTES == slabs[0]


def test_without_splitting_a_share_is_small_for_ever() -> None:
    allocator = ChunkAllocator(256 * MIB, can_split=False, small_share=0.25)
    smalls = [allocator.try_allocate(SMALL_CHUNK_BYTES) for _ in range(32)]
    assert all(piece is not None and piece[0].offset < 64 * MIB for piece in smalls)
    for piece in smalls:
        assert piece is not None
        allocator.free(piece)
    larges = allocator.try_allocate(192 * MIB)
    assert larges == (Extent(64 * MIB, 192 * MIB),)


def test_without_splitting_a_rest_takes_a_whole_large_chunk_when_small_ones_are_short() -> None:
    allocator = ChunkAllocator(256 * MIB, can_split=False)
    assert allocator.try_allocate(60 * MIB) is not None
    extents = allocator.try_allocate(70 * MIB)  # 4 MiB are left of the small ones
    assert extents == (Extent(64 * MIB, 128 * MIB),)
    assert allocator.used_bytes == 188 * MIB
    allocator.free(extents)
    allocator.check()
    assert allocator.used_bytes == 60 * MIB


def test_without_splitting_a_chunk_is_lent_to_slabs_when_no_small_one_is_free() -> None:
    allocator = ChunkAllocator(128 * MIB, can_split=False, small_share=0.5)
    whole = allocator.try_allocate(64 * MIB)  # the one that was not split
    smalls = [allocator.try_allocate(SMALL_CHUNK_BYTES) for _ in range(32)]
    assert allocator.try_allocate(1) is None
    assert whole is not None
    allocator.free(whole)
    lodger = allocator.try_allocate(1)
    assert lodger is not None
    assert allocator.try_allocate(SMALL_CHUNK_BYTES) is None, "a part of it is no chunk"
    assert allocator.obtainable_bytes(2 * MIB) == 0
    assert allocator.obtainable_bytes(1) == 64 * MIB - PAGE_BYTES
    allocator.check()
    allocator.free(lodger)
    allocator.check()
    assert allocator.try_allocate(64 * MIB) is not None
    assert None not in smalls


@pytest.mark.parametrize("nbytes", [100, MIB, 3 * MIB, 64 * MIB, 100 * MIB])
def test_an_exact_allocation_is_of_whole_chunks_and_as_long_as_its_bytes(nbytes: int) -> None:
    allocator = ChunkAllocator(256 * MIB, can_split=False, small_share=0.25)
    allocator.try_allocate(100)  # a slab is there
    extents = allocator.try_allocate(nbytes, exact=True)
    assert extents is not None
    chunks = -(-nbytes // SMALL_CHUNK_BYTES)
    assert sum(length for _, length in extents) == chunks * SMALL_CHUNK_BYTES
    assert all(offset % SMALL_CHUNK_BYTES == 0 for offset, _ in extents)
    allocator.check()
    allocator.free(extents)
    allocator.check()


def test_an_exact_allocation_does_not_take_a_large_chunk_for_a_rest() -> None:
    allocator = ChunkAllocator(256 * MIB, can_split=False, small_share=0.25)
    assert allocator.try_allocate(62 * MIB) is not None
    assert allocator.try_allocate(66 * MIB, exact=True) is not None
    free = allocator.free_bytes
    assert allocator.try_allocate(66 * MIB, exact=True) is None, "but two whole chunks are free"
    assert allocator.free_bytes == free
    assert allocator.try_allocate(66 * MIB) is not None
    allocator.check()


def test_where_chunks_split_exact_changes_nothing() -> None:
    allocator = ChunkAllocator(256 * MIB)
    assert allocator.try_allocate(100, exact=True) == (Extent(192 * MIB, PAGE_BYTES),)


@pytest.mark.parametrize("can_split", [True, False])
def test_what_is_obtainable_is_what_the_largest_allocation_of_a_kind_gets(can_split: bool) -> None:
    dice = random.Random(5)
    allocator = ChunkAllocator(GIB, can_split=can_split)
    live: list[tuple[Extent, ...]] = []
    for _ in range(3000):
        extents = allocator.try_allocate(log_uniform(4 * KIB, 100 * MIB)(dice))
        if extents is not None:
            live.append(extents)
        while live and (extents is None or dice.random() < 0.1):
            extents = live.pop(dice.randrange(len(live)))
            allocator.free(extents)
    chunks = allocator.obtainable_bytes(SMALL_CHUNK_BYTES)
    probe = allocator.try_allocate(chunks) if chunks else ()
    assert probe is not None
    assert allocator.obtainable_bytes(SMALL_CHUNK_BYTES) == 0
    allocator.free(probe)
    run = allocator.obtainable_bytes(1)
    assert allocator.free_bytes >= run >= (chunks if can_split else 0)


def test_a_tail_lies_in_a_slab_with_others() -> None:
    allocator = ChunkAllocator(256 * MIB, has_tails=True)
    first, second = (allocator.try_allocate(SMALL_CHUNK_BYTES + 700 * KIB) for _ in range(2))
    assert first is not None
    assert second is not None
    assert allocator.used_bytes == 2 * (SMALL_CHUNK_BYTES + 700 * KIB)
    slabs = {extents[-1].offset // SMALL_CHUNK_BYTES for extents in (first, second)}
    assert len(slabs) == 1
    allocator.free(first)
    allocator.free(second)
    allocator.check()
    assert allocator.try_allocate(256 * MIB) is not None


def test_a_tail_fills_the_gap_of_a_slab_before_it_takes_another() -> None:
    allocator = ChunkAllocator(4 * MIB, has_tails=True)
    first, second = (allocator.try_allocate(1400 * KIB) for _ in range(2))
    assert first is not None
    assert second is not None
    assert len(second) == 2
    allocator.free(first)
    allocator.free(second)
    allocator.check()
    assert allocator.try_allocate(4 * MIB) is not None


def test_freeing_twice_is_found() -> None:
    allocator = ChunkAllocator(128 * MIB)
    for nbytes in (1, SMALL_CHUNK_BYTES, LARGE_CHUNK_BYTES):
        extents = allocator.try_allocate(nbytes)
        keeper = allocator.try_allocate(nbytes)  # the slab and the split stay
        assert extents is not None
        allocator.free(extents)
        with pytest.raises(AssertionError):
            allocator.free(extents)
        allocator = ChunkAllocator(128 * MIB)
        assert keeper is not None
