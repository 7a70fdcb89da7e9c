"""The highest values of an output, and their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from overcommit.runtime.config import ModelConfig, TensorSpec
from overcommit.runtime.errors import BadRequest, RepositoryError
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.labels import label_files, with_labels
from overcommit.server.classification import Labels, classify, shape_of


def classes(array: Any, datatype: str, count: int, **more: Any) -> list[str]:
    more.setdefault("batches", True)
    found = classify(memoryview(array.tobytes()), datatype, array.shape, count, **more)
    return [each.decode() for each in found]


def spec(labels: str | None) -> TensorSpec:
    return TensorSpec(name="y", datatype="FP32", shape=(-1, 3), labels=labels)


@given(st.lists(st.integers(-128, 127), min_size=1, max_size=20), st.integers(1, 25))
def test_the_highest_come_first_and_equals_in_order(values: list[int], count: int) -> None:
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]
    array = np.array([values], np.int8)
    assert classes(array, "INT8", count) == [f"{values[index]}:{index}" for index in order]
    assert shape_of(array.shape, count, batches=True) == (1, len(order))


def test_the_ends_of_each_type_do_not_overflow() -> None:
    for name in ("INT8", "UINT8", "INT64", "UINT64"):
        info = np.iinfo(name.lower())
        array = np.array([[info.min, info.max, 1]], name.lower())
        assert classes(array, name, 3) == [f"{info.max}:1", "1:2", f"{info.min}:0"]


def test_what_is_no_number_comes_last() -> None:
    array = np.array([[np.nan, 1, -np.inf, np.inf]], np.float32)
    assert [each.split(":")[1] for each in classes(array, "FP32", 4)] == ["3", "1", "2", "0"]


def test_half_floats_and_models_that_do_not_batch() -> None:
    array = np.array([1, 4, 2], np.float16)
    assert classes(array, "FP16", 2, batches=False) == ["4.000000:1", "2.000000:2"]
    assert shape_of((3,), 2, batches=False) == (2,)
    bits = np.array([[0x3F80, 0x4080]], np.uint16)  # 1 and 4
    assert classes(bits, "BF16", 1) == ["4.000000:1"]


def test_no_rows_have_no_classes() -> None:
    assert classes(np.zeros((0, 3), np.float32), "FP32", 2) == []
    assert shape_of((0, 3), 2, batches=True) == (0, 2)


def test_bytes_cannot_be_classified() -> None:
    with pytest.raises(BadRequest, match="cannot be classified"):
        classify(memoryview(b""), "BYTES", (0, 1), 1, batches=True)


def test_fewer_labels_than_classes_name_those_they_name() -> None:
    array = np.array([[1, 3, 2]], np.float32)
    labels = ("a", "b")
    assert classes(array, "FP32", 2, labels=labels) == ["3.000000:1:b", "2.000000:2"]


def test_labels_are_read_from_the_versions_folder_or_the_models(tmp_path: Path) -> None:
    version = tmp_path / "m" / "1"
    version.mkdir(parents=True)
    config = ModelConfig(outputs=(spec(None),))
    source = ModelConfig(outputs=(spec("names.txt"),))
    places = label_files(str(version), config, source)
    route = Route(slot=1, name="m", version="1", state="ready", labels=places)
    with pytest.raises(RepositoryError, match="no file names"):
        Labels().of(route, 0)
    (tmp_path / "m" / "names.txt").write_text("cat \nd\u00f6g\n")
    labels = Labels()
    assert labels.of(route, 0) == ("cat", "d\u00f6g")
    (version / "names.txt").write_text("bird\n")
    assert labels.of(route, 0) == ("cat", "d\u00f6g")  # until a model changes
    labels.forget()
    assert labels.of(route, 0) == ("bird",)
    assert with_labels(config, source).outputs[0].labels == "names.txt"


@pytest.mark.parametrize("file", ["/etc/hostname", "../x", "a/../../x", "x\0y"])
def test_labels_lie_in_the_models_folder(file: str) -> None:
    config, source = ModelConfig(outputs=(spec(None),)), ModelConfig(outputs=(spec(file),))
    assert label_files("/models/m/1", config, source) == ()
