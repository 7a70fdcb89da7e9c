"""Versions in a worker: asked for, placed, bound, lost, broken, forgotten."""

from __future__ import annotations

import os
import select
import threading

import numpy as np
import pytest
from front_rig import Array, Front
from worker_rig import Programs, Rig, X, info, plain, ready, vector_config

from overcommit.runtime import _shm, wishes
from overcommit.runtime.arena import Mapping
from overcommit.runtime.bound import Version
from overcommit.runtime.config import NEVER_NS, PAGE_BYTES, ModelConfig
from overcommit.runtime.errors import Forbidden
from overcommit.runtime.worker_messages import (
    Activate,
    ActivationFailed,
    BindFailed,
    Coming,
    Forget,
    Placed,
)


def versions_of(rig: Rig, *slots: int) -> list[Version]:
    return [version for slot in slots if (version := rig.worker.versions.get(slot)) is not None]


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


def test_the_page_says_that_requests_wait_before_the_supervisor_is_asked(
    rig: Rig, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[object, int]] = []
    rig.settle()
    monkeypatch.setattr(
        *(rig.worker.control, "send"),
        lambda message: seen.append((plain(message), rig.leases.read(5)[1])),
    )
    front.submit(5, [X])
    rig.settle()
    assert seen == [(Activate(slot=5), 1)]


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


def test_what_is_mapped_ahead_is_read_only_when_it_is_placed(
    rig: Rig, front: Front, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = front.submit(5, [X])
    where = ((20 * PAGE_BYTES, PAGE_BYTES),)
    rig.control.send(info(5))
    rig.table.set(5, _shm.LOADING, 0)
    rig.control.send(Coming(slot=5, generation=1, extents=where))
    rig.until(lambda: bool((found := versions_of(rig, 5)) and found[0].opened))
    (version,) = versions_of(rig, 5)
    assert version.mapping is not None
    assert version.mapping.is_at(where, 1, ())
    assert not version.is_runnable
    assert request not in front.collect()
    mapped: list[object] = []
    monkeypatch.setattr(Mapping, "map", lambda *told: mapped.append(told))
    rig.control.send(rig.publish(5, 1, 6.0, page=20))
    rig.answered(front, request)
    np.testing.assert_array_equal(front.outputs(request)[0], 6 * X)
    assert (mapped, programs[5].bindings) == ([], 1)


def test_a_version_that_comes_elsewhere_than_foretold_is_read_where_it_is(
    rig: Rig, front: Front
) -> None:
    request = front.submit(5, [X])
    rig.control.send(info(5))
    rig.publish(5, 0, 9.0, page=21)
    rig.table.set(5, _shm.LOADING, 0)
    rig.control.send(Coming(slot=5, generation=1, extents=((21 * PAGE_BYTES, PAGE_BYTES),)))
    rig.settle()
    rig.control.send(ActivationFailed(slot=5, code="unavailable", message="torn"))
    rig.answered(front, request)
    assert front.status(request) == _shm.NOT_RESIDENT
    request = front.submit(5, [X])
    rig.control.send(rig.publish(5, 1, 4.0, page=22))
    rig.answered(front, request)
    np.testing.assert_array_equal(front.outputs(request)[0], 4 * X)


def test_what_is_placed_is_not_mapped_elsewhere_by_late_news(rig: Rig, front: Front) -> None:
    ready(rig, front)
    rig.control.send(Coming(slot=3, generation=1, extents=((21 * PAGE_BYTES, PAGE_BYTES),)))
    rig.control.send(Coming(slot=4, generation=1, extents=((21 * PAGE_BYTES, PAGE_BYTES),)))
    rig.settle()
    request = front.submit(3, [X])
    rig.answered(front, request)
    np.testing.assert_array_equal(front.outputs(request)[0], 2 * X)


def test_a_foretold_place_that_cannot_be_mapped_is_said_when_it_is_placed(
    rig: Rig, front: Front
) -> None:
    request = front.submit(5, [X])
    rig.control.send(info(5))
    rig.control.send(Coming(slot=5, generation=1, extents=()))
    rig.settle()
    assert request not in front.collect()
    rig.control.send(rig.publish(5, 1, 4.0))
    rig.answered(front, request)
    np.testing.assert_array_equal(front.outputs(request)[0], 4 * X)


def test_weights_may_come_before_the_program(rig: Rig, front: Front, programs: Programs) -> None:
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


def test_a_failed_activation_does_not_answer_what_can_run(rig: Rig, front: Front) -> None:
    rig.serve(3, config=vector_config(max_queue_delay_us=3_600_000_000))
    request = front.submit(3, [X])
    rig.until(lambda: any(version.is_runnable for version in versions_of(rig, 3)))
    rig.control.send(ActivationFailed(slot=3, code="overloaded", message="no room"))
    rig.settle()
    assert request not in front.collect()


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
    programs.error = None
    rig.control.send(rig.publish(3, 2, 2.0))
    rig.settle()
    assert rig.heard() == []
    assert [version.mapping for version in versions_of(rig, 3)] == [None]


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


def test_bound_models_are_bounded_and_come_back(rig: Rig, front: Front, programs: Programs) -> None:
    rig.worker.versions.bound_max = 2
    for slot in (1, 2, 3):
        ready(rig, front, slot)
    bound = [version.model is not None for version in versions_of(rig, 1, 2, 3)]
    assert bound == [False, True, True]
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


def rings_for(rig: Rig, front: Front, slot: int) -> bool:
    """Whether a request for this version, to a worker that sleeps, wakes the supervisor."""
    bell, rings = rig.fds["supervisor_bell"], rig.worker.links.rings
    front.submit(slot, [X])
    rig.worker.wishes.herald(rings)
    rung = bool(select.select((bell,), (), (), 0)[0])
    if rung:
        os.eventfd_read(bell)
    rig.settle()
    rig.heard()
    return rung


def test_a_request_for_what_is_not_there_wakes_the_supervisor_ahead(
    rig: Rig, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wishes, "QUIET_NS", 0)
    ready(rig, front)
    rig.worker.wishes.herald(rig.worker.links.rings)  # for nothing
    assert not rings_for(rig, front, 3)
    assert rings_for(rig, front, 5)
    assert not rings_for(rig, front, 5)  # it was asked for, and waits
    assert rings_for(rig, front, 6)
    monkeypatch.setattr(wishes, "QUIET_NS", 10**18)  # who was asked just now is awake
    assert not rings_for(rig, front, 7)


def test_the_supervisor_is_woken_so_often_at_most_whatever_becomes_of_the_requests(
    rig: Rig, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wishes, "QUIET_NS", 10**18)
    rig.worker.wishes._asked_ns = -(10**19)
    rig.settle()
    front.submit(5, [X])
    for _ in range(3):
        rig.worker.wishes.herald(rig.worker.links.rings)
    assert os.eventfd_read(rig.fds["supervisor_bell"]) == 1


def test_a_worker_that_sleeps_wakes_the_supervisor_before_it_asks(rig: Rig, front: Front) -> None:
    asked = threading.Timer(0.2, lambda: front.submit(5, [X]))
    rig.settle()
    asked.start()
    rig.worker.sleep()
    asked.join()
    assert os.eventfd_read(rig.fds["supervisor_bell"]) == 1
    assert rig.heard() == []
    rig.settle()
    assert rig.heard() == [Activate(slot=5)]


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


# --- what the mover publishes ---------------------------------------------------------------------
def coming(rig: Rig, front: Front) -> int:
    """A request waits for version 5, whose first load is said to end on page 20."""
    request = front.submit(5, [X])
    rig.control.send(info(5))
    rig.table.set(5, _shm.LOADING, 0)
    rig.control.send(Coming(slot=5, generation=1, extents=((20 * PAGE_BYTES, PAGE_BYTES),)))
    rig.settle()
    return request


def test_what_was_coming_runs_as_soon_as_the_word_says_so_without_placed(
    rig: Rig, front: Front
) -> None:
    request = coming(rig, front)
    assert request not in front.collect()
    placed = rig.publish(5, 1, 6.0, page=20)
    os.eventfd_write(rig.fds["doorbell"], 1)
    rig.answered(front, request)
    np.testing.assert_array_equal(front.outputs(request)[0], 6 * X)
    # Its Placed comes when it has been evicted, and asked for again: if that was the answer, none follows.
    assert _shm.try_evict(rig.table, [rig.leases], 5, 1)
    rig.table.set(5, _shm.ABSENT, 1)
    rig.heard()
    request = front.submit(5, [X])
    rig.settle()
    assert rig.heard() == [Activate(slot=5)]
    rig.control.send(placed)
    rig.settle()
    assert rig.heard() == [Activate(slot=5)]
    assert request not in front.collect()
    rig.control.send(rig.publish(5, 2, 3.0, page=21))
    rig.answered(front, request)
    np.testing.assert_array_equal(front.outputs(request)[0], 3 * X)


def test_the_placed_of_what_runs_already_maps_nothing(
    rig: Rig, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = coming(rig, front)
    placed = rig.publish(5, 1, 6.0, page=20)
    os.eventfd_write(rig.fds["doorbell"], 1)
    rig.answered(front, request)
    # Others are mapped, so it would not do to ask whether anything has changed.
    rig.serve(3)
    rig.settle()
    rig.heard()
    mapped: list[object] = []
    monkeypatch.setattr(Mapping, "map", lambda *told: mapped.append(told))
    rig.control.send(placed)
    rig.settle()
    assert (mapped, rig.heard()) == ([], [])
    rig.answered(front, front.submit(5, [X]))


def test_a_try_that_failed_is_not_taken_for_the_one_that_follows(rig: Rig, front: Front) -> None:
    request = coming(rig, front)
    # The worker has not heard of the failure yet, and another one has had it loaded elsewhere.
    rig.publish(5, 1, 9.0, page=20)
    placed = rig.publish(5, 2, 4.0, page=22)
    os.eventfd_write(rig.fds["doorbell"], 1)
    rig.settle()
    assert request not in front.collect()
    rig.control.send(placed)
    rig.answered(front, request)
    np.testing.assert_array_equal(front.outputs(request)[0], 4 * X)


def test_a_worker_watches_what_was_announced_until_it_is_there(rig: Rig, front: Front) -> None:
    request = coming(rig, front)
    wishes, rings = rig.worker.wishes, rig.worker.links.rings
    assert not wishes.watch(rings, NEVER_NS), "nothing was announced"
    rig.table.set(5, _shm.LOADING, 1)
    assert not wishes.watch(rings, 0), "its time was over"
    front.submit(5, [X])
    assert wishes.watch(rings, NEVER_NS), "a ring comes first"
    rig.settle()
    rig.publish(5, 1, 6.0, page=20)
    rig.answered(front, request)
