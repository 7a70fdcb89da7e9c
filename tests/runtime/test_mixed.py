"""A program recorded over several versions answers as each version does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from overcommit.runtime.config import Batching, ModelConfig, TensorSpec
from overcommit.runtime.engines import binding
from overcommit.runtime.engines.bound_module import BoundModule
from overcommit.runtime.engines.manifest import registered
from overcommit.runtime.engines.mixed import (
    IMAGE_BYTES_MAX,
    SIZES,
    MixedProgram,
    MixedPrograms,
    MixingError,
)
from overcommit.runtime.engines.torch_module import Call
from overcommit.runtime.image import ImageHeader, TensorEntry

Array = np.ndarray[Any, Any]
WIDE = 12


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDE, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Convolutional(nn.Module):
    """Convolution, batch norm with its buffers, an in-place activation, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 2, bias=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.body(x.unsqueeze(1))
        return {"y": self.head(hidden.mean(-1)).softmax(-1)}


class Tied(nn.Module):
    """One tensor under two names, and one that the answer does not depend on by row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDE, WIDE)
        self.second = nn.Linear(WIDE, WIDE)
        self.second.weight = self.first.weight
        self.register_buffer("offset", torch.zeros(WIDE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x * 1
        kept.add_(self.offset)
        return self.second(torch.tanh(self.first(x))) + kept  # type: ignore[no-any-return]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Family:
    """A module's program, and versions of it with weights of their own."""

    def __init__(self, module: nn.Module, count: int) -> None:
        module = module.eval().requires_grad_(False)
        entries: list[TensorEntry] = []
        end = 0
        seen: dict[int, str] = {}
        for name, role, persistent, tensor in registered(module):
            alias = seen.get(id(tensor))
            nbytes = tensor.numel() * tensor.element_size()
            entries.append(
                TensorEntry(
                    name=name,
                    role=role,
                    persistent=persistent,
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    shape=tuple(tensor.shape),
                    stride=tuple(tensor.stride()),
                    offset=end,
                    nbytes=nbytes,
                    alias_of=alias,
                )
            )
            if alias is None:
                seen[id(tensor)] = name
                end += -(-nbytes // 64) * 64
        self.config = ModelConfig(
            inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, WIDE)),),
            outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, -1)),),
            batching=Batching(max_batch_size=64),
        )
        self.header = ImageHeader(1, "torch", "key", {}, "", end, tuple(entries), self.config)
        self.skeleton = binding.Skeleton(module)
        random = np.random.default_rng(7)
        self.memories = []
        for _ in range(count):
            memory = np.zeros(end, np.uint8)
            for entry in entries:
                if entry.dtype == "float32" and entry.alias_of is None:
                    values = random.random(entry.nbytes // 4, np.float32) + np.float32(0.1)
                    memory[entry.offset : entry.offset + entry.nbytes] = values.view(np.uint8)
            self.memories.append(memory)

    def bind(self, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> BoundModule:
        return BoundModule(Call(self.skeleton.install(tensors)), config)

    def alone(self, version: int, x: Array) -> Array:
        memory = memoryview(self.memories[version])
        tensors = binding.views(self.header.tensors, memory)
        return self.bind(self.config, tensors).run({"x": x.copy()})["y"]

    def program(self) -> MixedProgram:
        return MixedProgram(self.bind, self.header)


def shapes(rows: int = 1) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {"x": ("FP32", (rows, WIDE))}


@pytest.mark.parametrize("make", [Mlp, Convolutional, Tied, Scale])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_size_answers_as_each_version_alone(make: Callable[[], nn.Module], rows: int) -> None:
    family = Family(make(), 6)
    traces = family.program().trace(shapes(rows))
    assert [trace.size for trace in traces] == list(SIZES)
    random = np.random.default_rng(1)
    for trace in traces:
        count = min(trace.size, 5)
        versions = [int(v) for v in random.integers(0, 6, count)]
        x = random.standard_normal((count * rows, WIDE)).astype(np.float32)
        addresses = [family.memories[version].ctypes.data for version in versions]
        answer = trace.run(addresses, {"x": x})["y"]
        parts = [x[at * rows : (at + 1) * rows] for at in range(count)]
        expected = [family.alone(*pair) for pair in zip(versions, parts, strict=True)]
        np.testing.assert_allclose(answer, np.concatenate(expected), rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(batches=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), max_size=5))
def test_what_ran_before_leaves_nothing_behind(batches: list[list[int]]) -> None:
    family = Family(Scale(), 4)
    trace = family.program().trace(shapes())[1]
    for number, versions in enumerate(batches):
        x = np.full((len(versions), WIDE), number + 1, np.float32)
        if number == 1:
            x[:] = np.nan
        addresses = [family.memories[version].ctypes.data for version in versions]
        answer = trace.run(addresses, {"x": x})["y"]
        expected = np.concatenate([family.alone(v, x[:1]) for v in versions])
        np.testing.assert_array_equal(answer, expected)


class LooksAtValues(Scale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale if x.sum() > 0 else x


class Throws(Scale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x) * self.scale


class LeavesTorch(Scale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.numpy() * 2)


class GivesNoRows(Scale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum() * self.scale[0]


@pytest.mark.parametrize("make", [LooksAtValues, Throws, LeavesTorch, GivesNoRows])
def test_a_program_that_cannot_be_recorded_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(MixingError):
        Family(make(), 1).program().trace(shapes())


def test_a_recording_is_short() -> None:
    """What vmap adds for each layer (views, expands, a product by one) is gone."""
    trace = Family(Mlp(), 1).program().trace(shapes())[0]
    calls = [node.target for node in trace.graph.nodes if node.op == "call_function"]
    assert calls == [torch.baddbmm, torch.relu, torch.baddbmm]


def of(family: Family, **changes: Any) -> MixedProgram | None:
    header = ImageHeader(
        1,
        "torch",
        "key",
        {},
        "",
        family.header.nbytes,
        changes.get("tensors", family.header.tensors),
        changes.get("config", family.config),
    )
    return MixedPrograms(family.bind).of(header)


def config(family: Family, datatype: str = "FP32", **batching: Any) -> ModelConfig:
    spec = TensorSpec(name="x", datatype=datatype, shape=(-1, WIDE))
    return ModelConfig(inputs=(spec,), outputs=family.config.outputs, batching=Batching(**batching))


def test_only_what_can_gain_is_mixed() -> None:
    family = Family(Scale(), 1)
    assert of(family) is not None
    assert of(family, tensors=()) is None
    assert of(family, config=config(family, max_batch_size=1)) is None
    assert of(family, config=config(family, across_versions=False)) is None
    assert of(family, config=config(family, datatype="BYTES")) is None


def big(nbytes: int) -> Sequence[TensorEntry]:
    return (TensorEntry("scale", "parameter", True, "float32", (nbytes // 4,), (1,), 0, nbytes),)


def test_large_models_are_left_alone() -> None:
    family = Family(Scale(), 1)
    assert of(family, tensors=big(IMAGE_BYTES_MAX)) is not None
    assert of(family, tensors=big(IMAGE_BYTES_MAX + 4)) is None


def test_versions_of_one_layout_share_a_program() -> None:
    family = Family(Scale(), 1)
    programs = MixedPrograms(family.bind)
    assert programs.of(family.header) is programs.of(family.header)
