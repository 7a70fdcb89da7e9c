"""A worker in a process of its own, and what is left when it is killed."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from front_rig import WATCHDOG_S
from worker_rig import FAKE_COMMAND, Rig, X, info

from overcommit.runtime import _shm
from overcommit.runtime.messages import Stop
from overcommit.runtime.worker_messages import Activate


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(command=FAKE_COMMAND)
    yield rig
    rig.close()


def pid_of(rig: Rig) -> int:
    assert rig.process is not None
    return rig.process.pid


def kill(rig: Rig) -> None:
    """SIGKILL, and wait until the kernel has taken the process down."""
    pidfd = os.pidfd_open(pid_of(rig))
    os.kill(pid_of(rig), signal.SIGKILL)
    assert select.select((pidfd,), (), (), WATCHDOG_S)[0]
    os.close(pidfd)


def test_a_worker_process_serves_and_stops_when_told(rig: Rig) -> None:
    front = rig.link()
    rig.serve(3)
    requests = [front.submit(3, [X * i]) for i in range(20)]
    front.wait(*requests)
    for i, request in enumerate(requests):
        np.testing.assert_array_equal(front.outputs(request)[0], 2 * i * X)
    rig.control.send(Stop())
    assert rig.process is not None
    assert rig.process.wait(WATCHDOG_S) == 0


def test_a_worker_goes_when_its_supervisor_is_gone(rig: Rig) -> None:
    rig.control.close()
    assert rig.process is not None
    assert rig.process.wait(WATCHDOG_S) == 0


@pytest.mark.chaos
def test_a_worker_killed_in_a_batch_leaves_its_suspects_its_answers_and_the_weights(
    rig: Rig,
) -> None:
    front = rig.link()
    rig.serve(3)
    answered = front.submit(3, [X])
    front.wait(answered)
    # The fake model hangs on NaN; what comes after it stays in the ring.
    deadly = front.submit(3, [X * np.nan])
    while rig.status.read()[4] != [deadly]:
        assert rig.process is not None
        assert rig.process.poll() is None
    queued = front.submit(3, [X])
    kill(rig)

    # Post mortem: who was running, what was answered before, what was never taken.
    _, started_ns, phase, slot, suspects = rig.status.read()
    assert started_ns
    assert (phase, slot, suspects) == (_shm.PHASE_COMPUTE, 3, [deadly])
    assert list(front.collect()) == [answered]
    assert front.submissions.tail() - front.submissions.head() == 1

    # The successor maps the weights that are still there and serves what was only queued.
    rig.restart()
    successor = rig.link(epoch=1)
    again = successor.submit(3, [X])
    assert rig.receive() == Activate(slot=3)
    rig.control.send(info(3))
    rig.control.send(rig.publish(3, 1, 2.0))
    successor.wait(again)
    np.testing.assert_array_equal(successor.outputs(again)[0], 2 * X)
    assert queued not in front.collect()


@pytest.mark.chaos
@pytest.mark.slow
def test_workers_killed_at_any_moment_never_give_a_wrong_or_a_second_answer(rig: Rig) -> None:
    rng = np.random.default_rng(7)
    for generation in range(1, 11):
        front = rig.link(epoch=generation)
        rig.serve(3, generation=generation)
        requests = {front.submit(3, [X * i]): i for i in range(64)}
        wanted = int(rng.integers(0, 40))
        while len(front.collect()) < wanted:
            pass
        kill(rig)
        for request in front.collect():
            np.testing.assert_array_equal(front.outputs(request)[0], 2 * requests[request] * X)
        rig.restart()
