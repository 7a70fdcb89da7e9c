"""Models that take their tensors in another shape than clients give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pack_rig import Opened, packed, refused

from overcommit.runtime import model_files, reshape
from overcommit.runtime.config import Batching, ModelConfig, TensorSpec
from overcommit.runtime.errors import ModelError, RepositoryError

PBTXT = """
platform: "pytorch_libtorch"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] reshape { } }
output { name: "y" data_type: TYPE_FP32 dims: [ 2, 3 ] reshape { shape: [ 6 ] } }
"""


class Flat(torch.nn.Module):
    """Takes numbers, gives rows of six."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6.0))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x[:, None] * self.weight}


def export(folder: Path) -> Path:
    folder.mkdir()
    rows = torch.export.Dim("rows", min=1, max=32)
    exported = torch.export.export(Flat(), (torch.randn(2),), dynamic_shapes={"x": {0: rows}})
    torch.export.save(exported, folder / "model.pt2")
    return folder


def config_of(pbtxt: str) -> ModelConfig:
    return model_files.read([("config.pbtxt", pbtxt.encode())])[0]


def given(config: ModelConfig) -> dict[str, Any]:
    return {"inputs": config.inputs, "outputs": config.outputs, "batching": config.batching}


def test_a_model_is_packed_as_it_is_and_served_as_its_clients_see_it(tmp_path: Path) -> None:
    done = packed(export(tmp_path / "flat"), tmp_path / "cache", **given(config_of(PBTXT)))
    (x,), (y,) = done.config.inputs, done.config.outputs
    assert (x.shape, x.axes, x.reshape) == ((-1, 1), ("batch", None), (-1,))
    assert (y.shape, y.axes, y.reshape) == ((-1, 2, 3), ("batch", None, None), (-1, 6))
    assert (x.declared, y.declared) == ((), (-1, 2, 3))
    assert done.config.batching.max_batch_size == 8
    model = reshape.Reshaped(Opened(done).model, done.config)
    rows = np.array([[1], [2], [-3]], np.float32)
    wanted = (rows * np.arange(6, dtype=np.float32)).reshape(3, 2, 3)
    np.testing.assert_array_equal(model.run({"x": rows})["y"], wanted)
    with pytest.raises(ModelError, match="which is not"):
        model.run({"x": rows[:, 0]})


def test_shapes_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    wrong = config_of(
        PBTXT.replace("[ 2, 3 ] reshape { shape: [ 6 ] }", "[ 6 ] reshape { shape: [ 2, 3 ] }")
    )
    message = refused(export(tmp_path / "flat"), tmp_path / "cache", **given(wrong))
    assert "output 'y'" in message


@pytest.mark.parametrize(
    ("shape", "other", "fits"),
    [
        ((-1, 1), (-1,), True),
        ((1,), (), True),
        ((-1, 4, -1), (-1, 2, 2, -1), True),
        ((-1, 4), (-1, 3), False),
        ((-1, -1), (-1,), False),
        ((0, 2), (0, 3), False),
    ],
)
def test_two_shapes_have_as_many_elements(
    shape: tuple[int, ...], other: tuple[int, ...], fits: bool
) -> None:
    spec = TensorSpec(name="x", datatype="FP32", shape=shape, reshape=other)
    assert (reshape.problem_of(spec) is None) is fits
    toml = f'[[input]]\nname = "x"\ndatatype = "FP32"\nshape = {[*shape]}\nreshape = {[*other]}\n'
    if fits:
        assert model_files.read([("model.toml", toml.encode())])[0].inputs == (spec,)
    else:
        with pytest.raises(RepositoryError, match="cannot be reshaped"):
            model_files.read([("model.toml", toml.encode())])


def test_sizes_that_vary_keep_their_order() -> None:
    class Echo:
        def run(self, inputs: reshape.Arrays) -> reshape.Arrays:
            self.seen = inputs["x"].shape
            return {"y": inputs["x"]}

    specs = [
        TensorSpec(name=name, datatype="FP32", shape=(-1, 4, -1), reshape=(-1, 2, 2, -1))
        for name in "xy"
    ]
    echo = Echo()
    model = reshape.Reshaped(echo, ModelConfig(inputs=(specs[0],), outputs=(specs[1],)))
    array = np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)
    np.testing.assert_array_equal(model.run({"x": array})["y"], array)
    assert echo.seen == (3, 2, 2, 5)


def test_a_model_that_takes_one_row_takes_one_of_its_clients() -> None:
    said = ModelConfig(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 1), reshape=(-1,)),)
    )
    found = ModelConfig(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(1,), axes=(None,)),),
        batching=Batching(max_batch_size=0),
    )
    (spec,) = reshape.client_side(found, said).inputs
    assert (spec.shape, spec.reshape) == ((1, 1), (1,))
    assert reshape.client_side(found, found) is found


def test_an_ensemble_hands_tensors_on_as_they_are(tmp_path: Path) -> None:
    from overcommit.runtime import ensemble
    from overcommit.runtime.config import Step

    spec = TensorSpec(name="x", datatype="FP32", shape=(-1, 1), reshape=(-1,))
    plain = TensorSpec(name="y", datatype="FP32", shape=(-1, 1))
    step = Step(model="m", inputs={"x": "x"}, outputs={"y": "y"})
    with pytest.raises(RepositoryError, match="hands tensors on"):
        ensemble.check(ModelConfig(inputs=(spec,), outputs=(plain,), steps=(step,)))
