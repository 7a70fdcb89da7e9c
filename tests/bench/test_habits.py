"""Traces with habits and without, and prefetching replayed over them."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest

from overcommit.bench import habit_traces, replay_ahead
from overcommit.bench.catalogue_trace import Request
from overcommit.bench.foresight import LOOK_S, Foresight
from overcommit.bench.habit_traces import DAY_S, HOUR_S, MONDAY_S, make_trace
from overcommit.bench.simulate import simulate


def hours_of(trace: list[Request]) -> dict[int, set[int]]:
    """The hours of the day in which each model is asked for."""
    hours: dict[int, set[int]] = defaultdict(set)
    for request in trace:
        hours[request.model].add(int(request.time_s % DAY_S // HOUR_S))
    return hours


@pytest.mark.parametrize("name", habit_traces.TRACES)
def test_a_trace_is_seeded_in_order_and_begins_on_a_monday(name: str) -> None:
    trace = make_trace(name, 1, 4)
    assert trace == make_trace(name, 1, 4)
    assert trace != make_trace(name, 2, 4)
    assert all(left.time_s <= right.time_s for left, right in pairwise(trace))
    assert MONDAY_S <= trace[0].time_s < MONDAY_S + DAY_S
    assert {request.model for request in trace} <= set(range(habit_traces.MODELS))


def test_each_model_has_an_hour_and_some_have_only_weekends() -> None:
    trace = make_trace("hours", 1, 14)
    assert all(len(hours) == 1 for hours in hours_of(trace).values())
    days: dict[int, set[int]] = defaultdict(set)
    for request in trace:
        days[request.model].add(int((request.time_s - MONDAY_S) // DAY_S) % 7)
    kinds = {frozenset(found) for found in days.values()}
    assert any(kind <= {5, 6} for kind in kinds)
    assert any(kind <= {0, 1, 2, 3, 4} for kind in kinds)
    assert any(len(kind) == 7 for kind in kinds)


def test_jobs_keep_their_periods() -> None:
    times: dict[int, list[float]] = defaultdict(list)
    for request in make_trace("jobs", 1, 4):
        times[request.model].append(request.time_s)
    for found in times.values():
        gaps = [right - left for left, right in pairwise(found) if right - left > 60]
        if len(gaps) > 10:
            mean_s = sum(gaps) / len(gaps)
            assert any(abs(mean_s - period_s) < 30 for period_s in habit_traces.PERIODS_S)


def test_where_there_are_habits_prefetching_saves_loads() -> None:
    cell = replay_ahead.replay(make_trace("hours", 1, 7), habit_traces.MODELS, 0.13, 1)
    assert cell.ratio < 0.9
    assert cell.closed > cell.closed_alone
    assert cell.outcome.prefetches_used > 0


def test_a_model_that_comes_every_hour_is_there_from_the_fourth_time_on() -> None:
    trace = [
        Request(MONDAY_S + turn * HOUR_S + model * 900.0, model)
        for turn in range(24)
        for model in range(4)
    ]
    sizes = [10] * 4
    outcome = simulate("lru", trace, sizes, 20, Foresight(trace[0].time_s))
    assert simulate("lru", trace, sizes, 20).misses == len(trace), "a round of four in room for two"
    assert outcome.misses <= len(trace) // 2


def test_time_goes_on_between_looks() -> None:
    foresight = Foresight(100.0)
    outcome = simulate("lru", [Request(100.0 + 10 * LOOK_S, 0)], [1], 1, foresight)
    assert outcome.misses == 1
    assert foresight.next_s() == 100.0 + 11 * LOOK_S
