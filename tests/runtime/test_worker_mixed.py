"""Batches across versions in the worker's loop, over real rings, memory, leases and torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest
import torch
from front_rig import Front
from torch import nn
from worker_rig import Rig, X, vector_config

from overcommit.runtime import _shm
from overcommit.runtime.bound import Opened
from overcommit.runtime.config import ModelConfig
from overcommit.runtime.engines import binding
from overcommit.runtime.engines.bound_module import BoundModule
from overcommit.runtime.engines.mixed import MixedProgram, MixedPrograms
from overcommit.runtime.engines.torch_module import Call
from overcommit.runtime.image import ImageHeader, TensorEntry
from overcommit.runtime.lanes import RUN_ALONE
from overcommit.runtime.worker_messages import Activate, Forget, VersionInfo

SLOTS = range(1, 9)
CONFIG = vector_config(max_batch_size=16)
ENTRIES = (TensorEntry("scale", "parameter", True, "float32", (1,), (1,), 0, 4),)
HEADER = ImageHeader(1, "torch", "scale", {}, "", 4, ENTRIES, CONFIG)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if x.shape[-1] != 4:
            raise ValueError("four numbers, please")
        return {"y": x * self.scale}


class Program:
    key = "scale"

    def __init__(self) -> None:
        self._skeleton = binding.Skeleton(Scale(), ENTRIES)
        self._mixed = MixedPrograms(self.bind_tensors)

    def bind(self, header: ImageHeader, memory: memoryview) -> BoundModule:
        return BoundModule(Call(self._skeleton.bind(ENTRIES, memory)), CONFIG)

    def bind_tensors(self, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> BoundModule:
        return BoundModule(Call(self._skeleton.install(tensors)), config)

    def mixed(self, header: ImageHeader) -> MixedProgram | None:
        return self._mixed.of(header)


@pytest.fixture
def rig() -> Iterator[Rig]:
    program = Program()

    def open_program(info: VersionInfo) -> Opened:
        return cast(Opened, (HEADER, program))

    rig = Rig(open_program)
    yield rig
    rig.close()


@pytest.fixture
def front(rig: Rig) -> Front:
    front = rig.link()
    for slot in SLOTS:
        rig.serve(slot, weight=float(slot), config=CONFIG)
    rig.answered(front, *(front.submit(slot, [X]) for slot in SLOTS))
    rig.heard()
    return front


def ask_all(rig: Rig, front: Front, scale: float = 1.0) -> list[int]:
    """Ask every version at once; check the answers; return the sizes of their batches."""
    requests = [front.submit(slot, [X * scale]) for slot in SLOTS]
    rig.answered(front, *requests)
    for slot, request in zip(SLOTS, requests, strict=True):
        np.testing.assert_array_equal(front.outputs(request)[0], X * scale * slot)
    return [front.answers[request][6] for request in requests]


def until_mixed(rig: Rig, front: Front) -> None:
    """Ask until the program is recorded and its trials are over."""
    sizes: list[int] = []

    def is_mixed() -> bool:
        sizes[:] = ask_all(rig, front)
        return max(sizes) > 1

    rig.until(is_mixed)
    assert sizes == [len(SLOTS)] * len(SLOTS)


def test_versions_share_a_batch_and_each_answers_with_its_own_weights(
    rig: Rig, front: Front
) -> None:
    until_mixed(rig, front)
    for scale in (3.0, -1.0, 0.0):
        assert ask_all(rig, front, scale) == [len(SLOTS)] * len(SLOTS)
    assert not any(rig.leases.read(slot)[0] for slot in SLOTS), "every lease was dropped"


def test_a_version_that_was_evicted_is_asked_for_while_the_others_are_answered(
    rig: Rig, front: Front
) -> None:
    until_mixed(rig, front)
    rig.table.set(4, _shm.ABSENT, 1)
    requests = {slot: front.submit(slot, [X]) for slot in SLOTS}
    rig.answered(front, *(request for slot, request in requests.items() if slot != 4))
    assert requests[4] not in front.collect()
    assert Activate(slot=4) in rig.heard()
    rig.control.send(rig.publish(4, 2, 40.0, page=60))
    rig.answered(front, requests[4])
    np.testing.assert_array_equal(front.outputs(requests[4])[0], 40 * X)
    requests = {slot: front.submit(slot, [X]) for slot in SLOTS}
    rig.answered(front, *requests.values())
    np.testing.assert_array_equal(front.outputs(requests[4])[0], 40 * X)
    assert front.answers[requests[4]][6] == len(SLOTS), "it is mixed again, from its new place"


def test_who_must_run_alone_does(rig: Rig, front: Front) -> None:
    until_mixed(rig, front)
    requests = [front.submit(slot, [X], flags=RUN_ALONE if slot == 2 else 0) for slot in SLOTS]
    rig.answered(front, *requests)
    sizes = [front.answers[request][6] for request in requests]
    assert sizes == [7, 1, 7, 7, 7, 7, 7, 7]


def test_a_forgotten_version_leaves_the_others_alone(rig: Rig, front: Front) -> None:
    until_mixed(rig, front)
    rig.control.send(Forget(slot=5))
    rig.settle()
    requests = [front.submit(slot, [X]) for slot in SLOTS if slot != 5]
    rig.answered(front, *requests)
    assert all(front.status(request) == _shm.OK for request in requests)


def test_mixing_that_breaks_costs_no_request(
    rig: Rig, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    until_mixed(rig, front)

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(MixedProgram, "copy_in", fail)
    assert ask_all(rig, front) == [1] * len(SLOTS)
    assert ask_all(rig, front) == [1] * len(SLOTS), "and it is not tried again"
