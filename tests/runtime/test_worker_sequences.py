"""A worker with a model that has state: what it keeps, through evictions, failures and short blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from front_rig import Array, Front
from worker_rig import Programs, Rig, X

from overcommit.runtime import _shm, payload
from overcommit.runtime.config import (
    Batching,
    Control,
    ModelConfig,
    Sequence,
    SequenceState,
    TensorSpec,
)
from overcommit.runtime.sequence_terms import ASK_BYTES, Ask, encode, with_all_tensors

SLOT = 3
FIELDS: dict[str, Any] = {"datatype": "FP32", "shape": (-1, 4)}
STATE = SequenceState(input="sum", output="sum_out", **FIELDS)


def config_of(*, has_state: bool = True) -> ModelConfig:
    return with_all_tensors(
        ModelConfig(
            inputs=(TensorSpec(name="x", **FIELDS),),
            outputs=(TensorSpec(name="y", **FIELDS),),
            batching=Batching(max_batch_size=4),
            sequence=Sequence(
                idle_us=60_000_000,
                controls=(Control(kind="start", name="START", datatype="INT32"),),
                states=(STATE,) if has_state else (),
            ),
            warm_up=False,
        )
    )


class Summing:
    """Adds what comes to what came; keeps it itself where the version has no state."""

    def __init__(self) -> None:
        self.own = np.zeros((4, 4), np.float32)
        self.calls = 0
        self.fails = False

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        self.calls += 1
        if self.fails:
            raise ValueError("not now")
        x, starts = inputs["x"], inputs["START"][:, 0] != 0
        before = inputs.get("sum")
        if before is not None:
            total = before + x
            return {"y": total, "sum_out": total}
        rows = len(x)
        self.own[:rows][starts] = 0
        self.own[:rows] += x
        return {"y": self.own[:rows].copy()}


@pytest.fixture
def model(programs: Programs) -> Summing:
    summing = Summing()
    programs[SLOT].run = summing.run
    return summing


def submit(front: Front, key: int | str, **more: Any) -> int:
    flags = {name: more.pop(name) for name in ("is_start", "is_end", "is_again") if name in more}
    data = [X[:1].tobytes(), encode(Ask(key, **flags))]
    places, total = payload.plan(
        [(0, "FP32", len(data[0]), (1, 4)), (1, "UINT8", ASK_BYTES, (1, ASK_BYTES))]
    )
    block = bytearray(total)
    payload.encode(memoryview(block), places)
    for place, each in zip(places, data, strict=True):
        block[place.offset : place.offset + place.nbytes] = each
    return front.submit(SLOT, bytes(block), **more)


def total(rig: Rig, front: Front, request: int) -> float:
    """How often the request's row was added, by its answer."""
    rig.answered(front, request)
    assert front.status(request) == _shm.OK, front.text(request)
    return float((front.outputs(request)[0] / X[:1]).mean())


def test_states_are_still_there_when_the_weights_come_back(
    rig: Rig, front: Front, model: Summing
) -> None:
    rig.serve(SLOT, config=config_of())
    assert total(rig, front, submit(front, 7, is_start=True)) == 1
    assert _shm.try_evict(rig.table, [rig.leases], SLOT, 1)
    request = submit(front, 7)
    rig.settle()
    rig.control.send(rig.publish(SLOT, 2, 2.0, page=9))
    assert total(rig, front, request) == 2


def test_what_a_model_keeps_itself_is_said_to_be_lost_when_it_is_bound_anew(
    rig: Rig, front: Front, model: Summing
) -> None:
    rig.serve(SLOT, config=config_of(has_state=False))
    assert total(rig, front, submit(front, 7, is_start=True)) == 1
    assert total(rig, front, submit(front, 7)) == 2
    version = rig.worker.versions.get(SLOT)
    assert version is not None
    version.bindings += 1
    lost = submit(front, 7)
    rig.answered(front, lost)
    assert front.status(lost) == _shm.NOT_RESIDENT
    assert front.text(lost).startswith("worker_lost\n")
    assert total(rig, front, submit(front, 7, is_start=True)) == 1


def test_an_answer_that_is_too_long_is_kept_and_computed_once(
    rig: Rig, front: Front, model: Summing
) -> None:
    rig.serve(SLOT, config=config_of())
    assert total(rig, front, submit(front, "a", is_start=True)) == 1
    request = submit(front, "a", is_end=True, capacity=64)
    rig.answered(front, request)
    assert front.status(request) == _shm.TOO_LARGE
    calls = model.calls
    del front.answers[request]
    front._sent -= 1  # the same request, with another block
    assert submit(front, "a", is_end=True, is_again=True) == request
    assert total(rig, front, request) == 2
    assert model.calls == calls
    again = submit(front, "b", is_again=True)
    rig.answered(front, again)
    assert front.status(again) == _shm.MODEL_ERROR, "it is not kept for ever"


def test_a_failed_batch_is_run_again_one_by_one_only_where_states_are_kept_here(
    rig: Rig, front: Front, model: Summing
) -> None:
    for has_state, calls in ((True, 3), (False, 1)):
        rig.serve(SLOT, config=config_of(has_state=has_state), generation=1 + has_state)
        for key in (1, 2):
            assert total(rig, front, submit(front, key, is_start=True)) == 1
        model.fails, model.calls = True, 0
        failed = [submit(front, key) for key in (1, 2)]
        rig.answered(front, *failed)
        assert {front.status(request) for request in failed} == {_shm.MODEL_ERROR}
        assert model.calls == calls
        model.fails = False
        assert [total(rig, front, submit(front, key)) for key in (1, 2)] == [2, 2]


def test_requests_that_belong_to_no_sequence_do_not_reach_the_model(
    rig: Rig, front: Front, model: Summing
) -> None:
    rig.serve(SLOT, config=config_of())
    assert total(rig, front, submit(front, 1, is_start=True, is_end=True)) == 1
    refused = submit(front, 1)
    rig.answered(front, refused)
    assert front.status(refused) == _shm.BAD_REQUEST
    assert "must specify the START flag" in front.text(refused)
    assert model.calls == 1
