"""The batcher: which jobs run together, and in which order."""

from __future__ import annotations

import gc
import itertools

import pytest

from overcommit.runtime.batcher import SWEEP_NS, Batcher
from overcommit.runtime.config import NEVER_NS, Batching, ModelConfig
from overcommit.runtime.joining import LANE_JOBS_MAX
from overcommit.runtime.lanes import (
    BATCH_BYTES_MAX,
    BATCH_REQUESTS_MAX,
    Batch,
    Job,
    Limits,
    limits_of,
)
from overcommit.runtime.signature import Form
from overcommit.runtime.turns import LOWER_SHARE, Turn

MS = 1_000_000
_ids = itertools.count(1)


def job(slot: int = 1, now_ns: int = 0, **fields: object) -> Job:
    fields = {"link": 1, "deadline_ns": NEVER_NS, **fields}
    return Job(next(_ids), slot, taken_ns=now_ns, **fields)  # type: ignore[arg-type]


def runnable(*slots: int, **limits: int) -> Batcher:
    batcher = Batcher()
    for slot in slots:
        batcher.configure(slot, Limits(**{"rows_max": 4, **limits}))
        batcher.set_runnable(slot, True, 0)
    return batcher


def add(batcher: Batcher, *jobs: Job, now_ns: int = 0) -> None:
    for one in jobs:
        assert batcher.add(one, now_ns)


def take(batcher: Batcher, now_ns: int = 0, cost_ns: int = MS) -> list[Job]:
    batch = batcher.next(now_ns)
    if batch is None:
        return []
    batcher.finish(batch, cost_ns, now_ns)
    return batch.jobs


# --- one lane -----------------------------------------------------------------------------------
def test_a_free_worker_takes_what_waits_at_once() -> None:
    batcher = runnable(1)
    first, second = job(), job()
    add(batcher, first, second)
    assert take(batcher) == [first, second]
    assert take(batcher) == []
    assert len(batcher) == 0


def test_a_batch_has_at_most_the_rows_that_the_config_allows() -> None:
    batcher = runnable(1)
    jobs = [job(rows=2), job(rows=1), job(rows=2), job(rows=4)]
    add(batcher, *jobs)
    assert [take(batcher) for _ in range(3)] == [jobs[:2], [jobs[2]], [jobs[3]]]


def test_a_request_with_too_many_rows_runs_alone() -> None:
    batcher = runnable(1)
    small, huge = job(), job(rows=100)
    add(batcher, huge, small)
    assert [take(batcher), take(batcher)] == [[huge], [small]]


def test_padded_bytes_bound_a_batch() -> None:
    batcher = runnable(1)
    short, long = job(row_bytes=8), job(row_bytes=BATCH_BYTES_MAX)
    add(batcher, short, long)
    assert [take(batcher), take(batcher)] == [[short], [long]]


def test_a_batch_has_no_more_requests_than_the_status_page_can_name() -> None:
    batcher = runnable(1, rows_max=4096)
    add(batcher, *(job() for _ in range(BATCH_REQUESTS_MAX + 1)))
    assert [len(take(batcher)), len(take(batcher))] == [BATCH_REQUESTS_MAX, 1]


def test_a_model_that_does_not_batch_gets_its_requests_one_by_one() -> None:
    batcher = Batcher()
    batcher.configure(1, limits_of(ModelConfig(batching=Batching(max_batch_size=0))))
    batcher.set_runnable(1, True, 0)
    jobs = [job(), job()]
    add(batcher, *jobs)
    assert [take(batcher), take(batcher)] == [[jobs[0]], [jobs[1]]]


def test_a_suspect_runs_alone() -> None:
    batcher = runnable(1)
    jobs = [job(), job(alone=True), job(alone=True), job()]
    add(batcher, *jobs)
    batches = [take(batcher) for _ in range(3)]
    assert sorted(len(batch) for batch in batches) == [1, 1, 2]
    assert [jobs[0], jobs[3]] in batches


def test_only_equal_shapes_share_a_batch() -> None:
    batcher = runnable(1)
    jobs = [job(shape_key=key) for key in "abab"]
    add(batcher, *jobs)
    assert [take(batcher), take(batcher)] == [[jobs[0], jobs[2]], [jobs[1], jobs[3]]]


def test_the_earliest_deadline_goes_first() -> None:
    batcher = runnable(1, rows_max=1)
    late, soon, never = job(deadline_ns=90), job(deadline_ns=50), job()
    add(batcher, never, late, soon)
    assert [take(batcher), take(batcher), take(batcher)] == [[soon], [late], [never]]


def test_a_full_lane_refuses() -> None:
    batcher = runnable(1, jobs_max=2)
    add(batcher, job(), job())
    assert not batcher.add(job(), 0)
    take(batcher)
    assert batcher.add(job(), 0)


# --- queue delay --------------------------------------------------------------------------------
def test_a_queue_delay_holds_a_lane_until_its_oldest_job_has_waited_that_long() -> None:
    batcher = runnable(1, delay_ns=100)
    first, second = job(now_ns=10), job(now_ns=60)
    add(batcher, first, now_ns=10)
    add(batcher, second, now_ns=60)
    assert take(batcher, 109) == []
    assert batcher.wake_ns() == 110
    assert take(batcher, 110) == [first, second]
    assert batcher.wake_ns() is None


def test_a_preferred_size_does_not_wait_for_the_delay() -> None:
    batcher = runnable(1, delay_ns=100, rows_due=2)
    jobs = [job(), job()]
    add(batcher, jobs[0])
    assert take(batcher) == []
    add(batcher, jobs[1])
    assert take(batcher) == jobs


def test_a_job_expires_when_it_has_waited_as_long_as_its_lane_allows() -> None:
    batcher = runnable(1, wait_ns=5 * MS)
    patient, hasty = job(), job(deadline_ns=MS)
    add(batcher, patient, hasty)
    assert batcher.next(5 * MS) is None
    assert batcher.take_expired() == [hasty, patient]


def test_a_full_batch_does_not_wait_for_its_delay() -> None:
    batcher = runnable(1, delay_ns=100)
    jobs = [job() for _ in range(4)]
    add(batcher, *jobs)
    assert take(batcher, 0) == jobs


# --- deadlines ----------------------------------------------------------------------------------
def test_an_expired_job_is_not_run() -> None:
    batcher = runnable(1)
    late, good = job(deadline_ns=50), job()
    add(batcher, late, good)
    assert take(batcher, 50) == [good]
    assert len(batcher) == 0
    assert batcher.take_expired() == [late]
    assert batcher.take_expired() == []


def test_a_job_expires_in_a_lane_that_cannot_run() -> None:
    batcher = Batcher()
    late = job(deadline_ns=5 * SWEEP_NS)
    add(batcher, late)
    assert batcher.wake_ns() == 5 * SWEEP_NS
    assert batcher.next(5 * SWEEP_NS) is None
    assert batcher.take_expired() == [late]
    assert len(batcher) == 0
    assert batcher.cancel(late.request_id, 0) is None


# --- between lanes ------------------------------------------------------------------------------
def test_a_lane_that_cannot_run_holds_up_no_other() -> None:
    batcher = runnable(2)
    add(batcher, job(1))
    other = job(2)
    add(batcher, other)
    assert take(batcher) == [other]
    assert take(batcher) == []
    batcher.set_runnable(1, True, 0)
    assert len(take(batcher)) == 1


def test_lanes_take_turns() -> None:
    batcher = runnable(1, 2, rows_max=1)
    add(batcher, *(job(1) for _ in range(3)), *(job(2) for _ in range(3)))
    assert [take(batcher)[0].slot for _ in range(6)] == [1, 2, 1, 2, 1, 2]


def shares(batcher: Batcher, costs: dict[int, int], batches: int) -> dict[int, int]:
    """Keep all lanes full, run, and return the compute time that each slot got."""
    got = dict.fromkeys(costs, 0)
    for slot in costs:
        add(batcher, job(slot), job(slot))
    for _ in range(batches):
        batch = batcher.next(0)
        assert batch is not None
        batcher.finish(batch, costs[batch.slot], 0)
        got[batch.slot] += costs[batch.slot]
        add(batcher, *(job(batch.slot) for _ in batch.jobs))
    return got


def test_a_heavy_model_gets_no_more_time_than_a_light_one() -> None:
    got = shares(runnable(1, 2, rows_max=1), {1: 50 * MS, 2: MS}, 1000)
    assert got[1] == pytest.approx(got[2], rel=0.1)


def test_time_is_shared_by_weight() -> None:
    batcher = runnable(1, rows_max=1, weight=3)
    batcher.configure(2, Limits())
    batcher.set_runnable(2, True, 0)
    got = shares(batcher, {1: 2 * MS, 2: MS}, 1000)
    assert got[1] == pytest.approx(3 * got[2], rel=0.05)


def test_time_that_nobody_else_wanted_is_not_held_against_a_lane() -> None:
    batcher = runnable(1, 2, rows_max=1)
    for _ in range(100):
        add(batcher, job(1))
        take(batcher, cost_ns=1000 * MS)
    assert take(batcher) == []
    got = shares(batcher, {1: MS, 2: MS}, 10)
    assert got[1] == pytest.approx(got[2], abs=2 * MS)


def test_a_lane_that_was_away_has_no_claim_to_the_time_it_missed() -> None:
    batcher = runnable(1, 2, rows_max=1)
    shares(batcher, {1: MS}, 1000)
    got = shares(batcher, {2: MS, 1: MS}, 10)
    assert got[1] == pytest.approx(got[2], abs=2 * MS)


def test_a_higher_class_goes_first() -> None:
    batcher = runnable(1)
    batcher.configure(2, Limits(priority=5))
    batcher.set_runnable(2, True, 0)
    add(batcher, job(1), job(2))
    assert [take(batcher)[0].slot, take(batcher)[0].slot] == [2, 1]


def test_a_lower_class_is_slowed_and_not_starved() -> None:
    batcher = runnable(1, rows_max=1)
    batcher.configure(2, Limits(priority=5))
    batcher.set_runnable(2, True, 0)
    got = shares(batcher, {1: 7 * MS, 2: MS}, 1000)
    assert got[2] == pytest.approx(LOWER_SHARE * got[1], rel=0.1)


# --- leaving ------------------------------------------------------------------------------------
def test_a_batch_that_is_put_back_comes_again_in_the_same_order() -> None:
    batcher = runnable(1, rows_max=2)
    jobs = [job(deadline_ns=100) for _ in range(4)]
    add(batcher, *jobs)
    batch = batcher.next(0)
    assert batch is not None
    batcher.put_back(batch, 0)
    batcher.set_runnable(1, False, 0)
    assert take(batcher) == []
    batcher.set_runnable(1, True, 0)
    assert [take(batcher), take(batcher)] == [jobs[:2], jobs[2:]]


def test_a_cancelled_job_leaves_and_does_not_run() -> None:
    batcher = runnable(1)
    gone, stays = job(), job()
    add(batcher, gone, stays)
    assert batcher.cancel(gone.request_id, 0) is gone
    assert batcher.cancel(gone.request_id, 0) is None
    assert take(batcher) == [stays]


def test_a_lost_link_takes_its_jobs_and_no_others() -> None:
    batcher = runnable(1, 2)
    mine, other, parked = job(link=7), job(link=8), job(3, link=7)
    add(batcher, mine, other, parked)
    assert set(batcher.drop_link(7, 0)) == {mine, parked}
    assert take(batcher) == [other]
    assert batcher.waiting(3) == 0


def test_a_removed_lane_gives_its_jobs_back() -> None:
    batcher = runnable(1)
    one = job()
    add(batcher, one)
    assert batcher.remove(1) == [one]
    assert take(batcher) == []
    assert len(batcher) == 0


# --- lanes that share batches -------------------------------------------------------------------
class Rooms:
    """Versions that may share batches of so many requests."""

    def __init__(self, room: int) -> None:
        self.size = room

    def room(self, form: Form) -> int:
        return self.size


FORM = Form((), 1, 4, 1, (), 64)
OTHER = Form((), 1, 4, 2, (), 64)


def mixable(rooms: Rooms, *slots: int, **limits: int) -> Batcher:
    batcher = runnable(*slots, **limits)
    for slot in slots:
        batcher.set_family(slot, rooms)
    return batcher


def like(slot: int, form: Form = FORM, **fields: object) -> Job:
    return job(slot, form=form, shape_key=form.key, **fields)


def parts(batch: Batch | None) -> dict[int, int]:
    """How many jobs of which slots are in a batch."""
    assert batch is not None
    return {slot: len(jobs) for slot, jobs in ((batch.slot, batch.jobs), *batch.others)}


def test_due_lanes_of_a_family_share_a_batch() -> None:
    batcher = mixable(Rooms(8), 1, 2, 3)
    add(batcher, like(1), like(2), like(2), like(3))
    batch = batcher.next(0)
    assert parts(batch) == {1: 1, 2: 2, 3: 1}
    assert batch is not None
    batcher.finish(batch, 4 * MS, 0)
    assert len(batcher) == 0
    assert batcher.next(0) is None


def test_a_batch_has_no_more_than_there_is_room_for() -> None:
    batcher = mixable(Rooms(3), 1, 2, 3, 4)
    add(batcher, like(1), like(2), like(3), like(4))
    first = batcher.next(0)
    assert parts(first) == {1: 1, 2: 1, 3: 1}
    assert first is not None
    batcher.finish(first, MS, 0)
    assert parts(batcher.next(0)) == {4: 1}


def test_who_cannot_share_runs_alone() -> None:
    batcher = mixable(Rooms(8), 1, 2, 3, 4)
    batcher.set_family(4, Rooms(8))
    batcher.set_runnable(3, False, 0)
    add(batcher, like(1), like(2, alone=True), like(3), like(4))
    seen = []
    while (batch := batcher.next(0)) is not None:
        seen.append(parts(batch))
        batcher.finish(batch, MS, 0)
    assert seen == [{1: 1}, {2: 1}, {4: 1}]


def test_another_form_waits_for_its_own_turn() -> None:
    batcher = mixable(Rooms(8), 1, 2, 3)
    add(batcher, like(1), like(2, OTHER), like(3))
    first = batcher.next(0)
    assert parts(first) == {1: 1, 3: 1}
    assert first is not None
    batcher.finish(first, MS, 0)
    assert parts(batcher.next(0)) == {2: 1}


def test_a_lane_with_many_jobs_runs_alone() -> None:
    batcher = mixable(Rooms(64), 1, 2, rows_max=64)
    add(batcher, like(1), *(like(2) for _ in range(LANE_JOBS_MAX + 1)))
    first = batcher.next(0)
    assert parts(first) == {1: 1}
    assert first is not None
    batcher.finish(first, MS, 0)
    assert parts(batcher.next(0)) == {2: LANE_JOBS_MAX + 1}


def test_each_lane_is_charged_its_share() -> None:
    batcher = mixable(Rooms(4), 1, 2)
    batcher.configure(3, Limits(rows_max=4))
    batcher.set_runnable(3, True, 0)
    add(batcher, like(1), like(2), job(3))
    mixed = batcher.next(0)
    assert parts(mixed) == {1: 1, 2: 1}
    assert mixed is not None
    batcher.finish(mixed, 10 * MS, 0)
    # Two half shares were used; who has used nothing comes first, then both others as before.
    add(batcher, like(1))
    assert take(batcher, cost_ns=6 * MS)[0].slot == 3
    add(batcher, job(3))
    assert [take(batcher)[0].slot, take(batcher)[0].slot] == [1, 3]


def test_a_lane_that_ran_in_anothers_batch_gets_a_new_place() -> None:
    batcher = mixable(Rooms(4), 1, 2)
    for _ in range(50):
        add(batcher, like(1), like(2))
        batch = batcher.next(0)
        assert sorted(parts(batch)) == [1, 2]
        assert batch is not None
        batcher.finish(batch, MS, 0)
    assert batcher.next(0) is None


def test_versions_that_were_lost_wait_again_and_pay_nothing() -> None:
    batcher = mixable(Rooms(4), 1, 2)
    add(batcher, like(1), like(2))
    batch = batcher.next(0)
    assert batch is not None
    batcher.finish(batch, MS, 0, {2})
    assert batcher.waiting(1) == 0
    assert batcher.waiting(2) == 1
    assert parts(batcher.next(0)) == {2: 1}


def test_who_is_late_is_not_taken_along_and_is_answered() -> None:
    batcher = mixable(Rooms(4), 1, 2, 3)
    late = like(2, deadline_ns=5)
    add(batcher, like(1), late, like(3))
    assert parts(batcher.next(5)) == {1: 1, 3: 1}
    assert batcher.take_expired() == [late]
    assert batcher.waiting(2) == 0


def test_another_priority_is_not_taken_along() -> None:
    batcher = mixable(rooms := Rooms(4), 1, 2)
    batcher.configure(3, Limits(rows_max=4, priority=-1))
    batcher.set_runnable(3, True, 0)
    batcher.set_family(3, rooms)
    add(batcher, like(1), like(3), like(2))
    assert parts(batcher.next(0)) == {1: 1, 2: 1}


def test_lanes_that_are_gone_leave_nothing_behind_while_no_batch_is_shared() -> None:
    batcher = mixable(rooms := Rooms(1), 1)

    def known() -> int:
        gc.collect()
        return sum(isinstance(one, Turn) for one in gc.get_objects())

    before = known()
    for number in range(50):
        slot = 2 + number % 3
        batcher.configure(slot, Limits(rows_max=8))
        batcher.set_family(slot, rooms)
        batcher.set_runnable(slot, True, 0)
        add(batcher, like(slot), like(1))
        assert len(take(batcher)) == len(take(batcher)) == 1
        if number % 2:
            batcher.set_family(slot, None)
        batcher.remove(slot)
    assert known() == before


def test_a_lane_that_changes_its_family_is_taken_along_by_the_new_one_alone() -> None:
    old, new = Rooms(4), Rooms(4)
    batcher = mixable(old, 1, 2)
    batcher.configure(3, Limits(rows_max=8))
    batcher.set_runnable(3, True, 0)
    batcher.set_family(3, new)
    add(batcher, like(1), like(2), like(3))
    batcher.set_family(2, new)
    batcher.set_family(2, new)
    batch = batcher.next(0)
    assert parts(batch) == {1: 1}
    assert batch is not None
    batcher.finish(batch, MS, 0)
    assert parts(batcher.next(0)) == {2: 1, 3: 1}


def test_a_removed_lane_is_not_taken_along() -> None:
    batcher = mixable(Rooms(4), 1, 2)
    add(batcher, like(1), like(2))
    assert len(batcher.remove(2)) == 1
    assert parts(batcher.next(0)) == {1: 1}
