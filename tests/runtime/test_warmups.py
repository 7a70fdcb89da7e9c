"""Warm-up requests: what they hold, and files that do not fit."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from overcommit.runtime.config import Batching, ModelConfig, TensorSpec, Warmup, WarmupInput
from overcommit.runtime.errors import ImageError
from overcommit.runtime.warmups import requests_of

INPUTS = (
    TensorSpec(name="x", datatype="FP32", shape=(-1, 3)),
    TensorSpec(name="text", datatype="BYTES", shape=(-1, 1)),
)


def config(*inputs: WarmupInput, batch: int = 8, **terms: int) -> ModelConfig:
    warmup = Warmup(name="w", inputs=inputs, **terms)
    return ModelConfig(inputs=INPUTS, batching=Batching(max_batch_size=batch), warmup=(warmup,))


def test_a_request_has_its_rows_and_runs_as_often_as_it_says() -> None:
    given = WarmupInput(name="x", datatype="FP32", shape=(3,), data="random")
    runs = list(requests_of(config(given, batch_size=2, count=3)))
    assert [name for name, _ in runs] == ["w"] * 3
    x, text = runs[0][1]["x"], runs[0][1]["text"]
    assert (x.shape, x.dtype, text.shape) == ((2, 3), np.float32, (2, 1))
    assert 0 < x.max() <= 1
    assert text[1, 0] == b""


def test_without_batches_the_shape_is_whole() -> None:
    given = WarmupInput(name="x", datatype="FP32", shape=(5, 3))
    ((_, inputs),) = requests_of(config(given, batch=0))
    assert inputs["x"].shape == (5, 3)
    assert not inputs["x"].any()


def test_a_file_is_read_as_the_binary_extension_has_it(tmp_path: Path) -> None:
    numbers, texts = tmp_path / "x", tmp_path / "text"
    numbers.write_bytes(np.arange(6, dtype="<f4").tobytes())
    texts.write_bytes(struct.pack("<I", 2) + b"ab" + struct.pack("<I", 0))
    given = (
        WarmupInput(name="x", datatype="FP32", shape=(3,), data="file", file=str(numbers)),
        WarmupInput(name="text", datatype="BYTES", shape=(1,), data="file", file=str(texts)),
    )
    ((_, inputs),) = requests_of(config(*given, batch_size=2))
    assert inputs["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert inputs["text"].tolist() == [[b"ab"], [b""]]
    texts.write_bytes(struct.pack("<I", 9) + b"ab")
    with pytest.raises(ImageError, match="has not 2 elements"):
        list(requests_of(config(*given, batch_size=2)))
    numbers.write_bytes(b"short")
    with pytest.raises(ImageError, match="has 5 bytes"):
        list(requests_of(config(*given, batch_size=2)))
