"""The trace whose demand moves."""

from __future__ import annotations

from collections import Counter

import numpy as np

from overcommit.bench import week_trace
from overcommit.bench.week_trace import HOUR_S, demand, make_trace


def test_it_is_seeded_ordered_and_about_as_long_as_asked_for() -> None:
    trace = make_trace(1, 5_000, 7)
    assert trace == make_trace(1, 5_000, 7)
    assert trace != make_trace(2, 5_000, 7)
    times = [request.time_s for request in trace]
    assert times == sorted(times)
    assert 4_000 < len(trace) < 6_000


def test_nights_and_weekends_differ_from_office_hours() -> None:
    trace = make_trace(1)
    hours = Counter(int(r.time_s // HOUR_S) % 24 for r in trace)
    assert hours[14] > 2 * hours[4] or hours[20] > 2 * hours[4]
    by_day: dict[int, Counter[int]] = {}
    for request in trace:
        day = int(request.time_s // HOUR_S // 24) % 7
        by_day.setdefault(int(day >= 5), Counter())[request.model] += 1
    weekday = {model for model, _ in by_day[0].most_common(20)}
    weekend = {model for model, _ in by_day[1].most_common(20)}
    assert len(weekday - weekend) >= 5, "others are asked for at weekends"


def test_some_models_come_and_some_go() -> None:
    by_hour = demand(np.random.default_rng(1))
    first, last = by_hour[: 7 * 24].sum(axis=0), by_hour[-7 * 24 :].sum(axis=0)
    assert ((first == 0) & (last > 0)).sum() > week_trace.MODELS * 0.05
    assert ((last < first / 10) & (first > 0)).sum() > week_trace.MODELS * 0.05
