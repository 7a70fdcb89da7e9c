"""Trial runs: what is found out about a module, and what is switched off because of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from overcommit.runtime import probes, trials
from overcommit.runtime.config import Batching, ModelConfig, TensorSpec
from overcommit.runtime.errors import ModelError, RepositoryError
from overcommit.runtime.probes import Array, Arrays, Known

NAMES = {"float32": "FP32", "int64": "INT64", "object": "BYTES", "float16": "FP16"}
IDS = TensorSpec(name="ids", datatype="INT64", shape=(-1, -1), axes=("batch", "sequence"), pad=0)
X = TensorSpec(name="x", datatype="FP32", shape=(-1, 4), axes=("batch", None))


def running(function: Callable[[Arrays], dict[str, Array]]) -> trials.Run:
    """A module that is a function of arrays; what it raises is a ModelError."""

    def run(arrays: Arrays) -> tuple[Arrays, dict[str, str]]:
        try:
            outputs = function(arrays)
        except (ValueError, IndexError) as error:
            raise ModelError(str(error)) from error
        return outputs, {name: NAMES[array.dtype.name] for name, array in outputs.items()}

    return run


def found(
    function: Callable[[Arrays], dict[str, Array]], *inputs: TensorSpec, **config: Any
) -> ModelConfig:
    return trials.complete(
        "model 'm'", ModelConfig(**config), Known(inputs), running(function)
    ).config


def embed(arrays: Arrays) -> dict[str, Array]:
    ids = arrays["ids"]
    hidden = np.repeat(ids[:, :, None], 8, 2).astype(np.float32)
    return {"hidden": hidden, "pooled": hidden.max(1), "count": (ids > 0).sum(1)}


def test_output_axes_that_move_with_an_input_axis_get_its_name() -> None:
    config = found(embed, IDS)
    assert [(s.name, s.datatype, s.shape, s.axes) for s in config.outputs] == [
        ("hidden", "FP32", (-1, -1, 8), ("batch", "sequence", None)),
        ("pooled", "FP32", (-1, 8), ("batch", None)),
        ("count", "INT64", (-1,), ("batch",)),
    ]
    assert config.batching.max_batch_size == Batching().max_batch_size


def test_an_axis_that_moves_otherwise_varies_without_a_name() -> None:
    config = found(lambda a: {"y": a["ids"][:, ::2]}, IDS)
    assert (config.outputs[0].shape, config.outputs[0].axes) == ((-1, -1), ("batch", None))


def test_an_output_without_the_batch_axis_switches_batching_off() -> None:
    assert found(lambda a: {"y": a["x"].sum(0)}, X).batching.max_batch_size == 0
    scalar = TensorSpec(name="rate", datatype="INT64", shape=())
    config = found(lambda a: {"y": (a["x"] * a["rate"]).astype(np.float32)}, X, scalar)
    assert config.inputs[1].shape == ()
    assert config.batching.max_batch_size == 0


def test_rows_that_depend_on_their_neighbours_switch_batching_off() -> None:
    def softmax_over_the_batch(arrays: Arrays) -> dict[str, Array]:
        power = np.exp(arrays["x"])
        return {"y": power / power.sum(0)}

    assert found(softmax_over_the_batch, X).batching.max_batch_size == 0
    assert found(lambda a: {"y": np.exp(a["x"])}, X).batching.max_batch_size > 0


def test_answers_that_depend_on_padding_lose_it_but_still_batch() -> None:
    def mean_of_all(arrays: Arrays) -> dict[str, Array]:
        return {"y": arrays["ids"].mean(1).astype(np.float32)}

    careless, careful = found(mean_of_all, IDS), found(embed, IDS)
    assert careless.inputs[0].pad is None
    assert careless.batching.max_batch_size > 0
    assert careful.inputs[0].pad == 0


def test_padding_is_cut_from_the_output_before_answers_are_compared() -> None:
    config = found(lambda a: {"y": a["ids"] + 1}, IDS)
    assert config.inputs[0].pad == 0


def test_a_module_for_one_row_is_served_one_row_at_a_time() -> None:
    def one_row(arrays: Arrays) -> dict[str, Array]:
        if len(arrays["x"]) != 1:
            raise ValueError("cannot handle batch sizes > 1")
        return {"y": arrays["x"] * 2}

    config = found(one_row, X)
    assert config.batching.max_batch_size == 0
    assert config.inputs[0].shape == (1, 4)
    assert config.outputs[0].shape == (1, 4)


A, B = (TensorSpec(name=name, datatype="FP32", shape=(-1,)) for name in "ab")
ONE = Batching(max_batch_size=0)


def joined(arrays: Arrays) -> dict[str, Array]:
    return {"y": np.concatenate([arrays["a"], arrays["b"]]), "z": arrays["b"] + 1}


def first_axes(config: ModelConfig) -> list[str | None]:
    return [spec.axes[0] for spec in (*config.inputs, *config.outputs)]


@pytest.mark.parametrize("batching", [ONE, Batching()], ids=["said", "found"])
def test_first_axes_have_nothing_to_do_with_each_other_where_nothing_batches(
    batching: Batching,
) -> None:
    config = found(joined, inputs=(A, B), batching=batching)
    assert first_axes(config) == ["a.0", "b.0", None, "b.0"]
    assert config.batching.max_batch_size == 0


def test_first_axes_are_one_where_the_model_batches() -> None:
    config = found(lambda a: {"y": a["a"] + a["b"]}, inputs=(A, B))
    assert first_axes(config) == ["batch"] * 3
    assert config.batching.max_batch_size > 0


def test_first_axes_that_a_program_calls_by_one_name_are_one_though_nothing_batches() -> None:
    a, b = (msgspec.structs.replace(spec, axes=("n",)) for spec in (A, B))
    config = found(lambda each: {"y": each["a"] + each["b"]}, a, b, inputs=(A, B), batching=ONE)
    assert first_axes(config) == ["n"] * 3


def test_inputs_without_a_batch_are_tried_with_unlike_sizes_then_with_like_ones() -> None:
    seen: list[tuple[int, int]] = []

    def tried(function: Callable[[Arrays], Array], batching: Batching = ONE) -> ModelConfig:
        def note(arrays: Arrays) -> dict[str, Array]:
            seen.append((len(arrays["a"]), len(arrays["b"])))
            return {"y": function(arrays)}

        seen.clear()
        return found(note, inputs=(A, B), batching=batching)

    tried(lambda each: np.concatenate([each["a"], each["b"]]))
    assert seen == [(1, 1), (3, 4)]
    assert first_axes(tried(lambda each: each["a"] + each["b"]))[:2] == ["a.0", "b.0"]
    assert seen == [(1, 1), (3, 4), (3, 3)]

    def one_row(arrays: Arrays) -> Array:
        if len(arrays["a"]) != 1:
            raise ValueError("one row")
        return arrays["a"]

    assert [spec.shape for spec in tried(one_row).inputs] == [(1,), (1,)]
    assert seen == [(1, 1), (3, 4), (3, 3), (1, 1)]


def test_a_module_that_drops_the_axis_of_one_row_is_refused() -> None:
    with pytest.raises(ModelError, match="must not drop the axis"):
        found(lambda a: {"y": a["x"].squeeze()}, X)


def test_a_module_that_fails_for_one_row_cannot_be_served() -> None:
    def broken(arrays: Arrays) -> dict[str, Array]:
        raise ValueError("no such op")

    with pytest.raises(ModelError, match="no such op"):
        found(broken, X)


def test_values_that_a_module_does_not_take_prove_nothing() -> None:
    def only_ones(arrays: Arrays) -> dict[str, Array]:
        if not (arrays["ids"] == 1).all():
            raise IndexError("out of range")
        return {"y": arrays["ids"] * 2}

    config = found(only_ones, IDS)
    assert config.batching.max_batch_size > 0
    assert config.inputs[0].pad == 0


def test_no_inputs_are_an_error_that_says_how_to_give_them() -> None:
    with pytest.raises(RepositoryError, match=r"\[\[input\]\]"):
        found(lambda a: {}, *())


def test_what_the_configuration_says_is_kept_with_the_axes_that_the_engine_knows() -> None:
    given = TensorSpec(name="ids", datatype="INT64", shape=(-1, -1), pad=7)
    config = found(lambda a: {"y": a["ids"] * 2}, IDS, inputs=(given,))
    assert config.inputs[0].axes == ("batch", "sequence")
    assert config.inputs[0].pad == 7


def test_outputs_of_the_configuration_are_chosen_and_checked() -> None:
    def specs(name: str, datatype: str, *shape: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name=name, datatype=datatype, shape=shape),)

    chosen = found(embed, IDS, outputs=specs("pooled", "FP32", -1, 8))
    assert [spec.name for spec in chosen.outputs] == ["pooled"]
    assert chosen.outputs[0].axes == ("batch", None)
    assert chosen.outputs[0].declared == (-1, 8)
    assert not any(spec.declared for spec in found(embed, IDS).outputs)
    for wrong, words in (
        (specs("nothing", "FP32", -1, 8), "no output"),
        (specs("pooled", "FP64", -1, 8), "FP64"),
        (specs("pooled", "FP32", -1, 9), "9"),
        (specs("pooled", "FP32", -1), r"\[-1\]"),
    ):
        with pytest.raises(RepositoryError, match=words):
            found(embed, IDS, outputs=wrong)


def test_the_batch_that_was_asked_for_is_limited_by_what_the_program_takes() -> None:
    def batch(asked: int, least: int, most: int) -> int:
        known = Known((X,), batch_limits=(least, most))
        config = ModelConfig(batching=Batching(max_batch_size=asked))
        outcome = trials.complete("m", config, known, running(lambda a: {"y": a["x"] * 2}))
        return outcome.config.batching.max_batch_size

    assert batch(32, 1, 8) == 8
    assert batch(4, 1, 8) == 4
    assert batch(0, 1, 8) == 0
    assert batch(32, 2, 8) == 0  # a request of one row could not be run alone


def test_optional_inputs_are_left_out_of_trials() -> None:
    extra = TensorSpec(name="extra", datatype="INT64", shape=(-1,), axes=("batch",), optional=True)
    seen: set[str] = set()

    def note(arrays: Arrays) -> dict[str, Array]:
        seen.update(arrays)
        return {"y": arrays["x"] * 2}

    config = found(note, X, extra)
    assert seen == {"x"}
    assert config.inputs[1].optional


@pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "INT64", "FP16", "FP64", "BF16", "BYTES"])
def test_inputs_of_every_type_are_made(datatype: str) -> None:
    spec = TensorSpec(name="x", datatype=datatype, shape=(-1, 2), axes=("batch", None))
    for vary in (False, True):
        array = probes.trial_inputs((spec,), {"batch": 3}, 0, vary=vary)["x"]
        assert array.shape == (3, 2)
        assert array.dtype == probes.numpy_type(datatype)


def test_closeness_forgives_the_order_of_sums_and_nothing_else() -> None:
    one = np.array([1.0, 100.0], np.float32)
    assert trials.is_close(one, one * (1 + 1e-6), "FP32")
    assert not trials.is_close(one, one * 1.05, "FP32")
    assert trials.is_close(np.array([np.nan]), np.array([np.nan]), "FP64")
    assert not trials.is_close(np.array([np.nan]), np.array([1.0]), "FP64")
    assert not trials.is_close(np.array([1, 2]), np.array([1, 3]), "INT64")
    bits = np.array([0x3F80], np.uint16)
    assert trials.is_close(bits, bits + np.uint16(1), "BF16")
    assert not trials.is_close(bits, np.array([0x4000], np.uint16), "BF16")
