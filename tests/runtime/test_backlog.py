"""How long a job waits among the lanes of a worker, and who is told to come back when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.backlog import PROMISE_NS_MAX, Backlog, Promises

LANES = st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 100)), max_size=20)


def test_a_lane_takes_as_much_as_the_one_that_waits_or_what_it_has() -> None:
    backlog = Backlog([(100, 1), (1000, 1), (50, 1)])
    assert backlog.until_ns(200) == 100 + 200 + 50
    assert backlog.until_ns(10) == 30
    assert Backlog([]).until_ns(10) == 0


def test_a_heavier_lane_takes_its_weight() -> None:
    assert Backlog([(1000, 4)]).until_ns(100) == 400
    assert Backlog([(300, 4)]).until_ns(100) == 300


@given(LANES, st.floats(0, 1e9))
def test_it_is_the_sum_over_the_lanes(lanes: list[tuple[int, int]], share: float) -> None:
    expected = sum(min(work, share * weight) for work, weight in lanes)
    assert Backlog(lanes).until_ns(share) == pytest.approx(expected, rel=1e-9, abs=1e-3)


@given(LANES, st.floats(0, 1e9), st.floats(0, 1e9), st.tuples(st.integers(0, 10**9), st.just(1)))
def test_it_grows_with_the_share_and_with_every_lane(
    lanes: list[tuple[int, int]], share: float, more: float, lane: tuple[int, int]
) -> None:
    before = Backlog(lanes).until_ns(share)
    assert Backlog(lanes).until_ns(share + more) >= before - 1e-3
    assert Backlog([*lanes, lane]).until_ns(share) >= before - 1e-3


# --- promises -----------------------------------------------------------------------------------
def test_a_job_that_has_the_time_may_wait() -> None:
    promises = Promises()
    assert promises.judge(100.0, 10.0, 100, now_ns=0) == 0
    assert len(promises) == 0


def test_those_that_are_refused_are_told_times_in_turn() -> None:
    promises = Promises()
    assert [promises.judge(150.0, 10.0, 100, now_ns=0) for _ in range(3)] == [50, 60, 70]


def test_a_promised_place_is_not_given_away() -> None:
    promises = Promises()
    promises.judge(150.0, 10.0, 100, now_ns=0)  # comes back at 50
    # The queue has become shorter; without the promise this one would be just in time.
    assert promises.judge(95.0, 10.0, 100, now_ns=40) == 5
    assert promises.judge(95.0, 10.0, 100, now_ns=60) == 0


def test_who_does_not_come_back_holds_up_nobody_while_the_queue_is_short() -> None:
    promises = Promises()
    for _ in range(100):
        promises.judge(150.0, 10.0, 100, now_ns=0)
    assert promises.judge(50.0, 10.0, 100, now_ns=1) == 0
    assert promises.judge(51.0, 10.0, 100, now_ns=1) > 0


def test_nobody_is_told_to_come_back_in_a_year() -> None:
    assert Promises().judge(1e18, 1.0, 100, now_ns=0) == PROMISE_NS_MAX


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2000), st.integers(1, 100), st.integers(1, 1000), st.integers(0, 300)
        ),
        max_size=60,
    )
)
def test_only_those_are_refused_that_wait_longer_than_half_their_time(
    events: list[tuple[int, int, int, int]],
) -> None:
    promises, now_ns = Promises(), 0
    for wait, cost, left, step in events:
        now_ns += step
        back_ns = promises.judge(float(wait), float(cost), left, now_ns)
        assert back_ns >= 0
        if 2 * wait <= left:
            assert back_ns == 0
        if wait > left:
            assert back_ns > 0
    assert Promises.judge(promises, 0.0, 1.0, 10, now_ns + PROMISE_NS_MAX) == 0
    assert len(promises) == 0
