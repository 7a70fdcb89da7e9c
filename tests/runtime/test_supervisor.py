"""What fails in one turn of the supervisor's loop ends nothing else."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overcommit.runtime import equipment
from overcommit.runtime import fleet as fleet_module
from overcommit.runtime import process as process_module
from overcommit.runtime import supervisor as supervisor_module
from overcommit.runtime.config import MIB, Settings
from overcommit.runtime.messages import Kind
from overcommit.runtime.process import Process, spawn
from overcommit.runtime.seats import SeatState
from overcommit.runtime.supervisor import Supervisor

AGAIN = BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")  # as fork says it


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    (tmp_path / "models").mkdir()
    yield Settings(
        repositories=(str(tmp_path / "models"),),
        cache_dir=str(tmp_path / "cache"),
        port=0,
        grpc_port=None,
        workers=1,
        device_memory_bytes=8 * MIB,
        host_memory_bytes=0,
        payload_bytes=8 * MIB,
        start_method="spawn",
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def failing(
    times: int, then: Callable[..., Any], error: BaseException = AGAIN
) -> Callable[..., Any]:
    left = iter(range(times))

    def do(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is not None:
            raise error
        return then(*args, **kwargs)

    return do


def end(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# --- starts -------------------------------------------------------------------------------------
def test_a_start_that_fails_is_a_death_of_its_seat_and_leaves_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "spawn", failing(99, spawn))
    supervisor = Supervisor(settings)
    fleet = supervisor.house.fleet
    before = open_fds()
    for now_ns in (1, 2):
        fleet.start_due(now_ns)
        assert fleet.children == {}
        assert [seat.deaths for seat in fleet.seats] == [now_ns] * 3
        assert all(seat.state is SeatState.EMPTY for seat in fleet.seats)
    fleet.start_due(3)
    assert [seat.deaths for seat in fleet.seats] == [3] * 3
    fleet.start_due(4)
    assert [seat.deaths for seat in fleet.seats] == [3] * 3, "its back-off is over later"
    assert open_fds() == before
    failures = {failure.what: failure.count for failure in supervisor.house.boundary.failures()}
    assert failures == dict.fromkeys(
        ("the start of a front_end", "the start of a mover", "the start of a worker"), 3
    )
    supervisor.close()


@pytest.mark.parametrize("fails", ["socketpair", "popen", "pidfd"])
def test_a_process_that_cannot_be_made_leaves_no_descriptor_and_no_child(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = {
        "socketpair": (process_module, "socket_pair"),
        "popen": (process_module.subprocess, "Popen"),
        "pidfd": (process_module.os, "pidfd_open"),
    }[fails]
    monkeypatch.setattr(module, name, failing(1, getattr(module, name)))
    before = open_fds(), children()
    with pytest.raises(BlockingIOError):
        spawn("front_end")
    assert (open_fds(), children()) == before


@pytest.mark.parametrize("made", range(6))
def test_what_an_incarnation_owns_is_closed_if_not_all_of_it_can_be_made(
    made: int, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter(range(99))

    def at_the_limit(make: Callable[..., int]) -> Callable[..., int]:
        def do(*args: Any) -> int:
            if next(asked) >= made:
                raise OSError(errno.EMFILE, "Too many open files")
            return make(*args)

        return do

    def refuse(kind: Kind) -> Process:
        raise AGAIN

    supervisor = Supervisor(settings)
    for name in ("make_bell", "create_memfd"):
        monkeypatch.setattr(equipment, name, at_the_limit(getattr(equipment, name)))
    monkeypatch.setattr(fleet_module, "spawn", refuse)
    before = open_fds()
    supervisor.house.fleet.start_due(1)
    assert open_fds() == before
    assert [seat.deaths for seat in supervisor.house.fleet.seats] == [1] * 3
    supervisor.close()


# --- the loop -----------------------------------------------------------------------------------
def test_the_server_goes_on_when_no_process_can_be_started(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(kind: Kind) -> Process:
        if all(seat.deaths > 2 for seat in supervisor.house.fleet.seats):
            end()
        raise AGAIN

    monkeypatch.setattr(fleet_module, "spawn", refuse)
    supervisor = Supervisor(settings)
    assert supervisor.run() == 0


PARTS = [
    ("house.fleet", "start_due"),
    ("house.fleet", "kill_overdue"),
    ("house.sites.activations", "tick"),
    ("administration.books", "tell_new"),
    ("administration.gathering", "step"),
    ("administration.loads", "step"),
    ("catalogue.packing", "step"),
    ("catalogue.rehearsals", "step"),
    ("_seats", "step"),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: ".".join(part))
def test_a_part_of_a_turn_that_fails_again_and_again_keeps_no_other_from_its_own(
    part: tuple[str, str], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "spawn", failing(10**9, spawn))
    supervisor = Supervisor(settings)
    parts = {}
    for path, name in PARTS:
        owner: Any = supervisor
        for step in path.split("."):
            owner = getattr(owner, step)
            owner = owner[0] if isinstance(owner, list) else owner
        parts[path, name] = owner
    monkeypatch.setattr(supervisor_module, "TICK_S", 0.01)
    calls: dict[tuple[str, str], int] = dict.fromkeys(parts, 0)

    def counted(key: tuple[str, str], *args: object) -> None:
        calls[key] += 1
        if min(calls.values()) >= 3:
            end()
        if key == part:
            raise RuntimeError("a defect")

    for key, owner in parts.items():
        monkeypatch.setattr(
            owner, key[1], lambda *args, key=key: counted(key, *args), raising=False
        )
    assert supervisor.run() == 0
    assert calls[part] >= 3, "it is tried again"
    assert any(
        failure.error == "RuntimeError" and failure.count >= 3
        for failure in supervisor.house.boundary.failures()
    )


def test_what_the_bell_heralds_is_done_before_what_is_due(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "HERALD_SPIN_NS", 60 * 10**9)
    monkeypatch.setattr(fleet_module, "spawn", failing(10**9, spawn))
    supervisor = Supervisor(settings)
    wish, bell = os.eventfd(0, os.EFD_NONBLOCK), supervisor.house.fleet.bell
    done: list[str] = []
    step = supervisor._step
    later = threading.Timer(0.2, os.eventfd_write, (wish, 1))

    def turn() -> None:
        if not done:
            later.start()
        done.append("a turn")
        step()

    def take() -> None:
        os.eventfd_read(wish)
        done.append("a wish")
        if done.count("a wish") == 2:
            end()
        else:  # it does not end there, but what is due comes between
            os.eventfd_write(bell, 1)
            os.eventfd_write(wish, 1)

    monkeypatch.setattr(supervisor, "_step", turn)
    monkeypatch.setattr(supervisor.catalogue, "start", lambda: None)  # what it sees is an event
    supervisor._register(wish, "a wish", take)
    os.eventfd_write(bell, 1)
    assert supervisor.run() == 0
    later.join()
    os.close(wish)
    first = done.index("a wish")
    assert first == 1, "the bell comes in the first turn, and then only what it is for"
    assert "a turn" in done[first + 1 : done.index("a wish", first + 1)]


@pytest.mark.parametrize("event", ["_on_bell", "_on_scanned"])
def test_an_event_that_fails_ends_there(
    event: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "spawn", failing(10**9, spawn))
    calls = iter(range(99))

    def fail(self: Supervisor) -> None:
        if next(calls) == 3:
            end()
        raise RuntimeError("a defect")  # nothing was read: it comes again

    monkeypatch.setattr(Supervisor, event, fail)
    supervisor = Supervisor(settings)
    os.eventfd_write(supervisor.house.fleet.bell, 1)
    assert supervisor.run() == 0


def test_an_interrupt_ends_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "spawn", failing(1, spawn, KeyboardInterrupt()))
    supervisor = Supervisor(settings)
    with pytest.raises(KeyboardInterrupt):
        supervisor.run()
