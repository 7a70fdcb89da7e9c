"""A fork that fails ends neither the fork server nor what it has forked; the supervisor is told."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest

from overcommit.runtime import forkserver
from overcommit.runtime import process as process_module
from overcommit.runtime.control import ControlSocket, socket_pair
from overcommit.runtime.messages import Fork, Unforked
from overcommit.runtime.process import ForkServer, Process


def refuse(*args: object) -> Any:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def ends() -> Iterator[tuple[ControlSocket, ControlSocket]]:
    ours, theirs = map(ControlSocket, socket_pair())
    yield ours, theirs
    ours.close()
    theirs.close()


def test_a_fork_that_fails_is_told(
    ends: tuple[ControlSocket, ControlSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, server = ends
    monkeypatch.setattr(forkserver.os, "fork", refuse)
    before = open_fds()
    forkserver._fork(server, Fork(kind="worker", ticket=7), os.eventfd(0), ())
    assert open_fds() == before
    received = supervisor.try_receive()
    assert received is not None
    message, _ = received
    assert isinstance(message, Unforked)
    assert message.ticket == 7
    assert "temporarily unavailable" in message.reason


def test_a_child_that_cannot_be_named_is_ended_and_reaped(
    ends: tuple[ControlSocket, ControlSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, server = ends
    read, write = os.pipe()
    monkeypatch.setattr(forkserver.os, "pidfd_open", refuse)
    monkeypatch.setattr(forkserver, "run_child", lambda *args: os.read(read, 1))
    forkserver._fork(server, Fork(kind="worker", ticket=8), os.eventfd(0), (write,))
    received = supervisor.try_receive()
    assert received is not None
    assert isinstance(received[0], Unforked)
    os.close(write)
    os.close(read)


@pytest.fixture
def handle(
    ends: tuple[ControlSocket, ControlSocket], monkeypatch: pytest.MonkeyPatch
) -> tuple[ForkServer, list[Process]]:
    monkeypatch.setattr(process_module, "spawn", lambda kind: Process(kind, ends[0]))
    unborn: list[Process] = []
    return ForkServer(lambda process: None, lambda process, why: unborn.append(process)), unborn


def test_who_asked_hears_of_it_once(handle: tuple[ForkServer, list[Process]]) -> None:
    server, unborn = handle
    first, second, third = (server.fork("worker") for _ in range(3))
    server.on_message(Unforked(ticket=2, reason="no"), {})
    assert unborn == [second]
    server.abandon()
    assert sorted(map(id, unborn)) == sorted(map(id, (first, second, third)))
    for process in unborn:
        assert process.close() == "it never began"


def test_a_fork_server_that_cannot_be_asked_is_asked_nothing(
    handle: tuple[ForkServer, list[Process]], ends: tuple[ControlSocket, ControlSocket]
) -> None:
    server, unborn = handle
    ends[1].close()  # it has just died
    before = open_fds()
    with pytest.raises(OSError, match="pipe"):
        server.fork("worker")
    assert open_fds() == before
    server.abandon()
    assert unborn == []
