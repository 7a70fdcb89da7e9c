"""The Zipf law."""

from __future__ import annotations

import collections

import numpy as np

from overcommit.bench.popularity import Zipf


def test_the_same_seed_draws_the_same_models() -> None:
    first, second = (Zipf(40, 1.1, seed=3) for _ in range(2))
    assert [first.draw() for _ in range(9000)] == [second.draw() for _ in range(9000)]


def test_processes_agree_on_who_is_popular_and_draw_differently() -> None:
    first, second = Zipf(40, 1.1, seed=1), Zipf(40, 1.1, seed=2)
    assert first.by_rank.tolist() == second.by_rank.tolist()
    assert [first.draw() for _ in range(100)] != [second.draw() for _ in range(100)]


def test_frequencies_follow_the_law() -> None:
    zipf, draws = Zipf(10, 1.1, seed=5), 50_000
    counts = collections.Counter(zipf.draw() for _ in range(draws))
    shares = np.array([counts[int(model)] / draws for model in zipf.by_rank])
    expected = np.arange(1, 11) ** -1.1
    expected /= expected.sum()
    # Five standard deviations of a binomial share; the seed is fixed anyway.
    assert np.all(np.abs(shares - expected) < 5 * np.sqrt(expected / draws))


def test_one_model_is_always_drawn() -> None:
    zipf = Zipf(1, 1.1, seed=0)
    assert {zipf.draw() for _ in range(10)} == {0}
