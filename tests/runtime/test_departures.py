"""Versions on their way out: who is waited for, how long, and what is released when."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from overcommit.runtime.config import RETIRE_GRACE_S
from overcommit.runtime.departures import ASK_NS, ASKED_MAX, Departures
from overcommit.runtime.front_end_messages import AskUsed, Used
from overcommit.runtime.residents import Usage

SECOND = 1_000_000_000
GRACE = int(RETIRE_GRACE_S * SECOND)
LIMIT = 60 * SECOND
UNUSED = Usage(waiting=0, uses=0, last_used_ns=0, leases=0)


@dataclass
class Front:
    """A front end that is asked."""

    index: int
    asked: list[AskUsed] = field(default_factory=list)

    @property
    def incarnation(self) -> tuple[int, int]:
        return self.index, 1

    def post(self, message: AskUsed) -> None:
        self.asked.append(message)


class World:
    """Workers' pages, front ends, and what became of each slot."""

    def __init__(self, fronts: int = 1) -> None:
        self.fronts = [Front(index) for index in range(fronts)]
        self.usages: dict[int, Usage] = {}
        self.ended: dict[int, bool] = {}  # -> whether it was late
        self.released: list[int] = []
        self.departures = Departures(
            LIMIT,
            lambda slot: self.usages.get(slot, UNUSED),
            lambda: self.fronts,
            self._end,
            self.released.append,
        )

    def _end(self, slot: int, is_late: bool, now_ns: int) -> None:
        assert slot not in self.ended, "it is ended once"
        self.ended[slot] = is_late

    def answer(self, front: int, *used: int, now_ns: int) -> None:
        number = self.fronts[front].asked[-1].id
        self.departures.on_used(self.fronts[front], Used(id=number, slots=used), now_ns)

    def asked(self, front: int = 0) -> list[tuple[int, ...]]:
        return [each.slots for each in self.fronts[front].asked]


def test_who_is_unused_goes_after_its_grace_when_every_front_end_has_said_so() -> None:
    world = World(fronts=2)
    world.departures.add(7, 0)
    world.departures.step(GRACE - 1)
    assert world.asked() == []
    world.departures.step(GRACE)
    world.departures.step(GRACE + 1)  # one question at a time
    assert world.asked(0) == world.asked(1) == [(7,)]
    world.answer(0, now_ns=GRACE)
    world.answer(0, now_ns=GRACE)
    assert (world.ended, world.released, len(world.departures)) == ({}, [], 1)
    world.answer(1, now_ns=GRACE)
    assert (world.ended, world.released, len(world.departures)) == ({7: False}, [7], 0)


def test_nobody_is_asked_about_what_a_worker_has() -> None:
    world = World()
    world.departures.add(7, 0)
    for usage in (Usage(1, 0, 0, 0), Usage(0, 0, 0, 1)):
        world.usages[7] = usage
        world.departures.step(GRACE)
        assert world.asked() == []
    world.usages.clear()
    world.departures.step(GRACE)
    world.usages[7] = Usage(1, 0, 0, 0)  # its worker has looked into its ring
    world.answer(0, now_ns=GRACE)
    assert world.released == []


def test_what_a_front_end_needs_is_asked_about_again_behind_all_others() -> None:
    world = World()
    for slot in (1, 2):
        world.departures.add(slot, 0)
    world.departures.step(GRACE)
    world.answer(0, 1, now_ns=GRACE)
    assert world.released == [2]
    world.departures.add(3, 0)
    world.departures.step(GRACE + ASK_NS - 1)
    assert len(world.asked()) == 1
    world.departures.step(GRACE + ASK_NS)
    assert world.asked()[1] == (1, 3)
    world.answer(0, now_ns=GRACE + ASK_NS)
    assert world.released == [2, 1, 3]


def test_a_dead_front_end_needs_nothing_and_without_any_nobody_is_asked() -> None:
    world = World(fronts=2)
    world.departures.add(7, 0)
    world.departures.step(GRACE)
    world.answer(0, now_ns=GRACE)
    world.departures.on_front_end_gone(world.fronts[1], GRACE)
    assert world.released == [7]
    none = World(fronts=0)
    none.departures.add(7, 0)
    none.departures.step(GRACE)
    assert none.released == [7]


def test_after_the_time_of_all_requests_it_is_ended_and_its_slot_is_kept_while_it_is_used() -> None:
    world = World()
    world.departures.add(7, 0)
    world.departures.step(GRACE)  # a front end that never answers this
    world.departures.step(GRACE + LIMIT - 1)
    assert world.ended == {}
    world.departures.step(GRACE + LIMIT)
    assert (world.ended, world.released) == ({7: True}, [])
    world.departures.step(GRACE + 2 * LIMIT)
    world.answer(0, now_ns=GRACE + 2 * LIMIT)
    assert (world.ended, world.released) == ({7: True}, [7])


def test_an_answer_to_another_question_says_nothing() -> None:
    world = World()
    world.departures.add(7, 0)
    world.departures.step(GRACE)
    world.departures.on_used(world.fronts[0], Used(id=99), GRACE)
    assert world.released == []


def test_a_question_fits_a_message_however_many_leave() -> None:
    world = World()
    for slot in range(ASKED_MAX + 1):
        world.departures.add(slot, 0)
    world.departures.step(GRACE)
    assert world.asked() == [tuple(range(ASKED_MAX))]
    world.answer(0, now_ns=GRACE)
    world.departures.step(GRACE)
    assert world.asked()[1] == (ASKED_MAX,)


class DeparturesMachine(RuleBasedStateMachine):
    """Random requests, answers and deaths: nobody is ended too early, and nobody stays for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(fronts=2)
        self.now_ns = 0
        self.count = 0
        self.needed: dict[int, set[int]] = {0: set(), 1: set()}  # front end -> slots
        self.began: dict[int, int] = {}

    @rule(front=st.sampled_from([0, 1]), is_needed=st.booleans())
    def leave(self, front: int, is_needed: bool) -> None:
        self.count += 1
        if is_needed:
            self.needed[front].add(self.count)
        self.began[self.count] = self.now_ns
        self.world.departures.add(self.count, self.now_ns)

    @rule(front=st.sampled_from([0, 1]))
    def finish(self, front: int) -> None:
        if self.needed[front]:
            self.needed[front].pop()

    @rule(front=st.sampled_from([0, 1]))
    def answer(self, front: int) -> None:
        fronts = self.world.fronts
        if fronts[front].asked:
            asked = fronts[front].asked[-1].slots
            self.world.answer(front, *self.needed[front].intersection(asked), now_ns=self.now_ns)

    @rule(step_ns=st.sampled_from([ASK_NS, GRACE, LIMIT // 4]))
    def go_on(self, step_ns: int) -> None:
        self.now_ns += step_ns
        self.world.departures.step(self.now_ns)

    @invariant()
    def only_the_unused_or_the_late_are_ended(self) -> None:
        needed = self.needed[0] | self.needed[1]
        assert not needed.intersection(self.world.released)
        for slot in needed.intersection(self.world.ended):
            assert self.world.ended[slot]
            assert self.now_ns >= self.began[slot] + GRACE + LIMIT
        assert len(self.world.departures) == self.count - len(self.world.released)

    def teardown(self) -> None:
        self.needed = {0: set(), 1: set()}
        for _ in range(3):
            self.now_ns += GRACE
            self.world.departures.step(self.now_ns)
            self.answer(0)
            self.answer(1)
        assert sorted(self.world.released) == list(range(1, self.count + 1))


TestDeparturesMachine = DeparturesMachine.TestCase
TestDeparturesMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
