"""Batches on a device of its own, with a device that the test plays."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import numpy as np
import pytest
import torch

from overcommit.runtime.config import Batching, ModelConfig, TensorSpec
from overcommit.runtime.device_limits import GRAPH_AFTER, GRAPH_SHAPES_MAX
from overcommit.runtime.engines import places
from overcommit.runtime.engines.bound_module import BoundModule
from overcommit.runtime.engines.device_runner import DeviceRunner
from overcommit.runtime.engines.graphs import (
    Call,
    CannotCapture,
    GraphBook,
    ModelGraphs,
    Tensors,
    bucket_of,
)
from overcommit.runtime.errors import DeviceLost, ModelError


class Graph:
    """What a replay does: the recorded call over its own buffers, as a CUDA graph would."""

    def __init__(self, call: Call, inputs: Tensors) -> None:
        self._call, self._buffers = call, {name: t.clone() for name, t in inputs.items()}

    def replay(self, inputs: Tensors) -> Tensors:
        for name, buffer in self._buffers.items():
            buffer.copy_(inputs[name])
        return self._call(self._buffers)


class Device:
    """Counts what is under way; fails when told to."""

    place = "cpu"
    kernels = None

    def __init__(self) -> None:
        self.under_way = 0
        self.gave_back = 0
        self.error: Exception | None = None
        self.refuses = False

    def entered(self, seat: int) -> Any:
        return contextlib.nullcontext()

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        self.under_way += 1
        return tensor.clone()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self.under_way += 1
        return tensor.clone()

    def settle(self, seat: int | None = None) -> None:
        if self.error is not None:
            raise self.error
        self.under_way = 0

    def mark(self, seat: int) -> Any:
        raise AssertionError("no batch of these tests is begun and left")

    def capture(self, seat: int, call: Call, inputs: Tensors) -> Graph:
        assert not self.under_way, "something is under way while a graph is captured"
        if self.refuses:
            raise CannotCapture("it looks at values")
        return Graph(call, inputs)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)

    def give_back(self) -> None:
        self.gave_back += 1


class Doubler:
    """y = 2 x; notes the rows of each call."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.error: BaseException | None = None

    def __call__(self, arguments: dict[str, Any]) -> torch.Tensor:
        self.rows.append(len(arguments["x"]))
        if self.error is not None:
            raise self.error
        return arguments["x"] * 2


def config(rows_max: int = 8, datatype: str = "FP32") -> ModelConfig:
    fields = {"datatype": datatype, "shape": (-1, 2), "axes": ("batch", None)}
    return ModelConfig(
        inputs=(TensorSpec(name="x", **fields),),  # type: ignore[arg-type]
        outputs=(TensorSpec(name="y", **fields),),  # type: ignore[arg-type]
        batching=Batching(max_batch_size=rows_max),
    )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    runner = DeviceRunner(made)
    monkeypatch.setattr(places, "runner", lambda: runner)
    made.book = runner.book  # type: ignore[attr-defined]
    return made


def run(model: BoundModule, rows: int, base: int = 0) -> None:
    x = np.arange(base, base + 2 * rows, dtype=np.float32).reshape(rows, 2)
    np.testing.assert_array_equal(model.run({"x": x})["y"], 2 * x)


def test_a_shape_that_comes_again_is_captured_and_replayed_with_new_values(device: Device) -> None:
    double = Doubler()
    model = BoundModule(double, config())
    for base in range(GRAPH_AFTER + 3):
        run(model, 4, base)
    book: GraphBook = device.book  # type: ignore[attr-defined]
    assert (book.captures, book.replays) == (1, 3)
    assert device.under_way == 0


def test_rows_are_padded_to_a_bucket_and_cut_off_again(device: Device) -> None:
    double = Doubler()
    model = BoundModule(double, config(rows_max=6))
    for rows in (1, 3, 5, 6):
        run(model, rows)
    assert double.rows == [1, 4, 6, 6]


def test_a_model_whose_outputs_have_no_rows_is_not_padded(device: Device) -> None:
    double = Doubler()
    run(BoundModule(double, config(rows_max=0)), 3)
    assert double.rows == [3]


def test_what_cannot_be_captured_is_called_for_good(device: Device) -> None:
    device.refuses = True
    double = Doubler()
    model = BoundModule(double, config())
    for base in range(GRAPH_AFTER + 3):
        run(model, 3, base)
    assert double.rows[-1] == 3, "no bucket where there is no graph"
    assert device.book.captures == 0  # type: ignore[attr-defined]


def test_no_more_shapes_are_watched_than_the_limit(device: Device) -> None:
    model = BoundModule(Doubler(), config(rows_max=0))
    for rows in range(1, GRAPH_SHAPES_MAX + 5):
        run(model, rows)
    assert len(model.graphs.shapes) == GRAPH_SHAPES_MAX


def test_texts_are_called_without_a_graph(device: Device) -> None:
    def first(arguments: dict[str, Any]) -> Any:
        return [text.decode() for text in arguments["x"][:, 0]]

    fields = {"datatype": "BYTES", "shape": (-1, 1), "axes": ("batch", None)}
    model = BoundModule(first, ModelConfig(inputs=(TensorSpec(name="x", **fields),)))  # type: ignore[arg-type]
    texts = np.array([[b"a"], [b"b"]], object)
    assert list(model.run({"x": texts})["output"]) == ["a", "b"]


def test_memory_that_runs_out_fails_the_batch_and_gives_graphs_back(device: Device) -> None:
    double = Doubler()
    model = BoundModule(double, config())
    for _ in range(GRAPH_AFTER + 1):
        run(model, 1)
    assert len(device.book) == 1  # type: ignore[attr-defined]
    double.error = MemoryError("none left")
    with pytest.raises(ModelError, match="MemoryError: none left"):
        run(model, 2)
    assert (len(device.book), device.gave_back, device.under_way) == (0, 1, 0)  # type: ignore[attr-defined]
    double.error = None
    run(model, 2)


def test_an_error_of_the_model_leaves_nothing_under_way(device: Device) -> None:
    double = Doubler()
    double.error = ValueError("bad")
    with pytest.raises(ModelError, match="ValueError: bad"):
        run(BoundModule(double, config()), 1)
    assert (device.under_way, device.gave_back) == (0, 0)


def test_a_device_that_does_not_come_to_rest_ends_the_process(device: Device) -> None:
    double = Doubler()
    double.error = RuntimeError("an illegal memory access was encountered")
    device.error = RuntimeError("an illegal memory access was encountered")
    with pytest.raises(DeviceLost, match="the GPU is lost for this process"):
        run(BoundModule(double, config()), 1)
    assert not issubclass(DeviceLost, Exception), "the batch boundary must not catch it"


# --- the book -----------------------------------------------------------------------------------
def test_the_graph_replayed_longest_ago_goes_first_and_comes_again() -> None:
    book = GraphBook(Graph, graphs_max=2)
    models = [ModelGraphs() for _ in range(3)]
    inputs = {"x": torch.ones(1)}

    def use(model: ModelGraphs, times: int) -> None:
        for _ in range(times):
            assert book.run(model, 1, dict, inputs)["x"].item() == 1

    use(models[0], GRAPH_AFTER + 1)
    use(models[1], GRAPH_AFTER + 1)
    use(models[0], 1)
    use(models[2], GRAPH_AFTER + 1)
    assert [model.shapes[1].graph is not None for model in models] == [True, False, True]
    use(models[1], GRAPH_AFTER + 1)
    assert (len(book), book.captures) == (2, 4)


def test_graphs_go_with_their_model() -> None:
    book = GraphBook(Graph)
    model = ModelGraphs()
    for _ in range(GRAPH_AFTER + 1):
        book.run(model, 1, dict, {"x": torch.ones(1)})
    assert len(book) == 1
    del model
    gc.collect()
    assert len(book) == 0


@pytest.mark.parametrize(
    ("rows", "rows_max", "bucket"), [(1, 32, 1), (3, 32, 4), (17, 32, 32), (5, 6, 6), (9, 4, 9)]
)
def test_buckets_are_powers_of_two_up_to_the_models_limit(
    rows: int, rows_max: int, bucket: int
) -> None:
    assert bucket_of(rows, rows_max) == bucket
