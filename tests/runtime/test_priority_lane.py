"""Levels of requests: what is urgent goes first, and each level has its own limits."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.batcher import Batcher
from overcommit.runtime.config import NEVER_NS, Batching, ModelConfig, QueueLevel
from overcommit.runtime.lanes import Job, Lane, limits_of
from overcommit.runtime.priority_lane import PriorityLane

_ids = itertools.count(1)


def job(level: int, *, deadline: int = NEVER_NS, key: int = 0, **more: Any) -> Job:
    return Job(next(_ids), 0, 0, deadline, 0, level=level, shape_key=key, row_bytes=4, **more)


def lane_of(rows: int = 4, levels: int = 3, **more: Any) -> PriorityLane:
    batching = Batching(max_batch_size=rows, priority_levels=levels, **more)
    return PriorityLane(0, limits_of(ModelConfig(batching=batching)), batching)


def filled(lane: PriorityLane, *jobs: Job) -> PriorityLane:
    for each in jobs:
        assert lane.takes(each)
        lane.push(each)
    return lane


def levels_of(jobs: list[Job]) -> list[int]:
    return [each.level for each in jobs]


def test_a_batch_takes_the_most_urgent_first_and_is_filled_up_with_the_rest() -> None:
    lane = filled(lane_of(rows=2), *(job(level) for level in (3, 1, 2, 1, 3)))
    batches = [levels_of(lane.take(0, [])) for _ in range(3)]
    assert batches == [[1, 1], [2, 3], [3]]
    assert (lane.count, lane.rows) == (0, 0)


def test_who_does_not_say_or_says_what_there_is_not_has_the_default() -> None:
    lane = filled(lane_of(rows=1, default_priority=2), *(job(level) for level in (0, 3, 9, 1, 2)))
    assert [levels_of(lane.take(0, [])) for _ in range(5)] == [[1], [0], [9], [2], [3]]
    last = filled(lane_of(rows=1), *(job(level) for level in (0, 2)))
    assert levels_of(last.take(0, [])) == [2]


def test_a_batch_is_of_one_shape_and_within_its_rows() -> None:
    lane = filled(
        lane_of(rows=4), job(1, key=7), job(2, key=8), job(3, key=7), job(3, key=7, rows=3)
    )
    assert levels_of(lane.take(0, [])) == [1, 3]
    assert lane.taken_rows == 2
    assert levels_of(lane.take(0, [])) == [2]
    assert levels_of(lane.take(0, [])) == [3]


def test_who_runs_alone_is_joined_by_nobody() -> None:
    lane = filled(lane_of(), job(1, alone=True), job(2))
    assert levels_of(lane.take(0, [])) == [1]


def test_behind_a_job_that_has_expired_another_shape_may_be_more_urgent() -> None:
    lane = Lane(0, limits_of(ModelConfig(batching=Batching(max_batch_size=4))))
    late, last, first = job(0, deadline=10), job(0, deadline=900), job(0, deadline=500, key=1)
    for each in (late, last, first):
        lane.push(each)
    expired: list[Job] = []
    assert lane.take(20, expired) == [first]
    assert expired == [late]
    assert lane.take(20, expired) == [last]


def test_each_level_has_its_own_limit_and_time() -> None:
    own = QueueLevel(level=1, max_queue_size=1, queue_timeout_us=5)
    batcher = Batcher()
    batching = Batching(
        max_batch_size=4, priority_levels=2, max_queue_size=2, queue_timeout_us=7, levels=(own,)
    )
    lane = PriorityLane(0, limits_of(ModelConfig(batching=batching)), batching)
    batcher.configure(0, lane.limits, lane)
    urgent, late = job(1), job(2)
    assert batcher.add(urgent, 0)
    assert urgent.deadline_ns == 5000
    assert not batcher.add(job(1), 0), "its level is full"
    assert batcher.add(late, 0)
    assert late.deadline_ns == 7000, "as the version says"
    assert batcher.add(job(2), 0)
    assert not batcher.add(job(2), 0)


def test_what_is_foreseen_for_an_urgent_job_leaves_the_others_out() -> None:
    lane = filled(lane_of(), job(2), job(2, rows=3), job(3), job(1))
    assert lane.before(job(1)) == (1, 1)
    assert lane.before(job(2)) == (3, 5)
    assert lane.before(job(3)) == (4, 6)


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(0, 1), st.integers(1, 40)),
        max_size=20,
    ),
    st.integers(1, 4),
    st.integers(0, 30),
)
def test_nobody_is_taken_while_a_more_urgent_one_of_its_shape_waits(
    given_jobs: list[tuple[int, int, int, int]], rows: int, now: int
) -> None:
    lane = lane_of(rows=rows)
    waiting = [
        job(level, rows=rows_of, key=key, deadline=deadline)
        for level, rows_of, key, deadline in given_jobs
    ]
    filled(lane, *waiting)
    while waiting:
        late: list[Job] = []
        batch = lane.take(now, late)
        assert all(each.deadline_ns <= now for each in late)
        for each in (*late, *batch):
            waiting.remove(each)
        if not batch:
            assert lane.count == 0
            break
        assert len({each.shape_key for each in batch}) == 1
        assert len(batch) == 1 or sum(each.rows for each in batch) <= rows
        level = [each.level if 0 < each.level <= 3 else 3 for each in batch]
        assert level == sorted(level)
        rest = [each for each in waiting if each.deadline_ns > now]
        first = min((each.level if 0 < each.level <= 3 else 3 for each in rest), default=3)
        assert level[0] <= first
        assert lane.count == len(waiting)
        assert lane.rows == sum(each.rows for each in waiting)
    assert not waiting
