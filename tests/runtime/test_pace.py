"""A line through what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.pace import Pace

NOTES = st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**10)), min_size=2, max_size=40)


def paced(*notes: tuple[float, float]) -> Pace:
    pace = Pace()
    pace.note(1, 0)  # the first of its kind says nothing
    for size, cost_ns in notes:
        pace.note(size, cost_ns)
    return pace


def test_nothing_is_known_from_the_first_piece() -> None:
    pace = Pace()
    pace.note(1, 1e9)
    assert not pace.is_known
    assert pace.of(10) == 0
    pace.note(1, 5.0)
    assert pace.is_known
    assert pace.of(1) == 5.0


def test_it_finds_the_line() -> None:
    pace = paced(*[(size, 100 + 3 * size) for size in (1, 8, 32, 4, 16)])
    assert pace.of(64) == pytest.approx(100 + 3 * 64)
    assert pace.of(64, pieces=2) == pytest.approx(200 + 3 * 64)


def test_equal_sizes_say_nothing_of_the_slope() -> None:
    pace = paced(*[(8, 100)] * 5)
    assert (pace.of(1), pace.of(64)) == (pytest.approx(100), pytest.approx(100))


def test_a_line_that_would_fall_is_flat_and_one_below_nothing_starts_there() -> None:
    assert paced((1, 300), (2, 200), (3, 100)).slope_ns == 0
    steep = paced((10, 1), (20, 100), (30, 200))
    assert steep.start_ns == 0
    assert steep.slope_ns > 0


def test_one_that_took_long_counts_as_four_times_what_was_expected() -> None:
    pace = paced(*[(1, 100)] * 30)
    pace.note(1, 1e12)
    assert pace.of(1) < 130


def test_it_follows_a_change() -> None:
    pace = paced(*[(1, 100)] * 30)
    for _ in range(100):
        pace.note(1, 300)
    assert pace.of(1) == pytest.approx(300, rel=0.05)


@given(NOTES, st.floats(0, 1e9), st.floats(0, 1e9))
def test_costs_are_never_negative_and_never_fall(
    notes: list[tuple[int, int]], size: float, more: float
) -> None:
    pace = paced(*notes)
    assert 0 <= pace.of(size) <= pace.of(size + more)
