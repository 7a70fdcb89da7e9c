"""The worker's loop over real rings, memory and residency words; the engine is a fake."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from worker_rig import (
    CAPACITY,
    PAYLOAD_BYTES,
    Array,
    FakeProgram,
    Front,
    Rig,
    info,
    opened,
    vector_config,
)

from overcommit.runtime import _shm
from overcommit.runtime.bound import Opened
from overcommit.runtime.config import PAGE_BYTES, ModelConfig
from overcommit.runtime.errors import Forbidden
from overcommit.runtime.lanes import RUN_ALONE
from overcommit.runtime.messages import (
    Activate,
    ActivationFailed,
    BindFailed,
    Forget,
    Placed,
    Stop,
    VersionInfo,
)

X = np.array([[1, 2, 3, 4]], np.float32)


class Programs:
    """The opener: one fake program per slot, made on demand; `error` fails the next ones."""

    def __init__(self) -> None:
        self.by_slot: dict[int, FakeProgram] = {}
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def __getitem__(self, slot: int) -> FakeProgram:
        return self.by_slot.setdefault(slot, FakeProgram())

    def __call__(self, version: VersionInfo) -> Opened:
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        return opened(self[version.slot])


@pytest.fixture
def programs() -> Programs:
    return Programs()


@pytest.fixture
def rig(programs: Programs) -> Iterator[Rig]:
    rig = Rig(programs)
    yield rig
    programs.gate.set()
    rig.close()


@pytest.fixture
def front(rig: Rig) -> Front:
    return rig.link()


def ready(rig: Rig, front: Front, slot: int = 3, **serve: object) -> None:
    """Serve a version and wait until it has answered once."""
    rig.serve(slot, **serve)  # type: ignore[arg-type]
    rig.answered(front, front.submit(slot, [X]))
    rig.heard()


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


# --- the way of a version -----------------------------------------------------------------------
def test_an_unknown_version_is_asked_for_once_and_its_requests_wait(rig: Rig, front: Front) -> None:
    requests = [front.submit(5, [X]) for _ in range(3)]
    rig.settle()
    assert rig.heard() == [Activate(slot=5)]
    assert rig.leases.read(5)[1] == 3
    rig.serve(5, weight=4.0)
    rig.answered(front, *requests)
    np.testing.assert_array_equal(front.outputs(requests[2])[0], 4 * X)
    assert front.answers[requests[0]][6] == 3
    assert rig.heard() == []


def test_a_version_that_is_not_there_holds_up_no_other(rig: Rig, front: Front) -> None:
    ready(rig, front)
    front.submit(5, [X])
    request = front.submit(3, [X])
    rig.answered(front, request)
    assert len(front.answers) == 2


def test_an_evicted_version_is_asked_for_again_and_is_not_bound_again(
    rig: Rig, front: Front, programs: Programs
) -> None:
    ready(rig, front)
    assert _shm.try_evict(rig.table, [rig.leases], 3, 1)
    rig.table.set(3, _shm.ABSENT, 1)
    request = front.submit(3, [X])
    rig.settle()
    assert rig.heard() == [Activate(slot=3)]
    assert request not in front.collect()
    assert rig.leases.read(3)[:2] == (0, 1)
    rig.control.send(rig.publish(3, 2, 5.0, page=20))
    rig.answered(front, request)
    np.testing.assert_array_equal(front.outputs(request)[0], 5 * X)
    assert programs[3].bindings == 1


def test_a_placement_that_is_already_stale_is_not_used(rig: Rig, front: Front) -> None:
    ready(rig, front)
    rig.table.set(3, _shm.LOADING, 1)
    request = front.submit(3, [X])
    rig.settle()
    rig.control.send(Placed(slot=3, generation=2, extents=((0, PAGE_BYTES),)))
    rig.settle()
    assert rig.heard() == [Activate(slot=3), Activate(slot=3)]
    rig.control.send(rig.publish(3, 3, 7.0))
    rig.answered(front, request)
    np.testing.assert_array_equal(front.outputs(request)[0], 7 * X)


def test_weights_may_come_before_the_program(
    rig: Rig, front: Front, programs: Programs
) -> None:
    programs.gate.clear()
    rig.serve(3)
    request = front.submit(3, [X])
    rig.settle()
    assert request not in front.collect()
    programs.gate.set()
    rig.answered(front, request)
    assert front.status(request) == _shm.OK


def test_a_failed_activation_answers_what_waits_and_is_tried_again(rig: Rig, front: Front) -> None:
    request = front.submit(5, [X])
    rig.settle()
    rig.heard()
    rig.control.send(
        ActivationFailed(slot=5, code="overloaded", message="no room", retry_after_s=1.5)
    )
    rig.answered(front, request)
    assert front.status(request) == _shm.NOT_RESIDENT
    assert front.text(request) == "overloaded\nno room"
    assert front.answers[request][7] == 1500
    front.submit(5, [X])
    rig.settle()
    assert rig.heard() == [Activate(slot=5)]


def test_a_program_that_cannot_be_loaded_fails_its_requests_and_is_reported(
    rig: Rig, front: Front, programs: Programs
) -> None:
    programs.error = Forbidden("code is not allowed")
    rig.serve(3)
    first = front.submit(3, [X])
    rig.answered(front, first)
    assert front.status(first) == _shm.NOT_RESIDENT
    text = "model 'm3' version 1 cannot be started: code is not allowed"
    assert front.text(first) == f"forbidden\n{text}"
    assert BindFailed(slot=3, message=text) in rig.heard()
    # Nobody tries again at once: the next request is answered from memory.
    second = front.submit(3, [X])
    rig.answered(front, second)
    assert front.text(second) == f"forbidden\n{text}"
    assert rig.heard() == []


def test_a_version_that_failed_is_tried_again_later(
    rig: Rig, front: Front, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overcommit.runtime.bound.LOAD_BACKOFF_S", (0.0,))
    programs.error = OSError("gone")
    rig.serve(3)
    rig.answered(front, front.submit(3, [X]))
    programs.error = None
    request = front.submit(3, [X])
    rig.until(lambda: Activate(slot=3) in rig.heard())
    rig.control.send(rig.publish(3, 2, 2.0))
    rig.answered(front, request)
    assert front.status(request) == _shm.OK


def test_extents_that_do_not_hold_the_image_break_the_version_only(rig: Rig, front: Front) -> None:
    request = front.submit(5, [X])
    rig.control.send(info(5))
    rig.table.set(5, _shm.RESIDENT, 1)
    rig.control.send(Placed(slot=5, generation=1, extents=()))
    rig.answered(front, request)
    assert front.status(request) == _shm.NOT_RESIDENT
    ready(rig, front)


def test_a_forgotten_version_is_let_go_and_asked_for_anew(rig: Rig, front: Front) -> None:
    ready(rig, front)
    rig.control.send(Forget(slot=3))
    rig.until(lambda: rig.worker.versions.get(3) is None)
    request = front.submit(3, [X])
    rig.settle()
    assert rig.heard() == [Activate(slot=3)]
    rig.control.send(Forget(slot=3))
    rig.answered(front, request)
    assert front.text(request).startswith("unavailable\n")


def test_bound_models_are_bounded_and_come_back(
    rig: Rig, front: Front, programs: Programs
) -> None:
    rig.worker.versions.bound_max = 2
    for slot in (1, 2, 3):
        ready(rig, front, slot)
    assert [rig.worker.versions.get(slot).model is None for slot in (1, 2, 3)] == [True, False, False]  # type: ignore[union-attr]
    request = front.submit(1, [X])
    rig.settle()
    assert rig.heard() == [Activate(slot=1)]
    rig.control.send(rig.publish(1, 1, 2.0))
    rig.answered(front, request)
    assert programs[1].bindings == 2


def test_a_lease_that_is_dropped_rings_a_hungry_supervisor(rig: Rig, front: Front) -> None:
    ready(rig, front)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(rig.fds["supervisor_bell"])
    rig.table.set_hungry(True)
    rig.answered(front, front.submit(3, [X]))
    assert os.eventfd_read(rig.fds["supervisor_bell"]) == 1


def test_a_version_is_warmed_up_with_a_row_of_zeros_when_nothing_waits(
    rig: Rig, front: Front, programs: Programs
) -> None:
    rows: list[list[list[float]]] = []

    def fail_on_zeros(inputs: dict[str, Array]) -> dict[str, Array]:
        rows.append(inputs["x"].tolist())
        if not inputs["x"].any():
            raise ValueError("no zeros, please")
        return {"y": inputs["x"]}

    programs[3].run = fail_on_zeros
    fields = {"inputs": vector_config().inputs, "outputs": vector_config().outputs}
    rig.serve(3, config=ModelConfig(warm_up=True, **fields))  # type: ignore[arg-type]
    rig.until(lambda: bool(rows))
    request = front.submit(3, [X])
    rig.answered(front, request)
    assert rows == [[[0, 0, 0, 0]], X.tolist()]
    assert front.status(request) == _shm.OK


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


# --- peers that lie or leave --------------------------------------------------------------------
@pytest.mark.parametrize(
    "lie",
    ["id", "kind", "ingress", "egress", "twice", "header"],
)
def test_a_front_end_that_lies_is_dropped_and_others_go_on(
    rig: Rig, front: Front, lie: str
) -> None:
    other = rig.link(seat=1)
    ready(rig, front)
    waits = front.submit(5, [X])
    rig.settle()
    own = front.next_id()
    if lie == "id":
        front.push(other.next_id(), 3)
    elif lie == "kind":
        front.push(own, 3, kind=77)
    elif lie == "ingress":
        front.push(own, 3, PAYLOAD_BYTES - 8, 16, capacity=0)
    elif lie == "egress":
        front.push(own, 3, PAYLOAD_BYTES - 8, 0, capacity=CAPACITY)
    elif lie == "twice":
        front.push(waits, 5)
    else:
        front.submit(3, b"\xff" * 64)
    rig.settle()
    assert len(rig.worker.links) == 1
    assert rig.leases.read(5)[1] == 0
    request = other.submit(3, [X])
    rig.answered(other, request)
    assert waits not in front.collect()


def test_a_corrupt_ring_is_dropped(rig: Rig, front: Front) -> None:
    rig.settle()
    link = mmap.mmap(front.fds["link"], 2 * front.half)
    link[_shm.LINE : _shm.LINE + 8] = (1 << 40).to_bytes(8, "little")  # the tail
    rig.settle()
    assert len(rig.worker.links) == 0


def test_a_front_end_that_collects_nothing_and_asks_for_more_is_dropped(rig: Rig) -> None:
    front = rig.link(slots=4)
    rig.serve(3)
    for _ in range(2):
        for _ in range(4):
            front.submit(3, [X])
        rig.until(lambda: front.submissions.depth() == 0 and not len(rig.worker.batcher))
        rig.settle()
    assert len(rig.worker.links) == 0


def test_the_jobs_of_a_front_end_that_died_are_dropped(rig: Rig, front: Front) -> None:
    front.submit(5, [X])
    rig.settle()
    assert rig.leases.read(5)[1] == 1
    rig.unlink(front)
    rig.until(lambda: len(rig.worker.links) == 0)
    assert rig.leases.read(5)[1] == 0
    successor = rig.link(epoch=2)
    ready(rig, successor)


def test_a_link_of_another_incarnation_is_not_used(rig: Rig) -> None:
    rig.epoch += 1
    rig.link()
    rig.settle()
    assert len(rig.worker.links) == 0
