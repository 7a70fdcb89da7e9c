"""A bound module's calls: names for every kind of result, and arrays that stand alone."""

from __future__ import annotations

import dataclasses
from collections import namedtuple

import numpy as np
import pytest
import torch

from overcommit.runtime.config import ModelConfig, TensorSpec
from overcommit.runtime.engines.bound_module import BoundModule, flatten_outputs
from overcommit.runtime.errors import DeviceLost, ModelError

X = TensorSpec(name="x", datatype="FP32", shape=(-1, 4))


def test_every_shape_of_result_gets_names() -> None:
    @dataclasses.dataclass
    class Result:
        score: torch.Tensor
        cache: object = None

    one, two = torch.ones(1), torch.ones(2)
    pair = namedtuple("pair", "left right")
    cases: list[tuple[object, list[str], list[str]]] = [
        (one, [], ["output"]),
        (one, ["y"], ["y"]),
        ((one, two), [], ["output0", "output1"]),
        ([one, two], ["a"], ["a", "output1"]),
        ({"k": one, "none": None, "cache": object()}, ["a"], ["k"]),
        (pair(one, two), ["a"], ["left", "right"]),
        (Result(one), [], ["score"]),
        (["text", "more"], ["t"], ["t"]),
    ]
    for result, names, want in cases:
        assert list(flatten_outputs(result, names)) == want


def test_outputs_come_in_the_order_of_the_signature_and_none_may_be_missing() -> None:
    outputs = tuple(TensorSpec(name=n, datatype="FP32", shape=(1,)) for n in ("b", "a"))
    config = ModelConfig(outputs=outputs)
    model = BoundModule(lambda arguments: {"a": torch.ones(1), "b": torch.zeros(1)}, config)
    assert list(model.run({})) == ["b", "a"]
    with pytest.raises(ModelError, match=r"no output \['b'\]"):
        BoundModule(lambda arguments: {"a": torch.ones(1)}, config).run({})


def test_a_read_only_input_may_be_changed_by_the_model() -> None:
    config = ModelConfig(inputs=(X,))
    array = np.ones((1, 4), np.float32)
    array.flags.writeable = False
    model = BoundModule(lambda arguments: arguments["x"].add_(1), config)  # type: ignore[union-attr]
    assert model.run({"x": array})["output"][0, 0] == 2
    assert array[0, 0] == 1


def test_bfloat16_travels_as_its_bits() -> None:
    spec = TensorSpec(name="x", datatype="BF16", shape=(-1,))
    model = BoundModule(lambda arguments: arguments["x"] * 2, ModelConfig(inputs=(spec,)))
    bits = torch.tensor([1.5, -3.0], dtype=torch.bfloat16).view(torch.uint16).numpy()
    arrays, types = model.run_typed({"x": bits})
    assert types == {"output": "BF16"}
    assert arrays["output"].dtype == np.uint16
    back = torch.from_numpy(arrays["output"]).view(torch.bfloat16)
    assert back.tolist() == [3.0, -6.0]


def test_numbers_of_numpy_keep_their_type_and_texts_become_objects() -> None:
    results = {
        "n": np.arange(3, dtype=np.int32),
        "s": np.array(["a", "b"]),
        "scalar": np.float64(2.0) * np.ones(()),
    }
    arrays, types = BoundModule(lambda arguments: results, ModelConfig()).run_typed({})
    assert types == {"n": "INT32", "s": "BYTES", "scalar": "FP64"}
    assert arrays["s"].dtype == object


def test_an_array_over_the_input_is_copied_too() -> None:
    model = BoundModule(
        lambda arguments: {"same": arguments["x"].numpy()},  # type: ignore[union-attr]
        ModelConfig(inputs=(X,)),
    )
    inputs = {"x": np.ones((1, 4), np.float32)}
    got = model.run_typed(inputs)[0]["same"]
    assert not np.shares_memory(got, inputs["x"])


def test_a_type_that_clients_cannot_get_is_an_error() -> None:
    with pytest.raises(ModelError, match="no V2 datatype"):
        BoundModule(lambda _: torch.ones(1, dtype=torch.complex64), ModelConfig()).run_typed({})
    with pytest.raises(ModelError, match="no V2 datatype"):
        BoundModule(lambda _: np.ones(1, np.complex64), ModelConfig()).run_typed({})


def test_a_long_error_is_cut() -> None:
    def fail(arguments: object) -> None:
        raise ValueError("x" * 1_000_000)

    with pytest.raises(ModelError) as raised:
        BoundModule(fail, ModelConfig()).run({})
    assert len(raised.value.message) < 10_000


@pytest.mark.parametrize("error", [SystemExit("enough"), KeyboardInterrupt("stop")])
def test_a_model_may_end_its_batch_and_not_the_process(error: BaseException) -> None:
    def call(arguments: object) -> object:
        raise error

    bound = BoundModule(call, ModelConfig(inputs=(X,)))
    inputs = {"x": np.ones((1, 4), np.float32)}
    for run in (bound.run, bound.run_typed):
        with pytest.raises(ModelError, match=f"{type(error).__name__}: {error}"):
            run(inputs)


def test_a_lost_device_is_no_error_of_the_model() -> None:
    def call(arguments: object) -> object:
        raise DeviceLost

    bound = BoundModule(call, ModelConfig(inputs=(X,)))
    for run in (bound.run, bound.run_typed):
        with pytest.raises(DeviceLost):
            run({"x": np.ones((1, 4), np.float32)})
