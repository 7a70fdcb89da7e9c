"""Inputs that are pictures: clients send pixels, the model gets normalised planes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blocks_rig import blocks_of
from fake_backend import FakeBackend
from pack_rig import Opened, packed

from overcommit.kernels import image
from overcommit.runtime import model_files, payload, reshape
from overcommit.runtime.config import ModelConfig, Picture, TensorSpec
from overcommit.runtime.engines import places
from overcommit.runtime.errors import RepositoryError

TOML = """
[batching]
max_batch_size = 8
[[input]]
name = "x"
datatype = "UINT8"
shape = [-1, 6, 5, 3]
picture = { mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225] }
[[output]]
name = "y"
datatype = "FP32"
shape = [-1, 2]
"""
SPEC = TensorSpec(
    name="x",
    datatype="UINT8",
    shape=(-1, 6, 5, 3),
    picture=Picture(mean=image.IMAGENET_MEAN, std=image.IMAGENET_STD),
)


class Convolution(torch.nn.Module):
    """Takes planes, gives two numbers each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.convolution = torch.nn.Conv2d(3, 2, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.convolution(x).mean((2, 3))}


def config_of(toml: str) -> ModelConfig:
    return model_files.read([("model.toml", toml.encode())])[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    rows = torch.export.Dim("rows", min=1, max=32)
    exported = torch.export.export(
        Convolution(), (torch.randn(2, 3, 6, 5),), dynamic_shapes={"x": {0: rows}}
    )
    torch.export.save(exported, made / "model.pt2")
    return made


@pytest.fixture
def device() -> Iterator[FakeBackend]:
    made = FakeBackend()
    places.choose("cpu", made)
    yield made
    places.choose("cpu")


def pixels(rows: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(rows).integers(0, 256, (rows, 6, 5, 3), np.uint8)


def wanted(given: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[Any]]:
    planes = image.normalise_reference(given, image.IMAGENET_MEAN, image.IMAGENET_STD)
    with torch.inference_mode():
        result: np.ndarray[Any, np.dtype[Any]] = Convolution()(
            torch.from_numpy(planes.astype(np.float32))
        )["y"].numpy()
    return result


def given(config: ModelConfig) -> dict[str, Any]:
    return {"inputs": config.inputs, "outputs": config.outputs, "batching": config.batching}


def test_the_cpu_makes_planes_for_a_model_that_was_packed_for_them(
    folder: Path, tmp_path: Path
) -> None:
    done = packed(folder, tmp_path / "cache", **given(config_of(TOML)))
    (x,) = done.config.inputs
    assert (x.datatype, x.shape, x.picture) == ("UINT8", (-1, 6, 5, 3), SPEC.picture)
    assert x.axes == ("batch", None, None, None)
    assert done.config.batching.max_batch_size == 8
    model = reshape.Reshaped(Opened(done).model, done.config)
    np.testing.assert_allclose(model.run({"x": pixels(3)})["y"], wanted(pixels(3)), atol=1e-6)
    assert model.starter is None


def test_a_device_gathers_pixels_and_makes_the_planes_itself(
    folder: Path, tmp_path: Path, device: FakeBackend
) -> None:
    done = packed(folder, tmp_path / "cache", **given(config_of(TOML)))
    model = reshape.Reshaped(Opened(done).model, done.config)
    assert model.starter is not None
    blocks = blocks_of(done.config, [{"x": pixels(1)}, {"x": pixels(2)}])
    needs = model.starter(blocks).finish()
    assert device.kernels is not None
    assert device.kernels.launches == [
        ("gather", "UINT8", "UINT8", 3),  # two requests, and a row up to the bucket
        ("normalise", "UINT8", "FP32", 4),
        ("scatter", "UINT32", "UINT32", 2),
    ]
    for rows, block, need in zip((1, 2), blocks.egress, needs, strict=True):
        (place,) = payload.decode(block[:need])
        got = np.frombuffer(block[place.offset : place.offset + place.nbytes], np.float32)
        np.testing.assert_allclose(got.reshape(rows, 2), wanted(pixels(rows)), atol=1e-6)


def test_the_key_says_all_of_it() -> None:
    assert config_of(TOML).inputs == (SPEC,)
    half = config_of(TOML.replace("0.225] }", '0.225], datatype = "FP16" }'))
    (spec,) = reshape.model_side(half).inputs
    assert (spec.datatype, spec.shape, spec.picture) == ("FP16", (-1, 3, 6, 5), None)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"UINT8"', '"FP32"'),
        ("[-1, 6, 5, 3]", "[-1, 6, 5, 1]"),
        ("[-1, 6, 5, 3]", "[-1, 90]"),
        ("[0.229, 0.224, 0.225]", "[0.229, 0.224]"),
        ("[0.229, 0.224, 0.225]", "[0.229, 0.0, 0.225]"),
        ("picture", "pad = 0.0\npicture"),
        ("picture", "reshape = [-1, 90]\npicture"),
    ],
)
def test_what_is_no_picture_is_refused(before: str, after: str) -> None:
    with pytest.raises(RepositoryError, match="'x' has a picture, so it has to be UINT8"):
        config_of(TOML.replace(before, after))
