"""Workers that hang are found, in a batch and outside of one; nobody else is killed."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from worker_rig import FakeModel, FakeProgram, Opened, Programs, Rig, X, opened

from overcommit.runtime import _shm
from overcommit.runtime.children import Child
from overcommit.runtime.config import HEARTBEAT_NS, MIB, Settings
from overcommit.runtime.fleet import Fleet
from overcommit.runtime.front_end_messages import Occupied, SeatNews
from overcommit.runtime.house import House
from overcommit.runtime.occupied import occupations
from overcommit.runtime.process import Process
from overcommit.runtime.seat_news import Seats
from overcommit.runtime.vigil import Finding, Vigil
from overcommit.runtime.vigil_limits import (
    BATCH_SAID_S,
    BATCH_TIMEOUT_S,
    OCCUPIED_BATCHES,
    OCCUPIED_BEATS,
    OCCUPIED_S,
    OCCUPIED_S_MAX,
    STILL_TIMEOUT_S,
)
from overcommit.runtime.worker_messages import VersionInfo

S = 1_000_000_000
STEP = S // 2  # from one turn of the supervisor to the next


def watched(
    vigil: Vigil, start_ns: int, seconds: float, heartbeat_ns: int, started_ns: int = 0
) -> list[Finding]:
    """Look at a page that stays as it is."""
    steps = range(start_ns + STEP, start_ns + int(seconds * S) + 1, STEP)
    return [vigil.look(heartbeat_ns, started_ns, now_ns) for now_ns in steps]


def test_an_idle_worker_beats_and_is_left_alone() -> None:
    vigil = Vigil(0)
    seen = {vigil.look(now_ns // S * S, 0, now_ns) for now_ns in range(0, 600 * S, STEP)}
    assert seen == {Finding.MOVES}


def test_who_does_not_beat_and_runs_nothing_is_stuck() -> None:
    seen = watched(Vigil(0), 0, STILL_TIMEOUT_S + 2, 7)
    assert seen[-1] is Finding.STUCK
    assert set(seen[: int(STILL_TIMEOUT_S * S) // STEP]) == {Finding.MOVES}


def test_a_long_batch_is_spoken_of_once_and_then_stuck() -> None:
    seen = watched(Vigil(0), 0, BATCH_TIMEOUT_S + 2, 7, 1)
    assert seen.count(Finding.LONG) == 1
    assert abs((seen.index(Finding.LONG) + 1) * STEP - BATCH_SAID_S * S) <= 2 * STEP
    assert (seen.index(Finding.STUCK) + 1) * STEP > BATCH_TIMEOUT_S * S


def test_a_batch_on_a_device_is_stuck_though_the_loop_beats() -> None:
    vigil = Vigil(0)
    seen = [
        vigil.look(now_ns, 1, now_ns) for now_ns in range(STEP, int(BATCH_TIMEOUT_S + 2) * S, STEP)
    ]
    assert seen[-1] is Finding.STUCK


def test_batches_one_after_the_other_are_no_long_one() -> None:
    """A turn may run many: each request of a batch that failed, for one."""
    vigil = Vigil(0)
    seconds = BATCH_SAID_S - 1
    for number in range(30):
        start_ns = int(number * seconds * S)
        assert set(watched(vigil, start_ns, seconds, 7, start_ns + 1)) == {Finding.MOVES}
    # It has not beaten for long, but it has just ended a batch.
    assert vigil.look(7, 0, int(30 * seconds * S)) is Finding.MOVES


@pytest.mark.parametrize("started_ns", [0, 1])
def test_time_in_which_nobody_looked_does_not_count(started_ns: int) -> None:
    """The whole server was stopped: the supervisor may go on before its workers do."""
    vigil = Vigil(0)
    watched(vigil, 0, 5, 7, started_ns)
    assert vigil.look(7, started_ns, 3600 * S) is Finding.MOVES
    assert vigil.still_ns <= 5 * S + HEARTBEAT_NS


def test_a_batch_is_unusually_long_by_what_its_version_takes_within_bounds() -> None:
    def until_occupied(usual_s: float) -> float:
        vigil = Vigil(0)
        for now_ns in range(STEP, int(BATCH_TIMEOUT_S) * S, STEP):
            assert vigil.look(7, 1, now_ns, 5) is not Finding.STUCK
            if vigil.is_occupied(int(usual_s * S)):
                assert vigil.slot == 5
                return vigil.still_ns / S
        raise AssertionError("never")

    assert until_occupied(0.0) == OCCUPIED_S
    assert until_occupied(4.0) == OCCUPIED_BATCHES * 4.0
    assert until_occupied(100.0) == OCCUPIED_S_MAX


def test_who_misses_a_few_beats_in_no_batch_is_occupied_by_none_until_it_beats() -> None:
    vigil = Vigil(0)
    vigil.look(7, 0, 0)
    watched(vigil, 0, OCCUPIED_BEATS - 1, 7)
    assert not vigil.is_occupied(0)
    watched(vigil, (OCCUPIED_BEATS - 1) * S, 2, 7)
    assert vigil.is_occupied(0)
    assert vigil.slot is None
    vigil.look(8, 0, 9 * S)
    assert not vigil.is_occupied(0)


def test_the_end_of_a_batch_that_was_spoken_of_is_a_finding_once() -> None:
    vigil = Vigil(0)
    assert watched(vigil, 0, BATCH_SAID_S + 1, 7, 1).count(Finding.LONG) == 1
    end_ns = int((BATCH_SAID_S + 2) * S)
    assert [vigil.look(8, 0, end_ns), vigil.look(9, 0, end_ns + S)] == [
        Finding.GOES_ON,
        Finding.MOVES,
    ]
    assert vigil.look(9, end_ns, end_ns + 2 * S) is Finding.MOVES
    assert vigil.look(9, 0, end_ns + 3 * S) is Finding.MOVES, "of this one nothing was said"


# --- the fleet ----------------------------------------------------------------------------------
@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    settings = Settings(
        cache_dir=str(tmp_path), device_memory_bytes=8 * MIB, host_memory_bytes=0, workers=1
    )
    house = House(settings, lambda process: None, lambda child: None)
    entry = SimpleNamespace(name="slow", version="3")
    house.registry.by_slot = lambda slot: entry if slot == 5 else None  # type: ignore[method-assign, assignment, return-value]
    yield house.fleet
    house.fleet.children.clear()
    house.close()


def a_worker(fleet: Fleet) -> tuple[_shm.StatusPage, list[int]]:
    """Seat a worker that is ready; return its page, and when it is killed."""
    seat = next(seat for seat in fleet.seats if seat.kind == "worker")
    killed: list[int] = []
    process: Any = SimpleNamespace(kill=lambda: killed.append(1), pid=1)
    child = Child(seat, cast(Process, process), seat.epoch)
    page = mmap.mmap(-1, _shm.STATUS_BYTES)
    child.status = _shm.StatusPage(page, 0, False)
    fleet.children[id(seat)] = child
    seat.on_started(1, 0)
    fleet.on_ready(child, 1, 0)
    return _shm.StatusPage(page, 0, True), killed


def test_a_frozen_worker_is_killed_once_and_the_log_says_so(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    page, killed = a_worker(fleet)
    page.heartbeat(1)
    with caplog.at_level(logging.WARNING, "overcommit.fleet"):
        for now_ns in range(STEP, int(STILL_TIMEOUT_S + 5) * S, STEP):
            fleet.kill_overdue(now_ns)
    assert killed == [1]
    (record,) = caplog.records
    assert "worker 0" in record.getMessage()
    assert f"has not moved for {STILL_TIMEOUT_S:g} s: killed" in record.getMessage()


def test_of_a_batch_that_hangs_the_log_names_the_version_first_and_at_its_end(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    page, killed = a_worker(fleet)
    page.begin(5, _shm.PHASE_COMPUTE, 1, [9])
    with caplog.at_level(logging.WARNING, "overcommit.fleet"):
        for now_ns in range(STEP, int(BATCH_TIMEOUT_S + 5) * S, STEP):
            fleet.kill_overdue(now_ns)
    assert killed == [1]
    warning, error = caplog.records
    assert (warning.levelname, error.levelname) == ("WARNING", "ERROR")
    assert all("slow version 3" in record.getMessage() for record in (warning, error))
    assert f"for {BATCH_SAID_S:g} s" in warning.getMessage()
    assert f"for {BATCH_TIMEOUT_S:g} s" in error.getMessage()


def test_front_ends_are_told_who_is_occupied_and_when_nobody_is_any_more(fleet: Fleet) -> None:
    told: list[SeatNews] = []
    seat = next(seat for seat in fleet.seats if seat.kind == "front_end")
    control: Any = SimpleNamespace(post=lambda message, fds: told.append(message) or True)
    front = Child(seat, cast(Process, SimpleNamespace(control=control, pid=2)), seat.epoch)
    front.is_ready = True
    page, _ = a_worker(fleet)
    fleet.children[id(seat)] = front
    seats = Seats(fleet, lambda: occupations(fleet.of_kind("worker"), lambda slot: 0))
    now_ns = 0

    def go_on(seconds: float) -> None:
        nonlocal now_ns
        end_ns = now_ns + int(seconds * S)
        while now_ns < end_ns:
            now_ns += STEP
            fleet.kill_overdue(now_ns)
            seats.step()

    page.heartbeat(1)
    go_on(1)
    assert told == []
    page.begin(5, _shm.PHASE_COMPUTE, 1, [9])
    go_on(OCCUPIED_S + 2)
    assert [news.occupied for news in told] == [(Occupied(0, 1, 5),)]
    page.end()
    go_on(1)
    assert [news.occupied for news in told[1:]] == [()]
    page.begin(6, _shm.PHASE_COMPUTE, 2, [9])
    go_on(OCCUPIED_S + 2)
    front.seat.epoch += 1
    front.epoch += 1  # its successor knows nothing yet
    go_on(1)
    assert [news.occupied for news in told[2:]] == [(Occupied(0, 1, 6),)] * 2


# --- the worker ---------------------------------------------------------------------------------
def test_an_idle_worker_s_heart_beats_and_a_bind_is_on_its_page() -> None:
    pages: list[tuple[int, list[int]]] = []

    class Slow(FakeProgram):
        def bind(self, header: object, memory: memoryview) -> FakeModel:
            _, started_ns, _, slot, ids = rig.status.read()
            assert started_ns
            pages.append((slot, ids))
            return super().bind(header, memory)

    def open_program(version: VersionInfo) -> Opened:
        return opened(Slow())

    rig = Rig(open_program)
    try:
        front = rig.link()
        rig.serve(3)
        rig.answered(front, front.submit(3, [X]))
        assert pages == [(3, [])]
        assert not rig.status.read()[1]
        first_ns = rig.status.read()[0]
        rig.until(lambda: rig.status.read()[0] > first_ns)
    finally:
        rig.close()


def test_what_a_device_runs_is_on_the_page_again_after_a_bind() -> None:
    rig = Rig(Programs())
    try:
        front = rig.link()
        rig.serve(3)
        rig.answered(front, front.submit(3, [X]))
        version = rig.worker.versions.get(3)
        assert version is not None
        status = rig.worker._status
        status.begin(8, _shm.PHASE_COPY_IN, 77, [1, 2])
        seen = []
        assert rig.worker._runner.try_prepare(version, lambda: seen.append(status.read()[3:]))
        assert seen == [(3, [1, 2])]
        assert status.read()[1:] == (77, _shm.PHASE_COPY_IN, 8, [1, 2])
        status.end()
    finally:
        rig.close()
