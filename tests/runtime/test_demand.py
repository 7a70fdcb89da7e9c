"""When a model is asked for next: gaps, the week, and who of the experts is listened to."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime import gaps
from overcommit.runtime.demand import (
    CONSTANT,
    CONSTANT_CALENDAR,
    HISTOGRAM,
    HISTOGRAM_CALENDAR,
    Demand,
)
from overcommit.runtime.gaps import BINS, GAPS_REMEMBERED, Pool
from overcommit.runtime.weekly import HOUR_S, HOURS, LIFT_MAX, LIFT_MIN, Weekly, cell_of

DAY = 86_400.0
MONDAY = 4 * DAY + 52 * 7 * DAY  # the epoch was a Thursday
GAPS_S = st.floats(1.0, 100 * DAY, allow_nan=False)


def used(times: list[float]) -> Demand:
    demand = Demand(times[0], Pool())
    for at_s in times:
        demand.use(at_s)
    return demand


def best(demand: Demand) -> int:
    return max(range(4), key=demand.scores.__getitem__)


# --- gaps ---------------------------------------------------------------------------------------
@given(st.lists(GAPS_S, max_size=300), GAPS_S, GAPS_S)
def test_survival_falls_and_is_never_nothing(seen: list[float], one: float, other: float) -> None:
    bins, pool = bytearray(BINS), Pool()
    for gap_s in seen:
        gaps.count(bins, gap_s)
        pool.count(gap_s)
    low, high = sorted((one, other))
    assert 0 < gaps.survival(bins, high, pool) <= gaps.survival(bins, low, pool) + 1e-9
    assert gaps.density(bins, one, pool) > 0
    assert sum(bins) <= 4 * GAPS_REMEMBERED + 4


def test_old_gaps_fade() -> None:
    bins = bytearray(BINS)
    for _ in range(200):
        gaps.count(bins, 600.0)
    for _ in range(200):
        gaps.count(bins, 86_400.0)
    assert sum(bins[: int(gaps.place(3600.0))]) == 0


def test_the_pool_says_what_is_expected_of_a_model_that_is_not_known() -> None:
    pool = Pool()
    for _ in range(20):
        pool.count(300.0)
    row = bytearray(BINS)
    soon = gaps.survival(row, 200.0, pool) - gaps.survival(row, 400.0, pool)
    late = gaps.survival(row, 20_000.0, pool) - gaps.survival(row, 40_000.0, pool)
    assert soon > 5 * late


# --- the week -----------------------------------------------------------------------------------
def test_the_week_begins_on_monday() -> None:
    assert cell_of(int(MONDAY // HOUR_S)) == 0
    assert cell_of(int((MONDAY + 6 * DAY) // HOUR_S) + 23) == HOURS - 1


def test_a_workday_hour_is_known_after_a_few_days_and_the_weekend_after_one() -> None:
    week = Weekly(int(MONDAY // HOUR_S))
    for day in range(5):
        week.use(int((MONDAY + day * DAY) // HOUR_S) + 9)
    week.pass_to(int((MONDAY + 7 * DAY) // HOUR_S))
    monday = week.hour
    assert week.lift(monday + 9) > 10
    assert week.lift(monday + 10) < 0.2
    assert week.lift(monday + 5 * 24 + 9) < 0.5, "Saturday"


def test_a_habit_that_ended_is_forgotten() -> None:
    week = Weekly(0)
    for day in range(28):
        week.use(day * 24 + 9)
    for day in range(28, 140):
        week.use(day * 24 + 15)
    assert week.lift(140 * 24 + 9) < 0.5
    assert week.lift(140 * 24 + 15) > 10


@given(st.lists(st.integers(0, 400), max_size=60), st.integers(0, 200))
def test_a_lift_is_bounded_and_hours_only_pass(steps: list[int], ahead: int) -> None:
    week = Weekly(1000)
    hour = 1000
    for step in steps:
        hour += step
        week.use(hour)
        assert week.hour == hour
        week.use(hour - 1)
        assert week.hour == hour
        assert LIFT_MIN <= week.lift(hour + ahead) <= LIFT_MAX


def test_a_model_that_slept_for_years_begins_anew() -> None:
    week = Weekly(0)
    week.use(9)
    week.pass_to(10**9)
    assert (week.born, sum(week.cells)) == (10**9, 0)


# --- demand -------------------------------------------------------------------------------------
def test_uses_without_a_pause_are_one_visit() -> None:
    demand = used([MONDAY + second for second in range(0, 600, 20)])
    assert demand.visits == 1
    demand.use(MONDAY + 2000)
    assert demand.visits == 2


def test_a_period_is_seen_coming() -> None:
    random = np.random.default_rng(1)
    times = [MONDAY + k * 5 * HOUR_S + float(random.normal(0, 60)) for k in range(60)]
    demand = used(times)
    assert best(demand) in (HISTOGRAM, HISTOGRAM_CALENDAR)
    due = times[-1] + 5 * HOUR_S
    early = demand.chance(due - 4 * HOUR_S, due - 3.9 * HOUR_S)
    assert demand.chance(due - 300, due + 300) > 0.2 > 0.05 > early


def test_an_hour_of_the_day_is_seen_coming() -> None:
    times = [MONDAY + day * DAY + 9 * HOUR_S + m * 60 for day in range(12) for m in (2, 15, 40)]
    demand = used(times)
    assert best(demand) in (CONSTANT_CALENDAR, HISTOGRAM_CALENDAR)
    nine = MONDAY + 14 * DAY + 9 * HOUR_S  # two weekend days later
    assert demand.chance(nine - 60, nine + 240) > 0.05
    nine = MONDAY + 12 * DAY + 9 * HOUR_S
    assert demand.chance(nine - 60, nine + 240) > 0.2
    assert demand.chance(nine - 6 * HOUR_S, nine - 5.9 * HOUR_S) < 0.02


def test_a_model_without_habits_is_taken_for_one() -> None:
    random = np.random.default_rng(2)
    times = (MONDAY + np.cumsum(random.exponential(4000, size=400))).tolist()
    demand = used(times)
    assert demand.scores[CONSTANT] > max(demand.scores[1:]) - 3
    expected = -math.expm1(-600 / 4000)
    for idle_s in (100.0, 3000.0, 9000.0):
        at_s = times[-1] + idle_s
        assert demand.chance(at_s, at_s + 600) == pytest.approx(expected, abs=0.12)


def test_who_has_ended_is_expected_less_and_less() -> None:
    demand = used([MONDAY + k * HOUR_S for k in range(50)])
    end = MONDAY + 49 * HOUR_S
    assert demand.chance(end + 30 * DAY, end + 30 * DAY + 300) < 0.01


@given(st.lists(st.floats(0.0, 3 * DAY), min_size=1, max_size=40), GAPS_S, st.floats(0, 3600))
def test_a_chance_is_one_and_grows_with_the_time_that_is_given(
    steps: list[float], idle_s: float, span_s: float
) -> None:
    demand = used([MONDAY + at for at in np.cumsum(steps).tolist()])
    at_s = demand.last_s + idle_s
    short = demand.chance(at_s, at_s + span_s)
    assert 0 <= short <= 1
    assert demand.chance(at_s, at_s + 2 * span_s) >= short - 1e-9


def test_time_goes_forwards_and_a_clock_that_is_set_back_begins_anew() -> None:
    demand = used([MONDAY + k * HOUR_S for k in range(10)])
    before = (demand.visits, demand.last_s, bytes(demand.bins))
    demand.use(MONDAY)
    assert (demand.visits, demand.last_s, bytes(demand.bins)) == before
    demand.use(MONDAY - 10 * DAY)
    assert (demand.visits, demand.last_s) == (1, MONDAY - 10 * DAY)
