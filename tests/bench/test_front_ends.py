"""The formula of `front_ends`, by itself."""

from __future__ import annotations

import pytest

from overcommit.bench.front_ends import best, bound


def test_the_busiest_kind_of_process_or_the_cores_are_the_bound() -> None:
    assert bound(20, 5, 1, 1, 16) == pytest.approx(50_000), "the front end"
    assert bound(5, 20, 4, 1, 16) == pytest.approx(50_000), "the worker"
    assert bound(10, 10, 8, 8, 2) == pytest.approx(100_000), "the cores"


def test_the_best_split_gives_each_kind_its_share() -> None:
    count, rate = best(12, 4, 16)
    assert count == 12
    assert rate == pytest.approx(1_000_000)
    assert best(1, 1, 2) == (1, pytest.approx(1_000_000))
