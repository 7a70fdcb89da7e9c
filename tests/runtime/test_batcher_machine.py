"""The batcher against a dict of jobs that wait: each leaves once, in time, in a batch it fits."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from overcommit.runtime.batcher import SWEEP_NS, Batcher
from overcommit.runtime.lanes import Batch, Job, Limits
from overcommit.runtime.signature import Form

_ids = itertools.count(1)
ROOM = 5


class Rooms:
    """Slots 0 and 2 may share batches, and so may 1 and 3."""

    def room(self, form: Form) -> int:
        return ROOM


class BatcherMachine(RuleBasedStateMachine):
    """The batcher against a set of jobs that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.batcher = Batcher()
        self.now_ns = 0
        self.waiting: dict[int, Job] = {}
        self.can_run: set[int] = set()
        self.delays: dict[int, int] = {}
        self.out: Batch | None = None
        families = Rooms(), Rooms()
        for slot in range(4):
            self.delays[slot] = 1000 * (slot == 3)
            limits = Limits(
                rows_max=4,
                delay_ns=self.delays[slot],
                jobs_max=6,
                priority=slot % 2,
                weight=1 + slot,
            )
            self.batcher.configure(slot, limits)
            self.batcher.set_family(slot, families[slot % 2])

    def running(self, slot: int) -> int:
        """How many jobs of a slot are in the batch that is out."""
        return sum(one.slot == slot for one in self.jobs_out())

    def jobs_out(self) -> list[Job]:
        """The jobs of the batch that is out."""
        if self.out is None:
            return []
        return [*self.out.jobs, *(one for _, jobs in self.out.others for one in jobs)]

    def wait_in(self, slot: int) -> list[Job]:
        return [one for one in self.waiting.values() if one.slot == slot]

    @rule(
        slot=st.integers(0, 3),
        key=st.sampled_from("ab"),
        rows=st.integers(1, 6),
        link=st.integers(0, 1),
        timeout_ns=st.sampled_from((10, 10_000, 10_000_000)),
        alone=st.booleans(),
    )
    def add(self, slot: int, key: str, rows: int, link: int, timeout_ns: int, alone: bool) -> None:
        one = Job(
            *(next(_ids), slot, link, self.now_ns + timeout_ns, self.now_ns),
            shape_key=key,
            form=Form((), rows, 4, ord(key), (), 0),
            rows=rows,
            alone=alone,
        )
        was_full = len(self.wait_in(slot)) - self.running(slot) >= 6
        assert self.batcher.add(one, self.now_ns) == (not was_full)
        if not was_full:
            self.waiting[one.request_id] = one

    @rule(step_ns=st.sampled_from((1, 500, 5_000, 3_000_000)))
    def wait(self, step_ns: int) -> None:
        self.now_ns += step_ns

    @rule(slot=st.integers(0, 3), can_run=st.booleans())
    def set_runnable(self, slot: int, can_run: bool) -> None:
        self.batcher.set_runnable(slot, can_run, self.now_ns)
        (self.can_run.add if can_run else self.can_run.discard)(slot)

    @precondition(lambda self: self.out is None)
    @rule()
    def next(self) -> None:
        batch = self.batcher.next(self.now_ns)
        for late in self.batcher.take_expired():
            assert late.deadline_ns <= self.now_ns
            del self.waiting[late.request_id]
        if batch is None:
            due = [
                one
                for one in self.waiting.values()
                if one.slot in self.can_run and self.now_ns >= one.taken_ns + self.delays[one.slot]
            ]
            assert not due, "a due lane was left"
            return
        self.out = batch
        assert batch.slot in self.can_run
        assert batch.jobs
        jobs = self.jobs_out()
        assert all(self.waiting[one.request_id] is one for one in jobs)
        assert all(one.deadline_ns > self.now_ns for one in jobs)
        assert len({one.shape_key for one in jobs}) == 1
        assert len(jobs) == 1 or not any(one.alone for one in jobs)
        for slot, mine in ((batch.slot, batch.jobs), *batch.others):
            assert {one.slot for one in mine} == {slot}
            assert slot in self.can_run
            assert len(mine) == 1 or sum(one.rows for one in mine) <= 4
        if batch.others:
            assert len(jobs) <= ROOM
            assert len({one.rows for one in jobs}) == 1
            assert {slot % 2 for slot, _ in batch.others} == {batch.slot % 2}
        first = min(one.deadline_ns for one in self.wait_in(batch.slot))
        assert batch.jobs[0].deadline_ns == first

    @precondition(lambda self: self.out is not None)
    @rule(cost_ns=st.integers(0, 10_000_000), lost=st.sets(st.integers(0, 3)))
    def finish(self, cost_ns: int, lost: set[int]) -> None:
        assert self.out is not None
        self.batcher.finish(self.out, cost_ns, self.now_ns, lost)
        for one in self.jobs_out():
            if one.slot not in lost:
                del self.waiting[one.request_id]
        self.out = None

    @precondition(lambda self: self.out is not None)
    @rule()
    def put_back(self) -> None:
        assert self.out is not None
        self.batcher.put_back(self.out, self.now_ns)
        self.out = None

    @precondition(lambda self: self.out is None)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.waiting:
            return
        request_id = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.batcher.cancel(request_id, self.now_ns) is self.waiting.pop(request_id)

    @precondition(lambda self: self.out is None)
    @rule(slot=st.integers(0, 3))
    def drain(self, slot: int) -> None:
        assert set(self.batcher.drain(slot, self.now_ns)) == set(self.wait_in(slot))
        self.waiting = {k: v for k, v in self.waiting.items() if v.slot != slot}

    @precondition(lambda self: self.out is None)
    @rule(link=st.integers(0, 1))
    def drop_link(self, link: int) -> None:
        mine = {one for one in self.waiting.values() if one.link == link}
        assert set(self.batcher.drop_link(link, self.now_ns)) == mine
        self.waiting = {k: v for k, v in self.waiting.items() if v.link != link}

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.batcher) == len(self.waiting)
        for slot in range(4):
            assert self.batcher.waiting(slot) == len(self.wait_in(slot)) - self.running(slot)

    @invariant()
    def something_that_waits_wakes_the_worker(self) -> None:
        deadlines = [one.deadline_ns for one in self.waiting.values()]
        if deadlines and self.out is None:
            wake_ns = self.batcher.wake_ns()
            assert wake_ns is not None
            assert wake_ns <= max(min(deadlines), self.now_ns) + SWEEP_NS


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
