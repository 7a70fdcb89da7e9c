"""Ragged requests into one batch, and its result back into the blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_rig import aligned, needs_gcc, on_host

from overcommit.kernels import cuda, datatypes, gather, scatter
from overcommit.kernels.datatypes import NUMPY_TYPES, convert, size_of, to_float64
from overcommit.kernels.gather import Batch, Piece

PAIRS = [*datatypes.CONVERSIONS, ("INT64", "INT64"), ("FP16", "FP16"), ("UINT8", "UINT8")]
SHAPES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=6)


def requests(shapes: list[tuple[int, int]], source: str, width: int, shift: int = 0) -> list[Piece]:
    """Return pieces of random bits, each `shift` bytes from an aligned address."""
    random = np.random.default_rng(len(shapes))
    pieces = []
    for rows, length in shapes:
        size = rows * length * width * size_of(source)
        memory = aligned(size + shift)
        memory[:] = random.integers(0, 256, size + shift, np.uint8)
        pieces.append(Piece(memory[shift:], rows, length))
    return pieces


def by_cuda_source(
    pieces: list[Piece], source: str, target: str, width: int, longest: int, pad: float
) -> Batch:
    rows = sum(piece.rows for piece in pieces)
    kind = np.dtype(NUMPY_TYPES[target])
    values = aligned(rows * longest * width * kind.itemsize)
    mask = np.full((rows, longest), -1, np.int64)
    lengths = np.full(rows, -1, np.int64)
    addresses = (values.ctypes.data, mask.ctypes.data, lengths.ctypes.data)
    bits = datatypes.bits_of(pad, target)
    table = gather.entries_of(pieces, source, target, width, longest, bits, addresses)
    kernel = on_host(gather.source_of(source, target), "gather")
    # Fewer blocks than there are rows and elements, so that the loops are walked too.
    kernel((2, 2), gather.THREADS, np.array(table, np.uint64), rows)
    return Batch(values.view(kind).reshape(rows, longest, width), mask, lengths)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_batch_is_what_the_reference_says(source: str, target: str, shift: int) -> None:
    shapes = [(1, 4), (2, 7), (0, 5), (1, 0), (3, 1), (1, 9)]
    pieces = requests(shapes, source, 3, shift)
    batch = gather.gather(pieces, source, target, 3, 12, 7)
    assert batch.values.shape == (8, 12, 3)
    assert batch.lengths.tolist() == [4, 7, 7, 0, 1, 1, 1, 9]
    assert np.array_equal(batch.mask, np.arange(12) < batch.lengths[:, None])
    if "INT64" in (source, target):  # beyond float64
        expected = [
            convert(np.frombuffer(p.data, NUMPY_TYPES[source]), source, target) for p in pieces
        ]
        mine = batch.values[batch.mask.astype(bool)].reshape(-1)
        assert mine.tolist() == np.concatenate(expected).tolist()
        assert (batch.values[~batch.mask.astype(bool)] == 7).all()
        return
    exact = gather.gather_reference(pieces, source, 3, 12, 7.0)
    if target == "BOOL":  # what is not 0 is 1; the padding is bits
        exact = np.where(batch.mask[:, :, None] == 1, exact != 0, exact)
    found = to_float64(batch.values, target)
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = (
            to_float64(convert(exact.astype(np.float32), "FP32", target), target)
            if (target in ("FP16", "BF16") and source != target)
            else exact
        )
    assert np.array_equal(found, nearest, equal_nan=True)


@needs_gcc
@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_cuda_source_gives_the_same_batch(source: str, target: str, shift: int) -> None:
    pieces = requests([(1, 4), (2, 70), (0, 5), (1, 0), (3, 1)], source, 3, shift)
    here = gather.gather(pieces, source, target, 3, 100, 1)
    there = by_cuda_source(pieces, source, target, 3, 100, 1)
    for one, other in zip(here, there, strict=True):
        assert one.tobytes() == other.tobytes()


@needs_gcc
def test_one_launch_gathers_several_inputs_and_what_nobody_wants_is_not_written() -> None:
    ids, rows = requests([(1, 3), (2, 5)], "INT64", 1), requests([(3, 1)], "INT64", 4, 1)
    first, second = aligned(3 * 6 * 8), aligned(3 * 4 * 8)
    table = gather.entries_of(ids, "INT64", "INT64", 1, 6, 7, (first.ctypes.data, 0, 0))
    table += gather.entries_of(rows, "INT64", "INT64", 4, 1, 0, (second.ctypes.data, 0, 0))
    table = [(*entry[:6], 0, 0) for entry in table]
    assert gather.grid_of(table) == (1, 6)
    kernel = on_host(gather.source_of("INT64", "INT64"), "gather")
    kernel((1, 4), gather.THREADS, np.array(table, np.uint64), len(table))
    assert first.tobytes() == gather.gather(ids, "INT64", "INT64", 1, 6, 7).values.tobytes()
    assert second.tobytes() == bytes(rows[0].data)


@given(SHAPES, st.integers(0, 2), st.sampled_from(PAIRS), st.integers(0, 1))
@settings(deadline=None)
def test_what_is_gathered_is_scattered_back(
    shapes: list[tuple[int, int]], width: int, pair: tuple[str, str], shift: int
) -> None:
    source, target = pair
    pieces = requests(shapes, source, width, shift)
    batch = gather.gather(pieces, source, target, width)
    answers = [
        Piece(bytearray(p.rows * p.length * width * size_of(target)), p.rows, p.length)
        for p in pieces
    ]
    scatter.scatter(batch.values, answers, target, target)
    for piece, answer in zip(pieces, answers, strict=True):
        expected = convert(np.frombuffer(bytes(piece.data), NUMPY_TYPES[source]), source, target)
        assert bytes(answer.data) == expected.tobytes()


def test_no_requests_make_an_empty_batch() -> None:
    batch = gather.gather([], "FP32", "FP16", 4)
    assert [array.shape for array in batch] == [(0, 0, 4), (0, 0), (0,)]


def test_a_request_may_lie_in_memory_that_cannot_be_written() -> None:
    batch = gather.gather([Piece(b"\1\2", 1, 2)], "UINT8", "UINT8")
    batch.values[0, 0, 0] = 9
    assert batch.values.tolist() == [[[9], [2]]]


@pytest.mark.parametrize(
    ("pieces", "longest", "message"),
    [
        ([Piece(bytes(7), 1, 2)], None, "request 0 has 7 bytes"),
        ([Piece(bytes(8), 1, 2)], 1, "does not fit rows of 1"),
        ([Piece(b"", -1, 0)], None, "request 0"),
    ],
)
def test_what_does_not_fit_is_refused(pieces: list[Piece], longest: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gather.gather(pieces, "FP32", "FP16", 1, longest)


@pytest.mark.gpu
@pytest.mark.skipif(not cuda.has_gpu(), reason="no GPU, or no cupy")
def test_the_gpu_gives_the_same_bits() -> None:
    gather.check()
    scatter.check()
