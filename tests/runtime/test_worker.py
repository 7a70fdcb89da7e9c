"""The worker's loop over real rings, memory and residency words; the engine is a fake."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from front_rig import Array, Front
from worker_rig import FakeModel, Programs, Rig, X, info, ready, vector_config

from overcommit.runtime import _shm
from overcommit.runtime.lanes import LEVEL_SHIFT, RUN_ALONE
from overcommit.runtime.messages import Stop
from overcommit.runtime.worker_messages import Forget


# --- the way of a request -----------------------------------------------------------------------
def test_a_request_is_answered_with_what_the_weights_make_of_it(rig: Rig, front: Front) -> None:
    rig.serve(3, weight=2.0)
    request = front.submit(3, [X])
    rig.answered(front, request)
    np.testing.assert_array_equal(front.outputs(request)[0], 2 * X)
    _, taken_ns, started_ns, finished_ns, _, _, batch_size, _ = front.answers[request]
    assert taken_ns <= started_ns <= finished_ns
    assert batch_size == 1


def test_what_waits_together_runs_together_and_each_gets_its_own(rig: Rig, front: Front) -> None:
    ready(rig, front)
    requests = [front.submit(3, [X * i]) for i in range(8)]
    rig.answered(front, *requests)
    for i, request in enumerate(requests):
        np.testing.assert_array_equal(front.outputs(request)[0], 2 * i * X)
        assert front.answers[request][6] == 8


def test_front_ends_share_batches_and_get_their_own_answers(rig: Rig, front: Front) -> None:
    other = rig.link(seat=1, epoch=9)
    ready(rig, front)
    mine, theirs = front.submit(3, [X]), other.submit(3, [3 * X])
    rig.until(lambda: mine in front.collect() and theirs in other.collect())
    np.testing.assert_array_equal(other.outputs(theirs)[0], 6 * X)
    assert front.answers[mine][6] == 2


def test_a_sleeping_front_end_is_woken_and_an_awake_one_is_not(rig: Rig, front: Front) -> None:
    ready(rig, front)
    bell = front.fds["peer_doorbell"]
    rig.answered(front, front.submit(3, [X]))
    with pytest.raises(BlockingIOError):
        os.eventfd_read(bell)
    assert _shm.arm((front.completions,))
    request = front.submit(3, [X])
    rig.answered(front, request)
    assert os.eventfd_read(bell) == 1


def test_who_stands_behind_many_in_a_ring_does_not_wait_for_their_batches(
    rig: Rig, programs: Programs
) -> None:
    front = rig.link(seat=1, epoch=2, slots=256)
    ready(rig, front, 3)
    ready(rig, front, 4)
    flood = [front.submit(3, [X]) for _ in range(200)]
    behind = front.submit(4, [X])
    for _ in range(2):  # a turn has one batch at least, and both models have one after the other
        rig.worker.turn()
    assert behind in front.collect()
    rig.answered(front, *flood)


def test_who_is_refused_does_not_wait_for_the_batch_that_runs(
    rig: Rig, front: Front, programs: Programs
) -> None:
    ready(rig, front)
    rung: list[int] = []

    def look(inputs: dict[str, Array]) -> dict[str, Array]:
        rung.append(os.eventfd_read(front.fds["peer_doorbell"]))
        return {"y": inputs["x"]}

    model = rig.worker.versions.get(3)
    assert model is not None
    assert isinstance(model.model, FakeModel)
    model.model.override = look
    assert _shm.arm((front.completions,))
    refused, runs = front.submit(3, [X[:, :3]]), front.submit(3, [X])
    rig.answered(front, refused, runs)
    assert rung == [1]
    assert front.status(refused) == _shm.BAD_REQUEST


def test_the_status_page_is_idle_after_a_batch_and_the_lease_is_dropped(
    rig: Rig, front: Front, programs: Programs
) -> None:
    seen: list[tuple[int, int, int]] = []

    def look(inputs: dict[str, Array]) -> dict[str, Array]:
        _, started_ns, phase, slot, ids = rig.status.read()
        assert started_ns
        seen.append((phase, slot, len(ids)))
        assert rig.leases.read(3)[0] == 1
        return {"y": inputs["x"]}

    programs[3].run = look
    ready(rig, front)
    assert seen == [(_shm.PHASE_COMPUTE, 3, 1)]
    assert rig.status.read()[1:3] == (0, _shm.PHASE_IDLE)
    lease, waiting, uses, last_used_ns = rig.leases.read(3)
    assert (lease, waiting, uses) == (0, 0, 1)
    assert last_used_ns > 0


def test_a_worker_that_has_nothing_to_do_beats(rig: Rig) -> None:
    rig.settle()
    assert rig.status.read()[0] > 0


def test_stop_ends_the_loop(rig: Rig) -> None:
    rig.control.send(Stop())
    rig.worker.run()
    assert rig.worker.is_stopping


def test_the_supervisor_s_end_ends_the_loop(rig: Rig) -> None:
    rig.control.close()
    with pytest.raises(EOFError):
        rig.worker.run()


# --- answers that are no result -----------------------------------------------------------------
def test_one_bad_request_does_not_fail_its_neighbours(
    rig: Rig, front: Front, programs: Programs
) -> None:
    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        if np.isnan(inputs["x"]).any():
            raise ValueError("not a number")
        return {"y": inputs["x"]}

    programs[3].run = run
    ready(rig, front)
    good, bad = front.submit(3, [X]), front.submit(3, [X * np.nan])
    rig.answered(front, good, bad)
    np.testing.assert_array_equal(front.outputs(good)[0], X)
    assert front.status(bad) == _shm.MODEL_ERROR
    assert front.text(bad) == "ValueError: not a number"
    assert rig.leases.read(3)[0] == 0


def test_a_request_whose_time_was_used_up_by_its_batch_is_not_run_again(
    rig: Rig, front: Front, programs: Programs
) -> None:
    calls: list[int] = []
    timeout_ns = 100_000_000

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        calls.append(len(inputs["x"]))
        while time.monotonic_ns() < end_ns:
            pass
        raise ValueError("too late anyway")

    programs[3].run = run
    rig.serve(3)
    requests = [front.submit(3, [X], timeout_ns=timeout_ns) for _ in range(2)]
    end_ns = time.monotonic_ns() + timeout_ns  # not before either's time is over
    rig.answered(front, *requests)
    rig.settle()
    assert 1 not in calls
    assert [front.status(one) for one in requests] == [_shm.EXPIRED] * 2


def test_an_answer_that_does_not_fit_says_what_it_needs(rig: Rig, front: Front) -> None:
    ready(rig, front)
    short, good = front.submit(3, [X], capacity=64), front.submit(3, [X])
    rig.answered(front, short, good)
    assert front.status(short) == _shm.TOO_LARGE
    need = front.answers[short][7]
    assert need == front.answers[good][4]
    again = front.submit(3, [X], capacity=need)
    rig.answered(front, again)
    assert front.status(again) == _shm.OK


def test_a_message_is_cut_to_its_block_between_characters(
    rig: Rig, front: Front, programs: Programs
) -> None:
    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        raise RuntimeError("\u00fc" * 100)

    programs[3].run = run
    rig.serve(3)
    requests = [front.submit(3, [X], capacity=size) for size in (19, 0)]
    rig.answered(front, *requests)
    assert front.text(requests[0]) == "RuntimeError: \u00fc\u00fc"
    assert front.text(requests[1]) == ""


def test_a_request_whose_time_is_over_is_not_run(rig: Rig, front: Front) -> None:
    ready(rig, front)
    late, waits = front.submit(3, [X], timeout_ns=-1), front.submit(5, [X], timeout_ns=-1)
    good = front.submit(3, [X])
    rig.answered(front, late, waits, good)
    assert front.status(late) == front.status(waits) == _shm.EXPIRED
    assert front.answers[good][6] == 1
    assert rig.leases.read(5)[1] == 0


def test_a_full_lane_answers_at_once(rig: Rig, front: Front) -> None:
    rig.control.send(info(5, vector_config(max_queue_size=2)))
    requests = [front.submit(5, [X]) for _ in range(3)]
    rig.answered(front, requests[2])
    assert front.status(requests[2]) == _shm.OVERLOADED
    assert len(front.answers) == 1


def test_tensors_that_do_not_fit_are_refused_with_the_reason(rig: Rig, front: Front) -> None:
    ready(rig, front)
    request = front.submit(3, [np.ones((1, 5), np.float32)])
    rig.answered(front, request)
    assert front.status(request) == _shm.BAD_REQUEST
    assert "the model takes [-1, 4]" in front.text(request)


def test_a_cancelled_request_is_answered_as_such_and_a_late_cancel_is_ignored(
    rig: Rig, front: Front
) -> None:
    ready(rig, front)
    waits, runs = front.submit(5, [X]), front.submit(3, [X])
    rig.answered(front, runs)
    for request in (waits, runs, waits):
        front.push(request, 5, kind=_shm.CANCEL)
    rig.answered(front, waits)
    rig.settle()
    assert front.status(waits) == _shm.CANCELLED
    assert len(front.collect()) == 3


def test_a_suspect_runs_alone(rig: Rig, front: Front) -> None:
    ready(rig, front)
    suspect = front.submit(3, [X], flags=RUN_ALONE)
    others = [front.submit(3, [X]) for _ in range(2)]
    rig.answered(front, suspect, *others)
    assert [front.answers[one][6] for one in (suspect, *others)] == [1, 2, 2]


def test_an_urgent_request_runs_before_those_that_came_earlier(rig: Rig, front: Front) -> None:
    ready(rig, front, config=vector_config(max_batch_size=1, priority_levels=3))
    levels = (3, 0, 2, 1)
    requests = [front.submit(3, [X], flags=level << LEVEL_SHIFT) for level in levels]
    rig.answered(front, *requests)
    ran = sorted(requests, key=lambda request: front.answers[request][2])
    # Who does not say goes with the last.
    assert [levels[requests.index(request)] for request in ran] == [1, 2, 3, 0]


# --- garbage ------------------------------------------------------------------------------------
def test_models_that_are_let_go_of_are_counted(rig: Rig, front: Front) -> None:
    ready(rig, front)
    assert not rig.worker.versions.released
    rig.control.send(Forget(slot=3))
    rig.until(lambda: rig.worker.versions.get(3) is None)
    assert rig.worker.versions.released == 1
