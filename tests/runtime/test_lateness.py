"""How much longer than foreseen: a share of the ratios that were seen lies below what is said."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.lateness import FACTOR_MAX, QUANTILE, Lateness


def test_of_the_ratios_that_follow_the_said_share_is_below_the_factor() -> None:
    lateness, draw = Lateness(), random.Random(5)
    below = 0
    for number in range(6000):
        ratio = draw.uniform(1.0, 3.0)
        if number >= 1000:
            below += ratio <= lateness.factor
        lateness.note(ratio)
    assert abs(below / 5000 - QUANTILE) < 0.02


def test_what_always_takes_its_least_time_is_said_to() -> None:
    lateness = Lateness()
    for _ in range(50):
        lateness.note(3.0)
    for _ in range(200):
        lateness.note(0.9)
    assert lateness.factor == 1.0


@given(st.lists(st.floats(0.0, 1e6), max_size=200))
def test_the_factor_stays_within_its_bounds(ratios: list[float]) -> None:
    lateness = Lateness()
    for ratio in ratios:
        lateness.note(ratio)
        assert 1.0 <= lateness.factor <= FACTOR_MAX
