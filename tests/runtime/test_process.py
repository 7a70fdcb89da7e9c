"""Children that are forked: what is said of how they ended, whoever hears of it first."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator

import pytest

from overcommit.runtime.process import ForkServer, Process

WATCHDOG_S = 60.0


@pytest.fixture
def server() -> Iterator[ForkServer]:
    made = ForkServer(lambda process: None, lambda process, why: None)
    yield made
    made.process.kill()
    made.process.close()


def hear(server: ForkServer, is_enough: Callable[[], bool]) -> None:
    """Handle what the fork server says until it is enough."""
    while not is_enough():
        assert select.select((server.process.control,), (), (), WATCHDOG_S)[0]
        while (received := server.process.control.try_receive()) is not None:
            server.on_message(*received)


def killed(server: ForkServer) -> Process:
    """Fork a child, and have it die of a signal."""
    child = server.fork("packer")
    hear(server, lambda: child.pidfd is not None)
    assert child.pidfd is not None
    assert child.pid is not None
    os.kill(child.pid, signal.SIGABRT)
    assert select.select((child.pidfd,), (), (), WATCHDOG_S)[0]
    return child


def test_the_signal_that_ended_a_forked_child_is_said(server: ForkServer) -> None:
    child = killed(server)
    hear(server, lambda: child.code is not None)
    assert child.close() == "signal 6, SIGABRT"


def test_the_signal_is_known_of_a_child_that_is_not_reaped_yet(server: ForkServer) -> None:
    child = server.fork("packer")
    hear(server, lambda: child.pidfd is not None)
    assert server.process.pid is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    assert child.pid is not None
    assert child.pidfd is not None
    os.kill(child.pid, signal.SIGSEGV)
    assert select.select((child.pidfd,), (), (), WATCHDOG_S)[0]
    assert child.close() == "signal 11, SIGSEGV"
