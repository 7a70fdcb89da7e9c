"""Requests that have waited too long let the others pass, where the queue policy says so."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime import delay_lane
from overcommit.runtime.batcher import Batcher
from overcommit.runtime.config import NEVER_NS, Batching, ModelConfig, QueueLevel
from overcommit.runtime.delay_lane import DelayLane, queue_of
from overcommit.runtime.lanes import Job, Lane, limits_of
from overcommit.runtime.priority_lane import PriorityLane

_ids = itertools.count(1)


def job(taken_us: int, *, deadline: int = NEVER_NS, **more: Any) -> Job:
    return Job(next(_ids), 0, 0, deadline, taken_us * 1000, row_bytes=4, **more)


def lane_of(rows: int = 1, after_us: int = 10) -> Lane:
    batching = Batching(max_batch_size=rows, queue_timeout_us=after_us, timeout_action="delay")
    return queue_of(0, limits_of(ModelConfig(batching=batching)))


def filled(lane: Lane, *jobs: Job) -> Lane:
    for each in jobs:
        lane.push(each)
    return lane


def take(lane: Lane, now_us: int) -> list[Job]:
    late: list[Job] = []
    jobs = lane.take(now_us * 1000, late)
    assert late == [], "nobody is refused"
    return jobs


def test_who_is_late_lets_those_pass_that_came_after_him() -> None:
    first, second, third = job(0), job(8), job(12)
    lane = filled(lane_of(), first, second, third)
    assert [take(lane, 13) for _ in range(3)] == [[second], [third], [first]]
    assert (lane.count, lane.rows) == (0, 0)


def test_batches_are_filled_up_with_who_is_late() -> None:
    late, other, timely = job(0, shape_key=7), job(0, shape_key=8), job(9, shape_key=7)
    lane = filled(lane_of(rows=4), late, other, timely)
    assert take(lane, 12) == [timely, late]
    assert take(lane, 12) == [other]


def test_a_late_one_that_comes_back_is_late_and_a_timely_one_has_its_place() -> None:
    late, timely, new = job(0), job(8), job(12)
    lane = filled(lane_of(), late, timely)
    assert [take(lane, 11), take(lane, 11)] == [[timely], [late]]
    filled(lane, new, late, timely)
    assert [take(lane, 12) for _ in range(3)] == [[timely], [new], [late]]


def test_a_deadline_is_one_whoever_lets_others_pass() -> None:
    lane = filled(lane_of(), job(0, deadline=15_000), job(1, deadline=90_000))
    assert lane.first_deadline_ns() == 15_000
    take(lane, 12)
    expired: list[Job] = []
    lane.expire(95_000, expired)
    assert lane.count + len(expired) == 1


def test_each_level_lets_its_own_pass_before_the_next_level() -> None:
    own = QueueLevel(level=1, queue_timeout_us=10, timeout_action="delay")
    batching = Batching(max_batch_size=1, priority_levels=2, levels=(own,))
    lane = PriorityLane(0, limits_of(ModelConfig(batching=batching)), batching)
    batcher = Batcher()
    batcher.configure(0, lane.limits, lane)
    batcher.set_runnable(0, True, 0)
    late, timely, low = job(0, level=1), job(9, level=1), job(0, level=2)
    for each in (low, late, timely):
        assert batcher.add(each, each.taken_ns)
    order = []
    while (batch := batcher.next(15_000)) is not None:
        order += batch.jobs
        batcher.finish(batch, 1, 15_000)
    assert order == [timely, late, low]


def test_who_has_left_is_not_kept(monkeypatch: Any) -> None:
    monkeypatch.setattr(delay_lane, "ARRIVALS_SPARE", 4)
    lane = filled(lane_of(after_us=1_000_000), job(0))
    for _ in range(100):
        filled(lane, job(1))
        take(lane, 2)
    assert isinstance(lane, DelayLane)
    assert len(lane._arrivals) <= 2 * lane.count + 4


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 1)), max_size=20),
    st.integers(1, 4),
    st.integers(30, 50),
)
def test_no_late_one_of_a_shape_is_taken_while_a_timely_one_waits(
    given_jobs: list[tuple[int, int]], rows: int, now: int
) -> None:
    waiting = [job(taken, shape_key=key) for taken, key in sorted(given_jobs)]
    lane = filled(lane_of(rows=rows), *waiting)
    while waiting:
        batch = take(lane, now)
        assert batch
        for each in batch:
            waiting.remove(each)
        is_late = batch[0].taken_ns + 10_000 <= now * 1000
        assert not is_late or all(each.taken_ns + 10_000 <= now * 1000 for each in waiting)
        assert lane.count == lane.rows == len(waiting)
