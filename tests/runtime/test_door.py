"""Who is refused at a worker's door, and who is not."""

from __future__ import annotations

import time
from typing import Final

import pytest
from front_rig import Front
from worker_rig import Rig, X, info, ready

from overcommit.runtime import _shm
from overcommit.runtime.batcher import Batcher
from overcommit.runtime.door import SPACING_NS
from overcommit.runtime.lanes import RUN_ALONE, Job, Limits
from overcommit.runtime.worker_messages import Activate, Expected, Withdrawn

SECOND: Final = 1_000_000_000
MS: Final = 1_000_000


# --- foresight ----------------------------------------------------------------------------------
def job(number: int, slot: int = 1, deadline_ns: int = 10**15, rows: int = 1) -> Job:
    return Job(number, slot, 0, deadline_ns, 0, rows=rows)


def paced(cost_ns: int = 100, **limits: int) -> Batcher:
    """A batcher that has run batches of these lanes, each for so long."""
    batcher, number = Batcher(), 0
    for slot in (1, 2, 3):
        batcher.configure(slot, Limits(**limits))
        batcher.set_runnable(slot, True, 0)
        for _ in range(12):  # one in four is noted
            number -= 1
            batcher.add(job(number, slot), 0)
            batch = batcher.next(0)
            assert batch is not None
            batcher.finish(batch, cost_ns, 0)
    return batcher


def test_nothing_is_foreseen_for_a_lane_that_has_not_run() -> None:
    batcher = Batcher()
    assert batcher.foresight.of(job(1), 0) is None
    batcher.add(job(1), 0)
    assert batcher.foresight.of(job(2), 0) is None


def test_what_waits_in_its_own_lane_is_before_it() -> None:
    batcher = paced()
    for number in range(5):
        batcher.add(job(number), 0)
    assert batcher.foresight.of(job(9), 0) == (600, 100)


def test_only_jobs_with_earlier_deadlines_are_before_it() -> None:
    batcher = paced()
    for number in range(5):
        batcher.add(job(number, deadline_ns=1000 + number), 0)
    assert batcher.foresight.of(job(9, deadline_ns=1001), 0) == (300, 100)


def test_batches_that_are_shared_are_counted_once() -> None:
    batcher = paced(rows_max=4)
    for number in range(7):
        batcher.add(job(number), 0)
    foreseen = batcher.foresight.of(job(9), 0)
    assert foreseen is not None
    assert foreseen[0] == 200, "two full batches"


def test_other_lanes_take_their_turns_and_no_more() -> None:
    batcher = paced()
    for number in range(20):
        batcher.add(job(number, slot=2), 0)
    batcher.add(job(50, slot=3), 0)
    batcher.add(job(60, slot=1), 0)
    # Two of its own, as many of lane 2, the one of lane 3.
    assert batcher.foresight.of(job(61, slot=1), 0) == (500, 100)


def test_lanes_that_cannot_run_are_before_nobody() -> None:
    batcher = paced()
    for number in range(20):
        batcher.add(job(number, slot=2), 0)
    batcher.set_runnable(2, False, 0)
    assert batcher.foresight.of(job(61), 0) == (100, 100)


def test_a_lower_class_takes_an_eighth() -> None:
    batcher = paced()
    batcher.remove(1)
    batcher.configure(1, Limits(priority=1))
    batcher.set_runnable(1, True, 0)
    for _ in range(12):
        batcher.add(job(-99, 1), 0)
        batch = batcher.next(0)
        assert batch is not None
        batcher.finish(batch, 800, 0)
    for number in range(20):
        batcher.add(job(number, slot=2), 0)
    assert batcher.foresight.of(job(61), 0) == (800 + 100, 800)
    assert batcher.foresight.of(job(61, slot=2), 0) == (2100, 100)


# --- a worker -----------------------------------------------------------------------------------
def congest(rig: Rig, slot: int = 3, cost_ns: int = SECOND) -> None:
    """Let the worker believe that batches of this version take so long."""
    turn = rig.worker.batcher._turn(slot)
    for _ in range(3):
        turn.pace.note(1, cost_ns)
    rig.worker.batcher.slowest_ns = cost_ns


def expected(slot: int, wait_ns: int) -> Expected:
    at_ns = time.monotonic_ns() + wait_ns
    return Expected(slot=slot, ready_ns=at_ns, likely_ns=at_ns)


def test_a_request_that_would_be_answered_too_late_is_refused_at_once(
    rig: Rig, front: Front
) -> None:
    ready(rig, front)
    congest(rig, cost_ns=10 * SECOND)
    waits = front.submit(3, [X], timeout_ns=55 * SECOND)
    late = front.submit(3, [X], timeout_ns=5 * SECOND)
    in_time = front.submit(3, [X], timeout_ns=50 * SECOND)
    rig.answered(front, waits, late, in_time)
    assert front.status(late) == _shm.NOT_RESIDENT
    code, _, text = front.text(late).partition("\n")
    assert code == "overloaded"
    assert text.startswith("model 'm3' version 1: ")
    assert "give it a longer timeout, or add workers" in text
    back_ms = front.answers[late][7]
    assert 0 < back_ms <= 10_000
    assert f"try again in {back_ms} ms" in text
    assert front.status(waits) == front.status(in_time) == _shm.OK


def test_a_request_with_time_enough_is_never_refused(rig: Rig, front: Front) -> None:
    ready(rig, front)
    congest(rig, cost_ns=SECOND // 100)
    requests = [front.submit(3, [X]) for _ in range(32)]
    rig.answered(front, *requests)
    assert {front.status(request) for request in requests} == {_shm.OK}


def test_a_request_that_is_retried_after_a_death_is_not_refused(rig: Rig, front: Front) -> None:
    ready(rig, front)
    congest(rig, cost_ns=10 * SECOND)
    front.submit(3, [X])
    retried = front.submit(3, [X], timeout_ns=5 * SECOND, flags=RUN_ALONE)
    rig.answered(front, retried)
    assert front.status(retried) == _shm.OK


def test_a_request_whose_weights_come_too_late_is_refused_at_once(rig: Rig, front: Front) -> None:
    rig.control.send(info(5))
    rig.settle()
    short = front.submit(5, [X], timeout_ns=20 * SECOND)
    long = front.submit(5, [X], timeout_ns=50 * SECOND)
    rig.settle()
    ready_ns = time.monotonic_ns() + 30 * SECOND
    rig.control.send(Expected(slot=5, ready_ns=ready_ns, likely_ns=ready_ns))
    rig.answered(front, short)
    assert front.text(short).startswith("overloaded\nmodel 'm5' version 1: its weights will be in")
    assert 25_000 < front.answers[short][7] <= 30_000
    assert rig.leases.read(5)[1] == 1, "the page says who still waits"
    # Who comes later is told the same, without a word to the supervisor.
    rig.heard()
    later = front.submit(5, [X], timeout_ns=10 * SECOND)
    rig.answered(front, later)
    assert front.status(later) == _shm.NOT_RESIDENT
    assert rig.heard() == []
    assert long not in front.collect()
    rig.control.send(rig.publish(5, 1, 4.0))
    rig.answered(front, long)
    assert front.status(long) == _shm.OK


def test_the_version_comes_although_everybody_was_refused(rig: Rig, front: Front) -> None:
    rig.control.send(info(5))
    rig.settle()
    front.submit(5, [X], timeout_ns=20 * SECOND)
    rig.settle()
    rig.control.send(expected(5, 30 * SECOND))
    rig.until(lambda: bool(front.collect()))
    rig.control.send(rig.publish(5, 1, 4.0))
    rig.settle()
    # What was expected is over: a request finds the version there.
    request = front.submit(5, [X], timeout_ns=20 * SECOND)
    rig.answered(front, request)
    assert front.status(request) == _shm.OK


def test_an_expectation_that_comes_after_the_weights_refuses_nobody(rig: Rig, front: Front) -> None:
    ready(rig, front)
    rig.control.send(expected(3, 3000 * SECOND))
    rig.settle()
    request = front.submit(3, [X])
    rig.answered(front, request)
    assert front.status(request) == _shm.OK


def test_the_deadlines_of_those_that_wait_are_told_and_again_for_an_earlier_one(
    rig: Rig, front: Front
) -> None:
    rig.control.send(info(5))
    rig.settle()
    for seconds in (30, 40, 20):
        front.submit(5, [X], timeout_ns=seconds * SECOND)
        rig.settle()
    first, second = rig.heard_in_full()
    assert isinstance(first, Activate)
    assert isinstance(second, Activate)
    assert first.earliest_ns == first.latest_ns
    assert second.earliest_ns < first.earliest_ns < second.latest_ns


def test_a_wish_that_was_withdrawn_is_made_again_for_a_job_that_has_come(
    rig: Rig, front: Front
) -> None:
    rig.control.send(info(5))
    rig.settle()
    front.submit(5, [X])
    rig.settle()
    rig.heard()
    rig.control.send(Withdrawn(slot=5))
    rig.settle()
    assert rig.heard() == [Activate(slot=5)]


def test_a_door_that_does_not_judge_lets_everybody_in(
    rig: Rig, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(rig, front)
    monkeypatch.setattr(rig.worker.door, "judges", False)
    congest(rig, cost_ns=10 * SECOND)
    requests = [front.submit(3, [X], timeout_ns=5 * SECOND) for _ in range(3)]
    rig.answered(front, *requests)
    assert {front.status(request) for request in requests} == {_shm.OK}


def test_those_who_wait_for_the_same_weights_are_told_to_come_back_one_after_the_other(
    rig: Rig, front: Front
) -> None:
    rig.control.send(info(5))
    rig.settle()
    requests = [front.submit(5, [X], timeout_ns=20 * SECOND) for _ in range(24)]
    rig.settle()
    ready_ns = time.monotonic_ns() + 30 * SECOND
    rig.control.send(Expected(slot=5, ready_ns=ready_ns, likely_ns=ready_ns))
    rig.answered(front, *requests)
    # All were refused at one time; each four are a millisecond after the four before.
    backs_ms = sorted(front.answers[request][7] for request in requests)
    assert backs_ms[-1] - backs_ms[0] == pytest.approx(23 * SPACING_NS / MS, abs=1)
