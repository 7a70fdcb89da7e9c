"""The sequences of a version: slots, order, what is refused; against a model that keeps plain lists."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from overcommit.runtime.config import NEVER_NS
from overcommit.runtime.errors import BadRequest, ProtocolError, WorkerLost
from overcommit.runtime.lanes import Job, Limits
from overcommit.runtime.sequence_lane import SequenceLane
from overcommit.runtime.sequence_terms import (
    ASK_BYTES,
    ASK_ROOM_BYTES,
    Ask,
    decode,
    encode,
    mark_again,
)
from overcommit.runtime.sequences import AskForm, Sequences, ask_of

IDLE_NS = 1000
_ids = iter(range(1, 1_000_000))


def job(
    key: int | str = 1,
    *,
    start: bool = False,
    end: bool = False,
    now: int = 0,
    deadline: int = NEVER_NS,
    shape: int = 0,
    again: bool = False,
    alone: bool = False,
) -> Job:
    form = AskForm((), 1, 8, shape, (), 0, Ask(key, start, end, again, now))
    return Job(
        *(next(_ids), 0, 0, deadline, now), alone=alone, shape_key=shape, form=form, row_bytes=8
    )


def lane_with(
    slots: int, *, delay_ns: int = 0, is_direct: bool = True
) -> tuple[Sequences, SequenceLane]:
    sequences = Sequences("m", slots, IDLE_NS)
    limits = Limits(rows_max=slots, delay_ns=1 + delay_ns)
    return sequences, SequenceLane(0, limits, sequences, full_rows=slots, is_direct=is_direct)


def run(sequences: Sequences, lane: SequenceLane, now: int = 0) -> list[Job]:
    """Take a batch and have it run."""
    late: list[Job] = []
    jobs = lane.take(now, late)
    assert not late
    for each in jobs:
        sequences.settle(each, now, is_ok=True)
    return jobs


# --- the ask ------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", [1, 2**64 - 1, "a", "é" * 64])
def test_an_ask_is_read_as_it_was_written(key: int | str) -> None:
    for flags in range(4):
        ask = Ask(key, bool(flags & 1), bool(flags & 2))
        assert decode(encode(ask)) == ask


def test_a_number_and_its_digits_are_different_sequences() -> None:
    assert decode(encode(Ask(7))).key != decode(encode(Ask("7"))).key


def test_an_ask_that_is_none_breaks_the_protocol() -> None:
    wrong = (b"\1\3\1\0", b"\1\1\2\0", b"\1\2\0\0", b"\0\2\1\0" + bytes(12) + b"\xff")
    for data in (b"", bytes(ASK_BYTES), *(head.ljust(ASK_BYTES, b"\0") for head in wrong)):
        with pytest.raises(ProtocolError):
            decode(data)


def test_a_block_says_that_its_request_has_run() -> None:
    block = bytearray(64 + ASK_ROOM_BYTES)
    block[64 : 64 + ASK_BYTES] = encode(Ask(7, is_end=True))
    mark_again(memoryview(block))
    assert decode(block[64 : 64 + ASK_BYTES]) == Ask(7, is_end=True, is_again=True)


# --- rules --------------------------------------------------------------------------------------
def test_requests_of_one_sequence_run_one_after_the_other_in_their_order() -> None:
    sequences, lane = lane_with(4)
    jobs = [job(start=True), job(), job(end=True)]
    for each in jobs:
        lane.push(each)
    assert [run(sequences, lane) for _ in jobs] == [[each] for each in jobs]
    assert not len(sequences)


def test_requests_of_different_sequences_share_a_batch() -> None:
    sequences, lane = lane_with(4)
    jobs = [job(key, start=True) for key in (5, 6, 7)]
    for each in jobs:
        lane.push(each)
    assert run(sequences, lane) == jobs
    assert [each.slot for each in sequences.runs()] == [0, 1, 2]


def test_other_shapes_and_who_runs_alone_have_batches_of_their_own() -> None:
    sequences, lane = lane_with(4)
    jobs = [job(1, start=True), job(2, start=True, shape=9), job(3, start=True, alone=True)]
    for each in jobs:
        lane.push(each)
    assert [run(sequences, lane) for _ in jobs] == [[each] for each in jobs]


def test_a_sequence_without_a_slot_waits_for_the_end_of_another() -> None:
    sequences, lane = lane_with(1)
    first, second, last = job(1, start=True), job(2, start=True), job(1, end=True)
    lane.push(first)
    lane.push(second)
    assert run(sequences, lane) == [first]
    assert not lane.is_full
    lane.push(last)
    assert run(sequences, lane) == [last]
    assert run(sequences, lane) == [second]


def test_an_idle_sequence_gives_its_slot_to_one_that_waits() -> None:
    sequences, lane = lane_with(1)
    lane.push(job(1, start=True))
    run(sequences, lane, now=50)
    second = job(2, start=True, now=60)
    lane.push(second)
    assert lane.due_ns() == 50 + IDLE_NS
    assert run(sequences, lane, now=49 + IDLE_NS) == []
    assert run(sequences, lane, now=50 + IDLE_NS) == [second]
    with pytest.raises(BadRequest, match="must specify the START flag"):
        sequences.check(Ask(1, sent_ns=50 + IDLE_NS), 50 + IDLE_NS)


def test_a_request_that_was_sent_in_time_finds_its_sequence_however_late_it_is_read() -> None:
    sequences, lane = lane_with(1)
    lane.push(job(1, start=True))
    run(sequences, lane)
    sequences.check(Ask(1, sent_ns=IDLE_NS - 1), 100 * IDLE_NS)
    with pytest.raises(BadRequest):
        sequences.check(Ask(1, sent_ns=IDLE_NS), 100 * IDLE_NS)


def test_a_sequence_that_finds_no_slot_in_time_is_refused_whole() -> None:
    sequences, lane = lane_with(1)
    lane.push(job(1, start=True))
    run(sequences, lane)
    jobs = [job(2, start=True, deadline=400), job(2, deadline=10**9)]
    for each in jobs:
        lane.push(each)
    late: list[Job] = []
    lane.expire(399, late)
    assert late == jobs, "it is told before its front end gives up"
    assert set(sequences.refused) == {each.request_id for each in jobs}
    assert "timeout of the corresponding sequence" in sequences.refused[jobs[0].request_id]
    assert lane.count == 0


def test_who_was_put_back_runs_before_who_came_later() -> None:
    sequences, lane = lane_with(2)
    jobs = [job(start=True), job()]
    for each in jobs:
        lane.push(each)
    late: list[Job] = []
    assert lane.take(0, late) == jobs[:1]
    lane.push(jobs[0])
    assert run(sequences, lane) == jobs[:1]
    assert run(sequences, lane) == jobs[1:]


def test_without_its_first_request_the_rest_of_a_sequence_is_refused() -> None:
    sequences, lane = lane_with(2)
    lane.push(job(start=True, deadline=100))
    rest = job()
    lane.push(rest)
    late: list[Job] = []
    lane.expire(100, late)
    assert len(late) == 1
    assert lane.take(100, late) == [rest]
    refusal = sequences.refusal(rest)
    assert isinstance(refusal, BadRequest)
    assert "was not run" in refusal.message


def test_what_a_model_kept_itself_is_lost_with_its_incarnation() -> None:
    sequences, lane = lane_with(2)
    sequences.meet(1, keeps_own_state=True)
    lane.push(job(start=True))
    run(sequences, lane)
    sequences.meet(2, keeps_own_state=True)
    late: list[Job] = []
    lane.push(job())
    (taken,) = lane.take(0, late)
    assert isinstance(sequences.refusal(taken), WorkerLost)
    sequences.settle(taken, 0, is_ok=False)
    lane.push(job(start=True))
    (taken,) = lane.take(0, late)
    assert sequences.refusal(taken) is None


def test_states_that_are_kept_here_outlive_the_models_incarnation() -> None:
    sequences, lane = lane_with(2)
    sequences.meet(1, keeps_own_state=False)
    lane.push(job(start=True))
    run(sequences, lane)
    sequences.meet(2, keeps_own_state=False)
    late: list[Job] = []
    lane.push(job())
    (taken,) = lane.take(0, late)
    assert sequences.refusal(taken) is None


def test_a_lost_sequence_makes_room_for_one_that_waits() -> None:
    sequences, lane = lane_with(1)
    sequences.meet(1, keeps_own_state=True)
    lane.push(job(1, start=True))
    run(sequences, lane)
    sequences.meet(2, keeps_own_state=True)
    other = job(2, start=True)
    lane.push(other)
    assert run(sequences, lane) == [other]


def test_after_a_workers_death_who_is_not_known_is_said_to_be_lost_for_as_long_as_it_might_be() -> (
    None
):
    sequences = Sequences("m", 1, IDLE_NS, lost_until_ns=500)
    with pytest.raises(WorkerLost, match="sequence 3 is lost"):
        sequences.check(Ask(3), 499)
    sequences.check(Ask(3, is_start=True), 499)
    with pytest.raises(BadRequest):
        sequences.check(Ask(3), 500)


def test_an_answer_that_is_asked_for_again_belongs_to_no_sequence() -> None:
    sequences, lane = lane_with(1)
    again = job(5, end=True, again=True)
    sequences.check(ask_of(again), 0)
    lane.push(again)
    late: list[Job] = []
    assert lane.take(0, late) == [again]
    assert sequences.run_of(again) is None
    sequences.settle(again, 0, is_ok=True)
    assert not len(sequences)


def test_with_a_delay_a_batch_waits_until_enough_slots_are_ready() -> None:
    _, lane = lane_with(2, delay_ns=500)
    lane.push(job(1, start=True, now=100))
    assert not lane.is_full
    assert lane.due_ns() == 600
    lane.push(job(2, start=True, now=150))
    assert lane.is_full


# --- against a model ----------------------------------------------------------------------------
class Machine(RuleBasedStateMachine):
    """Clients of a few sequences send, cancel and wait; a worker takes, runs, fails and puts back."""

    @initialize(slots=st.integers(1, 3), is_direct=st.booleans())
    def begin(self, slots: int, is_direct: bool) -> None:
        self.now = 0
        self.sequences, self.lane = lane_with(slots, is_direct=is_direct)
        self.waiting: dict[int, list[Job]] = {}  # as they were sent
        self.out: list[Job] = []
        self.begun: set[int] = set()  # STARTs that ran, without an END since
        self.open: dict[int, bool] = {}  # what a client believes: may go on

    @rule(key=st.integers(1, 5), start=st.booleans(), end=st.booleans(), left=st.integers(1, 5000))
    def send(self, key: int, start: bool, end: bool, left: int) -> None:
        each = job(key, start=start, end=end, now=self.now, deadline=self.now + left)
        try:
            self.sequences.check(ask_of(each), self.now)
        except BadRequest:
            assert not start
            return
        self.lane.push(each)
        self.waiting.setdefault(key, []).append(each)

    @precondition(lambda self: not self.out)
    @rule()
    def take(self) -> None:
        late: list[Job] = []
        jobs = self.lane.take(self.now, late)
        self._gone(late)
        assert all(each.deadline_ns > self.now for each in jobs)
        keys = [ask_of(each).key for each in jobs]
        assert len(set(keys)) == len(keys)
        for each in jobs:
            key: Any = ask_of(each).key
            assert self.waiting[key].pop(0) is each, "in the order of their coming"
        self.out = jobs

    @precondition(lambda self: bool(self.out))
    @rule(is_ok=st.booleans())
    def finish(self, is_ok: bool) -> None:
        for each in self.out:
            ask = ask_of(each)
            key: Any = ask.key
            refusal = self.sequences.refusal(each)
            assert (refusal is None) == (ask.is_start or key in self.begun)
            self.sequences.settle(each, self.now, is_ok=is_ok and refusal is None)
            if ask.is_start:
                (self.begun.add if is_ok else self.begun.discard)(key)
            if ask.is_end:
                self.begun.discard(key)
        self.out = []

    @precondition(lambda self: bool(self.out))
    @rule()
    def put_back(self) -> None:
        for each in self.out:
            key: Any = ask_of(each).key
            self.lane.push(each)
            self.waiting[key].insert(0, each)
        self.out = []

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        jobs = [each for mine in self.waiting.values() for each in mine]
        if jobs:
            chosen = data.draw(st.sampled_from(jobs))
            assert self.lane.remove(lambda each: each is chosen) == [chosen]
            self._gone([chosen])

    @rule(step=st.integers(1, 2000))
    def wait(self, step: int) -> None:
        self.now += step

    @precondition(lambda self: not self.out)
    @rule()
    def expire(self) -> None:
        late: list[Job] = []
        self.lane.expire(self.now, late)
        self._gone(late)

    def _gone(self, jobs: list[Job]) -> None:
        for each in jobs:
            key: Any = ask_of(each).key
            self.waiting[key].remove(each)

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "sequences"):
            return
        self.sequences.check_invariants()
        assert self.lane.count == sum(map(len, self.waiting.values()))
        known = {run.key: run for run in self.sequences.runs()}
        for key in list(self.begun):
            if key not in known:
                self.begun.discard(key)  # it was idle for too long
        for key in self.begun:
            assert known[key].begun
        if self.sequences.ready_count:
            assert self.lane.due_ns() == 0
        elif self.lane.count and not self.out:
            assert self.lane.due_ns() < NEVER_NS, "somebody waits: it will be looked at again"


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
