"""Batches that a device makes and splits by itself: the bits of the CPU's, for whatever comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from blocks_rig import Array, blocks_of
from fake_backend import FakeBackend
from fake_kernels import FakeKernels
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_rig import needs_gcc, on_host

from overcommit.runtime import assembly
from overcommit.runtime.config import Batching, ModelConfig, TensorSpec
from overcommit.runtime.device_limits import COPY_FROM_BYTES, GATHER_ROWS_MAX
from overcommit.runtime.engines import device_batch
from overcommit.runtime.engines.dtypes import to_array
from overcommit.runtime.errors import ModelError
from overcommit.runtime.launch import Blocks

Kernels = Callable[[], FakeKernels]


def by_cpu() -> FakeKernels:
    kernels = FakeBackend().kernels
    assert kernels is not None
    return kernels


def by_cuda_source() -> FakeKernels:
    backend = FakeBackend()
    backend.kernels = FakeKernels(backend, lambda address, nbytes: True, on_host)
    return backend.kernels


BOTH = pytest.mark.parametrize(
    "make", [by_cpu, pytest.param(by_cuda_source, marks=needs_gcc, id="cuda-source")]
)


def tensor(
    name: str, datatype: str, *tail: int, axes: tuple[str, ...] = (), pad: float | None = None
) -> TensorSpec:
    """Rows of a tail; -1 of it are named by `axes`."""
    names = iter(axes)
    named = tuple(next(names, None) if size < 0 else None for size in tail)
    return TensorSpec(
        name=name, datatype=datatype, shape=(-1, *tail), axes=("batch", *named), pad=pad
    )


def config(inputs: list[TensorSpec], outputs: list[TensorSpec]) -> ModelConfig:
    return ModelConfig(
        inputs=tuple(inputs), outputs=tuple(outputs), batching=Batching(max_batch_size=64)
    )


def numbers(datatype: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Random bits: NaNs of every kind and denormals among them, and truth values that are 2."""
    kind = np.dtype(
        {"BF16": "uint16", "BOOL": "uint8"}.get(datatype, datatype.lower().replace("fp", "float"))
    )
    random = np.random.default_rng((seed, *shape))
    raw = random.integers(0, 256, int(np.prod(shape)) * kind.itemsize, np.uint8)
    return raw.view(kind).reshape(shape)


def brought(kernels: FakeKernels, blocks: Blocks, **more: tuple[int, ...]) -> dict[str, Array]:
    assert device_batch.can_bring(blocks)
    shapes = {**device_batch.shapes_of(blocks), **more}
    tensors, _ = device_batch.bring(kernels, blocks, shapes, "cpu")
    return {name: to_array(value) for name, value in tensors.items()}


def same(one: dict[str, Array], other: dict[str, Array]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert (array.shape, array.dtype) == (other[name].shape, other[name].dtype), name
        assert array.tobytes() == other[name].tobytes(), name


def settled(kernels: FakeKernels) -> None:
    kernels._backend.settle()


# --- in -----------------------------------------------------------------------------------------
BERT = config(
    [
        tensor("input_ids", "INT64", -1, axes=("sequence",), pad=0),
        tensor("mask", "INT64", -1, axes=("sequence",), pad=0),
        tensor("types", "INT64", -1, axes=("sequence",), pad=3),
    ],
    [tensor("hidden", "FP32", -1, 8, axes=("sequence",)), tensor("pooled", "FP32", 8)],
)


def bert_requests(shapes: list[tuple[int, int]]) -> list[dict[str, Array]]:
    return [
        {s.name: numbers("INT64", shape, seed) for seed, s in enumerate(BERT.inputs)}
        for shape in shapes
    ]


@BOTH
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    "shapes", [[(1, 5)], [(1, 5), (2, 3), (1, 0)], [(1, 7)] * 3, [(0, 4), (2, 9)], [(1, 0), (1, 0)]]
)
def test_ragged_requests_become_the_cpus_batch(
    make: Kernels, shapes: list[tuple[int, int]], shift: int
) -> None:
    blocks = blocks_of(BERT, bert_requests(shapes), shift=shift)
    expected = assembly.gather(blocks.signature, blocks.forms, blocks.ingress)
    same(brought(make(), blocks), expected)


@BOTH
def test_all_inputs_of_one_size_are_one_launch(make: Kernels) -> None:
    kernels = make()
    blocks = blocks_of(BERT, bert_requests([(1, 5), (2, 3), (1, 0)]))
    brought(kernels, blocks)
    assert kernels.launches == [("gather", "UINT64", "UINT64", 3 * 4)]
    assert kernels.copies == []


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=30)
def test_any_shapes_become_the_cpus_batch(shapes: list[tuple[int, int]]) -> None:
    blocks = blocks_of(BERT, bert_requests(shapes))
    expected = assembly.gather(blocks.signature, blocks.forms, blocks.ingress)
    same(brought(by_cpu(), blocks), expected)


@BOTH
@pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "FP16", "BF16", "INT32", "FP32", "FP64"])
@pytest.mark.parametrize("is_even", [False, True])
def test_every_datatype_is_moved_bit_by_bit(make: Kernels, datatype: str, is_even: bool) -> None:
    said = config(
        [tensor("x", datatype, -1, 3, axes=("n",), pad=1)],
        [tensor("y", datatype, -1, 3, axes=("n",))],
    )
    requests = [{"x": numbers(datatype, (2, n, 3))} for n in ((4, 4) if is_even else (4, 1))]
    blocks = blocks_of(said, requests)
    expected = assembly.gather(blocks.signature, blocks.forms, blocks.ingress)
    same(brought(make(), blocks), expected)


def test_long_pieces_are_copied_and_short_ones_gathered() -> None:
    said = config([tensor("x", "FP32", -1, axes=("n",))], [tensor("y", "FP32", 1)])
    for length, launches, copies in (
        (COPY_FROM_BYTES // 4, 0, 2),
        (COPY_FROM_BYTES // 4 - 1, 1, 0),
    ):
        kernels = by_cpu()
        blocks = blocks_of(said, [{"x": numbers("FP32", (1, length), n)} for n in range(2)])
        expected = assembly.gather(blocks.signature, blocks.forms, blocks.ingress)
        same(brought(kernels, blocks), expected)
        assert (len(kernels.launches), len(kernels.copies)) == (launches, copies)


@BOTH
def test_rows_up_to_a_bucket_are_zeros(make: Kernels) -> None:
    said = config([tensor("x", "FP32", 2)], [tensor("y", "FP32", 2)])
    blocks = blocks_of(said, [{"x": np.full((n, 2), 5, np.float32)} for n in (1, 2)])
    assert brought(make(), blocks, x=(4, 2))["x"].tolist() == [[5, 5]] * 3 + [[0, 0]]


def test_what_no_kernel_makes_is_left_to_the_cpu() -> None:
    texts = config([tensor("x", "BYTES", 1)], [tensor("y", "FP32", 1)])
    blocks = blocks_of(texts, [{"x": np.array([[b"a"]], object)}])
    assert not device_batch.can_bring(blocks)
    two = config(
        [tensor("x", "FP32", -1, -1, axes=("h", "w"), pad=0)],
        [tensor("y", "FP32", -1, -1, axes=("h", "w"))],
    )
    square = [{"x": numbers("FP32", (1, n, n))} for n in (2, 3)]
    assert not device_batch.can_bring(blocks_of(two, square))
    assert device_batch.can_bring(blocks_of(two, square[:1] * 2))
    assert not device_batch.can_bring(blocks_of(two, square[:1], is_pinned=False))
    many = [(GATHER_ROWS_MAX, 1), (1, 2)]
    assert not device_batch.can_bring(blocks_of(BERT, bert_requests(many)))


# --- out ----------------------------------------------------------------------------------------
def outputs_of(rows: int, longest: int) -> dict[str, torch.Tensor]:
    return {
        "hidden": torch.from_numpy(numbers("FP32", (rows, longest, 8), 1)),
        "pooled": torch.from_numpy(numbers("FP32", (rows, 8), 2)),
    }


def check_sent(
    make: Kernels,
    said: ModelConfig,
    requests: list[dict[str, Array]],
    outputs: dict[str, Any],
    shift: int = 0,
    capacities: list[int] | None = None,
) -> FakeKernels:
    """Whatever the CPU would write the device writes, and no byte more."""
    kernels = make()
    blocks = blocks_of(said, requests, shift=shift, capacities=capacities or [])
    sent = device_batch.send(kernels, blocks, outputs)
    assert sent is not None
    settled(kernels)
    here = blocks_of(said, requests, shift=shift, capacities=capacities or [])
    arrays = {name: to_array(value) for name, value in outputs.items()}
    assert sent[0] == assembly.split(here.signature, arrays, here.forms, here.egress)
    for one, other in zip(blocks.egress, here.egress, strict=True):
        assert bytes(one) == bytes(other)
    return kernels


@BOTH
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    "shapes", [[(2, 5)], [(1, 5), (2, 3), (1, 0)], [(1, 7)] * 3, [(0, 4), (2, 9)]]
)
def test_answers_are_the_cpus(make: Kernels, shapes: list[tuple[int, int]], shift: int) -> None:
    rows, longest = sum(r for r, _ in shapes), max(n for _, n in shapes)
    kernels = check_sent(make, BERT, bert_requests(shapes), outputs_of(rows, longest), shift)
    assert len(kernels.launches) == 1


def test_an_answer_that_does_not_fit_is_not_begun() -> None:
    shapes = [(1, 5), (1, 5)]
    kernels = check_sent(by_cpu, BERT, bert_requests(shapes), outputs_of(2, 5), 0, [64, 1 << 16])
    assert kernels.launches == [("scatter", "UINT32", "UINT32", 2)]


def test_long_answers_are_copied_and_results_may_lie_anyhow() -> None:
    said = config([tensor("x", "FP32", 1)], [tensor("y", "FP32", COPY_FROM_BYTES // 4)])
    requests = [{"x": numbers("FP32", (1, 1))}] * 2
    y = torch.from_numpy(numbers("FP32", (COPY_FROM_BYTES // 4, 2))).T
    kernels = check_sent(by_cpu, said, requests, {"y": y})
    assert kernels.copies == [("out", COPY_FROM_BYTES)] * 2


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(3, 8, dtype=torch.float64), "is FP64, the model's config says FP32"),
        (torch.zeros(3, 8), "for a batch of 2 rows"),
        (torch.zeros(()), "for a batch of 2 rows"),
    ],
)
def test_a_result_that_is_not_what_the_config_says_is_the_models_error(
    y: torch.Tensor, message: str
) -> None:
    said = config([tensor("x", "FP32", 1)], [tensor("y", "FP32", 8)])
    blocks = blocks_of(said, [{"x": numbers("FP32", (1, 1))}] * 2)
    with pytest.raises(ModelError, match=message):
        device_batch.send(by_cpu(), blocks, {"y": y})


def test_what_no_kernel_splits_is_left_to_the_cpu() -> None:
    said = config(
        [tensor("x", "FP32", -1, axes=("n",), pad=0)], [tensor("y", "FP32", 2, -1, axes=("n",))]
    )
    blocks = blocks_of(said, [{"x": numbers("FP32", (1, n))} for n in (2, 3)])
    assert device_batch.send(by_cpu(), blocks, {"y": torch.zeros(2, 2, 3)}) is None
    assert device_batch.send(by_cpu(), blocks, {"y": np.array([b"a", b"b"], object)}) is None
