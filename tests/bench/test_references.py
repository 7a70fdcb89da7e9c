"""References: computed by transformers, cached by weights, told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overcommit.bench import references
from overcommit.bench.errors import BenchError
from overcommit.bench.references import References, compute, fixed_inputs, weights_key

INPUTS = fixed_inputs(200, (4, 6))


def test_references_are_what_transformers_computes(
    bert_repository: Path, bert_reference: Callable[..., Any], tmp_path: Path
) -> None:
    folders = {name: bert_repository / name for name in ("bert-00", "bert-01")}
    found = compute(folders, INPUTS, tmp_path)
    for number, tensors in enumerate(INPUTS):
        for variant, folder in enumerate(folders.values()):
            expected = bert_reference(folder, tensors["input_ids"].tolist())
            np.testing.assert_allclose(found.outputs[number][variant], expected, atol=1e-6)
    assert found.check_distinct() > references.DISTANCE_MIN


def test_what_is_cached_is_not_computed_again(
    bert_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"bert-02": bert_repository / "bert-02"}
    first = compute(folders, INPUTS, tmp_path)
    monkeypatch.setattr(references.sys, "executable", "/nothing/is/here")
    again = compute(folders, INPUTS, tmp_path)
    np.testing.assert_array_equal(first.outputs[1], again.outputs[1])
    assert not list(tmp_path.glob(".*"))


def test_other_weights_have_another_key(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(100_000))
    before = weights_key(tmp_path, INPUTS)
    assert weights_key(tmp_path, INPUTS) == before
    assert weights_key(tmp_path, INPUTS[:1]) != before
    weights.write_bytes(bytes(99_999) + b"\1")
    assert weights_key(tmp_path, INPUTS) != before


def test_a_model_that_cannot_be_computed_is_explained(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    with pytest.raises(BenchError, match="could not be computed"):
        compute({"broken": tmp_path / "broken"}, INPUTS, tmp_path / "cache")


def make(outputs: list[Any]) -> References:
    names = tuple("abcdefgh"[: len(outputs)])
    inputs = [{"input_ids": np.ones((1, 2), np.int64)}]
    return References(names, inputs, [np.array(outputs, np.float32)])


def test_variants_that_answer_alike_are_refused_by_name() -> None:
    with pytest.raises(BenchError, match="b and c for input 0"):
        make([[0.0, 0.0], [1.0, 5.0], [1.001, 5.0]]).check_distinct()


def test_variants_without_a_number_are_refused() -> None:
    with pytest.raises(BenchError, match="b answers something"):
        make([[0.0, 1.0], [np.nan, 1.0]]).check_distinct()


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    saved = make([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    saved.subset(("c", "a")).save(tmp_path / "some.npz")
    loaded = References.load(tmp_path / "some.npz")
    assert loaded.names == ("c", "a")
    np.testing.assert_array_equal(loaded.outputs[0], [[4.0, 5.0], [0.0, 1.0]])
    np.testing.assert_array_equal(loaded.inputs[0]["input_ids"], [[1, 1]])


def test_the_fixed_inputs_are_always_the_same_and_one_is_padded() -> None:
    first, second = fixed_inputs(30_522), fixed_inputs(30_522)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"])
    assert {tensors["input_ids"].shape[1] for tensors in first} == {7, 11, 16}
    assert sum(int((tensors["attention_mask"] == 0).any()) for tensors in first) == 1
