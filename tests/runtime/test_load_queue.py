"""Whose turn it is among loads: in turns, foreground first, bounded, and nobody is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from hypothesis.strategies import integers, sampled_from
from mover_rig import Memory, make_image

from overcommit.runtime.config import MIB, READ_BYTES, READS_IN_FLIGHT
from overcommit.runtime.load_queue import LoadQueue
from overcommit.runtime.loading import LoadState, Outcome, State, Step, Work
from overcommit.runtime.mover_messages import Load, Urgency
from overcommit.runtime.places import Base
from overcommit.runtime.prefetch_limits import PREFETCH_READS_IN_FLIGHT

ARENA = Base("device", 1 << 40, 1 << 36)  # never touched: steps are not run here
HOST = Base("host", 1 << 41, 1 << 36)


def a_load(
    job: int, pieces: int, urgency: Urgency = "foreground", source: str = "disk"
) -> LoadState:
    places = ((0, 1 << 36),)
    load = Load(
        job=job,
        slot=0,
        source=source,  # type: ignore[arg-type]
        path="/nowhere",
        nbytes=pieces * READ_BYTES,
        host=places if source == "host" else None,
        device=places,
        verify=False,
        urgency=urgency,
    )
    return LoadState(load, ARENA, HOST)


def opened(loads: LoadQueue, job: int, pieces: int, urgency: Urgency = "foreground") -> LoadState:
    """Add a load and open its file."""
    state = a_load(job, pieces, urgency)
    loads.add(state)
    step = state.take_read()
    assert step == Step(Work.OPEN)
    loads.finish(state, step, Outcome())
    return state


def take_reads(loads: LoadQueue, count: int = 1000) -> list[tuple[LoadState, Step]]:
    taken: list[tuple[LoadState, Step]] = []
    while len(taken) < count and (found := loads.try_take_read()) is not None:
        taken.append(found)
    return taken


def jobs(taken: list[tuple[LoadState, Step]]) -> list[int]:
    return [state.load.job for state, _ in taken]


def test_loads_of_one_urgency_take_turns_piece_by_piece() -> None:
    loads = LoadQueue()
    opened(loads, 1, 5)
    opened(loads, 2, 2)
    opened(loads, 3, 3)
    assert jobs(take_reads(loads)) == [1, 2, 3, 1, 2, 3, 1, 3, 1, 1]


def test_two_long_loads_never_starve_a_third() -> None:
    loads = LoadQueue()
    opened(loads, 1, 500)
    opened(loads, 2, 500)
    running = take_reads(loads, READS_IN_FLIGHT)
    third = a_load(3, 1)
    loads.add(third)
    # At the next step that ends, or the one after it, it is the third one's turn.
    loads.finish(*running[0], Outcome())
    assert 3 in jobs(take_reads(loads, 3))


def test_a_prefetch_reads_only_when_no_foreground_load_needs_the_disk() -> None:
    loads = LoadQueue()
    opened(loads, 1, 50, "prefetch")
    foreground = opened(loads, 2, 2)
    taken = take_reads(loads)
    assert jobs(taken) == [2, 2]
    assert loads.finish(*taken[0], Outcome()) is False
    assert take_reads(loads) == [], "its last read is on its way"
    assert loads.finish(*taken[1], Outcome())
    assert foreground.state is State.DONE
    assert jobs(take_reads(loads)) == [1] * PREFETCH_READS_IN_FLIGHT


def test_a_prefetch_may_read_while_a_foreground_load_copies() -> None:
    loads = LoadQueue()
    loads.add(a_load(1, 4, source="host"))
    opened(loads, 2, 4, "prefetch")
    assert jobs(take_reads(loads, 1)) == [2]


def test_foreground_copies_come_before_prefetched_ones() -> None:
    loads = LoadQueue()
    loads.add(a_load(1, 4, "prefetch", source="host"))
    first = loads.try_take_copy()
    assert first is not None
    assert first[0].load.job == 1
    loads.add(a_load(2, 1, source="host"))
    second = loads.try_take_copy()
    assert second is not None
    assert second[0].load.job == 2


def test_a_promoted_load_joins_the_foreground_with_what_it_has() -> None:
    loads = LoadQueue()
    state = opened(loads, 1, 50, "prefetch")
    opened(loads, 2, 50)
    loads.promote(1)
    assert state.urgency == "foreground"
    assert jobs(take_reads(loads, 4)) == [2, 1, 2, 1]
    loads.promote(77)  # over already
    assert len(take_reads(loads)) == 2 * READS_IN_FLIGHT - 4


def test_a_cancelled_load_leaves_and_the_others_go_on() -> None:
    loads = LoadQueue()
    opened(loads, 1, 5)
    ((state, step),) = take_reads(loads, 1)
    idle = opened(loads, 2, 5)
    opened(loads, 3, 2)
    assert loads.cancel(2) is idle
    assert loads.cancel(1) is None, "a step of it runs"
    assert loads.cancel(77) is None
    assert jobs(take_reads(loads)) == [3, 3]
    assert loads.finish(state, step, Outcome())
    assert len(loads) == 1


class QueueMachine(RuleBasedStateMachine):
    """Any order of loads, cancellations and promotions: bounds hold, and everything ends."""

    def __init__(self) -> None:
        super().__init__()
        self.loads = LoadQueue()
        self.states: dict[int, LoadState] = {}
        self.running: list[tuple[LoadState, Step]] = []

    @rule(
        pieces=integers(1, 12),
        urgency=sampled_from(["foreground", "prefetch"]),
        source=sampled_from(["disk", "host"]),
    )
    def add(self, pieces: int, urgency: Urgency, source: str) -> None:
        state = a_load(len(self.states), pieces, urgency, source)
        self.states[state.load.job] = state
        self.loads.add(state)

    @rule(which=integers(0, 99), read=sampled_from([True, False]))
    def take(self, which: int, read: bool) -> None:
        taken = self.loads.try_take_read() if read else self.loads.try_take_copy()
        if taken is not None:
            if taken[0].urgency == "prefetch" and read:
                others = [s for s in self.states.values() if s.urgency == "foreground"]
                assert not any(s.wants_disk and not s.is_over for s in others)
            self.running.append(taken)

    @rule(which=integers(0, 99), fails=sampled_from([False, False, False, True]))
    def finish(self, which: int, fails: bool) -> None:
        if self.running:
            state, step = self.running.pop(which % len(self.running))
            is_over = self.loads.finish(state, step, Outcome(error="broken" if fails else ""))
            assert is_over == state.is_over

    @rule(job=integers(0, 20))
    def cancel(self, job: int) -> None:
        state = self.loads.cancel(job)
        assert state is None or state.is_over

    @rule(job=integers(0, 20))
    def promote(self, job: int) -> None:
        self.loads.promote(job)

    @invariant()
    def no_step_of_a_load_that_is_over_runs(self) -> None:
        assert not any(state.is_over for state, _ in self.running)

    @invariant()
    def who_is_over_has_left_and_nobody_else(self) -> None:
        assert len(self.loads) == sum(not state.is_over for state in self.states.values())

    def teardown(self) -> None:
        while self.running or len(self.loads):
            taken = self.loads.try_take_read() or self.loads.try_take_copy()
            if taken is not None:
                self.running.append(taken)
            else:
                assert self.running, "a load is left that nobody can go on with"
                self.loads.finish(*self.running.pop(0), Outcome())
        assert all(state.is_over for state in self.states.values())


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory("device", 32 * MIB)
    yield made
    made.close()


def test_real_loads_end_whatever_their_order(memory: Memory, tmp_path: Path) -> None:
    loads = LoadQueue()
    base = Base("device", memory.address, memory.arena.nbytes)
    payloads = {}
    for job in range(3):
        path = tmp_path / f"{job}.image"
        payloads[job] = make_image(path, (1 + job % 2) * READ_BYTES - job, job)
        places = ((job * 8 * MIB, 8 * MIB), (24 * MIB, 8 * MIB))
        load = Load(
            job=job,
            slot=0,
            source="disk",
            path=str(path),
            nbytes=len(payloads[job]),
            device=places,
        )
        loads.add(LoadState(load, base, None))
    while (taken := loads.try_take_read() or loads.try_take_copy()) is not None:
        state, step = taken
        if loads.finish(state, step, state.run(step)):
            assert state.close().ok
    assert len(loads) == 0
    for job, payload in payloads.items():
        first = payload[:READ_BYTES]
        assert memory.view[job * 8 * MIB :][: len(first)] == first
