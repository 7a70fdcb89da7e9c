"""The life of a seat."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime import seats as module
from overcommit.runtime.config import (
    RESTART_BACKOFF_S,
    RESTART_BUDGET,
    RESTART_WINDOW_S,
    START_TIMEOUT_S,
)
from overcommit.runtime.seats import EPOCH_MAX, LIVED_S, Seat, SeatState

SECOND = 1_000_000_000


def _started() -> Seat:
    seat = Seat("worker", 2)
    seat.on_started(100, 0)
    return seat


def _live() -> Seat:
    seat = _started()
    seat.on_ready(0)
    return seat


def _die(seat: Seat, now_ns: int, lived_s: float = 0.0) -> int:
    """Start, live so long and die; return when."""
    seat.on_started(100, now_ns)
    seat.on_ready(now_ns)
    now_ns += int(lived_s * SECOND)
    seat.on_dead(now_ns)
    return now_ns


def test_a_fresh_seat_is_empty_and_can_be_started_at_once() -> None:
    seat = Seat("mover", 0)
    assert (seat.state, seat.epoch, seat.deaths) == (SeatState.EMPTY, 1, 0)
    assert seat.can_start(0)
    assert seat.start_at_ns() == 0


def test_a_taken_seat_cannot_be_started() -> None:
    for seat in (_started(), _live()):
        assert not seat.can_start(SECOND)
        assert seat.start_at_ns() is None


def test_the_epoch_stays_until_the_process_is_reaped() -> None:
    seat = _live()
    assert seat.epoch == 1
    seat.on_kill_sent(1)
    assert seat.epoch == 1
    seat.on_dead(2)
    assert seat.epoch == 2


def test_epochs_wrap_to_one() -> None:
    seat = Seat("worker", 0)
    seat.epoch = EPOCH_MAX
    _die(seat, 0)
    assert seat.epoch == 1


def test_the_backoff_grows_with_deaths_in_a_row() -> None:
    seat, now_ns, delays = Seat("worker", 0), 0, []
    for _ in range(len(RESTART_BACKOFF_S) + 2):
        _die(seat, now_ns)
        at_ns = seat.start_at_ns()
        assert at_ns is not None
        delays.append((at_ns - now_ns) / SECOND)
        assert seat.can_start(at_ns)
        assert at_ns == now_ns or not seat.can_start(at_ns - 1)
        now_ns = at_ns
    assert delays == [*RESTART_BACKOFF_S, RESTART_BACKOFF_S[-1], RESTART_BACKOFF_S[-1]]


def test_a_process_that_lived_long_starts_the_row_anew() -> None:
    seat = Seat("worker", 0)
    for now_ns in (0, SECOND, 2 * SECOND):
        _die(seat, now_ns)
    now_ns = _die(seat, 10 * SECOND, lived_s=LIVED_S + 0.001)
    assert seat.start_at_ns() == now_ns + int(RESTART_BACKOFF_S[0] * SECOND)


def test_a_long_start_is_no_long_life() -> None:
    seat = Seat("worker", 0)
    _die(seat, 0)
    seat.on_started(100, SECOND)
    seat.on_dead(100 * SECOND)
    assert seat.start_at_ns() == 100 * SECOND + int(RESTART_BACKOFF_S[1] * SECOND)


def test_too_many_deaths_in_the_window_break_the_seat_for_good() -> None:
    seat = Seat("worker", 0)
    for _ in range(RESTART_BUDGET):
        assert seat.state is SeatState.EMPTY
        _die(seat, seat.start_at_ns() or 0)
    assert seat.state is SeatState.BROKEN
    assert seat.deaths == RESTART_BUDGET
    assert not seat.can_start(10**18)
    assert seat.start_at_ns() is None


def test_as_many_deaths_over_a_longer_time_do_not() -> None:
    seat, now_ns = Seat("worker", 0), 0
    for _ in range(3 * RESTART_BUDGET):
        now_ns += int(RESTART_WINDOW_S * SECOND / (RESTART_BUDGET - 2))
        _die(seat, now_ns)
    assert seat.state is SeatState.EMPTY
    assert seat.deaths == 3 * RESTART_BUDGET


def test_starts_that_fail_are_put_off_like_deaths_and_break_nothing() -> None:
    seat = Seat("worker", 0)
    for number in range(3 * RESTART_BUDGET):
        now_ns = seat.start_at_ns()
        assert now_ns is not None
        seat.on_start_failed(now_ns)
        step = min(number, len(RESTART_BACKOFF_S) - 1)
        assert seat.start_at_ns() == now_ns + int(RESTART_BACKOFF_S[step] * SECOND)
    assert seat.state is SeatState.EMPTY
    assert seat.deaths == seat.failed_starts == 3 * RESTART_BUDGET


def test_a_start_is_overdue_after_the_time_limit_and_until_it_is_killed() -> None:
    seat = _started()
    late_ns = int(START_TIMEOUT_S * SECOND) + 1
    assert not seat.start_overdue(late_ns - 1)
    assert seat.start_overdue(late_ns)
    seat.on_kill_sent(late_ns)
    assert not seat.start_overdue(late_ns)


def test_what_is_live_or_empty_is_never_overdue() -> None:
    assert not _live().start_overdue(10**15)
    assert not Seat("worker", 0).start_overdue(10**15)


def test_the_fork_server_may_name_the_pid_later() -> None:
    seat = Seat("worker", 0)
    seat.on_started(0, 0)
    assert repr(seat) == "Seat(worker 0, epoch 1, STARTING)"
    seat.on_started(77, SECOND)
    assert (seat.state, seat.pid) == (SeatState.STARTING, 77)
    assert seat.start_overdue(int(START_TIMEOUT_S * SECOND) + 1)  # counted from the first call


def test_a_seat_that_was_killed_before_it_had_a_pid_gets_it_and_stays_dying() -> None:
    seat = Seat("worker", 0)
    seat.on_started(0, 0)
    seat.on_kill_sent(1)
    seat.on_started(77, 2)
    assert repr(seat) == "Seat(worker 0, epoch 1, DYING, pid 77)"


def test_two_processes_cannot_have_one_seat() -> None:
    seat = _live()
    with pytest.raises(AssertionError):
        seat.on_started(101, 1)


def test_ready_that_comes_after_the_kill_or_twice_changes_nothing() -> None:
    seat = _started()
    seat.on_kill_sent(1)
    seat.on_ready(2)
    assert seat.state is SeatState.DYING
    seat = _live()
    seat.on_ready(9)
    assert seat.state is SeatState.LIVE


def test_an_empty_seat_has_nobody_to_kill_and_nobody_to_die() -> None:
    seat = Seat("worker", 0)
    seat.on_kill_sent(0)
    assert seat.state is SeatState.EMPTY
    with pytest.raises(AssertionError):
        seat.on_dead(0)


def test_its_repr_names_seat_epoch_state_and_pid() -> None:
    seat = _live()
    assert repr(seat) == "Seat(worker 2, epoch 1, LIVE, pid 100)"
    seat.on_dead(1)
    assert repr(seat) == "Seat(worker 2, epoch 2, EMPTY)"


@given(lives_s=st.lists(st.floats(0, 20), max_size=200))
def test_deaths_are_counted_and_epochs_never_repeat_while_the_seat_lasts(
    lives_s: list[float],
) -> None:
    seat, now_ns, epochs = Seat("front_end", 1), 0, [1]
    for lived_s in lives_s:
        start_ns = seat.start_at_ns()
        if start_ns is None:
            break
        now_ns = _die(seat, max(now_ns, start_ns), lived_s)
        epochs.append(seat.epoch)
    assert epochs == list(range(1, seat.deaths + 2))
    assert (seat.state is SeatState.BROKEN) == (seat.start_at_ns() is None)


# --- every listed edge --------------------------------------------------------------------------
def _broken() -> Seat:
    seat = Seat("worker", 2)
    for _ in range(RESTART_BUDGET):
        _die(seat, seat.start_at_ns() or 0)
    return seat


def _after(seat: Seat, *events: Callable[[Seat], None]) -> Seat:
    for event in events:
        event(seat)
    return seat


def _kill(seat: Seat) -> None:
    seat.on_kill_sent(1)


def _reap(seat: Seat) -> None:
    seat.on_dead(2)


def _fail(seat: Seat) -> None:
    seat.on_start_failed(2)


# REAPED is passed through inside `on_dead`: an edge into it ends where the seat goes from there.
EDGES: dict[str, tuple[Callable[[], Seat], str]] = {
    "EMPTY -> STARTING [on_started]": (_started, "epoch 1, STARTING, pid 100"),
    "STARTING -> STARTING [on_started]": (
        lambda: _after(_started(), lambda seat: seat.on_started(100, 1)),
        "epoch 1, STARTING, pid 100",
    ),
    "STARTING -> LIVE [on_ready]": (_live, "epoch 1, LIVE, pid 100"),
    "STARTING -> DYING [on_kill_sent]": (
        lambda: _after(_started(), _kill),
        "epoch 1, DYING, pid 100",
    ),
    "LIVE -> DYING [on_kill_sent]": (lambda: _after(_live(), _kill), "epoch 1, DYING, pid 100"),
    "STARTING -> REAPED [on_dead]": (lambda: _after(_started(), _reap), "epoch 2, EMPTY"),
    "LIVE -> REAPED [on_dead]": (lambda: _after(_live(), _reap), "epoch 2, EMPTY"),
    "DYING -> REAPED [on_dead]": (lambda: _after(_live(), _kill, _reap), "epoch 2, EMPTY"),
    "REAPED -> EMPTY [on_dead]": (lambda: _after(_live(), _reap), "epoch 2, EMPTY"),
    "EMPTY -> REAPED [on_start_failed]": (
        lambda: _after(Seat("worker", 2), _fail),
        "epoch 2, EMPTY",
    ),
    "STARTING -> REAPED [on_start_failed]": (
        lambda: _after(_started(), _fail),
        "epoch 2, EMPTY",
    ),
    "DYING -> REAPED [on_start_failed]": (
        lambda: _after(_started(), _kill, _fail),
        "epoch 2, EMPTY",
    ),
    "REAPED -> EMPTY [on_start_failed]": (
        lambda: _after(_started(), _fail),
        "epoch 2, EMPTY",
    ),
    "REAPED -> BROKEN [on_dead]": (_broken, f"epoch {RESTART_BUDGET + 1}, BROKEN"),
}


def test_every_edge_that_the_docstring_lists_is_walked() -> None:
    listed = re.findall(r"^(\w+ -> \w+ \[\w+\])", module.__doc__ or "", re.MULTILINE)
    assert sorted(listed) == sorted(EDGES)


@pytest.mark.parametrize("edge", EDGES)
def test_the_edge_ends_where_it_says(edge: str) -> None:
    walk, end = EDGES[edge]
    assert repr(walk()) == f"Seat(worker 2, {end})"
