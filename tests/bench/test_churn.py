"""What is left of an arena after many loads and evictions; 100,000 of them are the scenario's business."""

from __future__ import annotations

import pytest

from overcommit.bench.churn import POPULATIONS, USABLE_MIN, Population, Watched, live
from overcommit.runtime.config import GIB, MIB, PAGE_BYTES, SMALL_CHUNK_BYTES


@pytest.mark.parametrize("can_split", [True, False], ids=["split", "as-made"])
@pytest.mark.parametrize(
    "loads",
    [2_000, pytest.param(20_000, marks=(pytest.mark.slow, pytest.mark.no_cover))],
    ids=["quick", "long"],
)
def test_models_of_50_kb_to_30_gb_leave_98_percent_usable_and_nothing_moves(
    loads: int, can_split: bool
) -> None:
    life = live(POPULATIONS[0], "cost_aware", loads, 1, can_split=can_split)
    assert life.loads == loads
    assert len(life.arena.usable) > loads // 2, "the arena is full"
    assert min(life.arena.usable) >= USABLE_MIN
    assert life.arena.moved == 0
    assert life.refused == 0


def test_small_models_that_stay_leave_98_percent_usable_for_large_ones() -> None:
    life = live(POPULATIONS[3], "lru", 4_000, 2, can_split=True)
    assert min(life.arena.usable) >= USABLE_MIN


def test_pages_between_the_models_of_slabs_are_lost_for_chunks() -> None:
    arena = Watched(2 * SMALL_CHUNK_BYTES, can_split=True)
    for _ in range(4):
        assert arena.try_allocate(MIB) is not None
    assert arena.try_allocate(MIB) is None
    (first, *_) = arena._given
    arena.free(first)
    assert arena.try_allocate(SMALL_CHUNK_BYTES) is None
    assert arena.usable == [1.0, 0.75]


def test_rounding_up_is_seen() -> None:
    arena = Watched(SMALL_CHUNK_BYTES, can_split=True)
    assert arena.try_allocate(PAGE_BYTES * 255 + 1) is not None
    assert arena.try_allocate(SMALL_CHUNK_BYTES) is None
    assert arena.rounding == [(PAGE_BYTES - 1) / SMALL_CHUNK_BYTES]


def test_a_free_of_what_was_not_given_is_a_move() -> None:
    arena = Watched(4 * SMALL_CHUNK_BYTES, can_split=True)
    given = arena.try_allocate(2 * SMALL_CHUNK_BYTES)
    assert given is not None
    (extent,) = given
    arena.free([(extent.offset, SMALL_CHUNK_BYTES)])
    assert arena.moved == 1


def test_a_life_depends_on_its_seed_alone() -> None:
    population = Population("few", GIB, 0.5, 10**8)
    one, other = (live(population, "lru", 300, 7, can_split=True) for _ in range(2))
    assert one.arena.usable == other.arena.usable
    assert one.evictions == other.evictions
