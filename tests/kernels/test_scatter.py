"""A batch's result into the blocks of its requests."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from kernel_rig import aligned, aligned_copy, needs_gcc, on_host

from overcommit.kernels import datatypes, scatter
from overcommit.kernels.datatypes import NUMPY_TYPES, size_of, to_float64
from overcommit.kernels.gather import Piece

PAIRS = [*datatypes.CONVERSIONS, ("FP32", "FP32"), ("INT64", "INT64")]
SHAPES = [(1, 4), (2, 9), (0, 5), (1, 0), (3, 1)]


def answers(target: str, width: int, shift: int = 0) -> list[Piece]:
    pieces = []
    for rows, length in SHAPES:
        memory = aligned(rows * length * width * size_of(target) + shift)
        memory[:] = 0xAA
        pieces.append(Piece(memory[shift:], rows, length))
    return pieces


def result(source: str, width: int) -> np.ndarray[Any, np.dtype[Any]]:
    rows = sum(rows for rows, _ in SHAPES)
    raw = np.random.default_rng(3).integers(0, 256, rows * 9 * width * size_of(source), np.uint8)
    return raw.view(NUMPY_TYPES[source]).reshape(rows, 9, width)


def test_answers_are_what_the_reference_says() -> None:
    values, pieces = result("FP16", 3), answers("FP32", 3, 1)
    scatter.scatter(values, pieces, "FP16", "FP32")
    for piece, expected in zip(
        pieces, scatter.scatter_reference(values, pieces, "FP16"), strict=True
    ):
        found = to_float64(np.frombuffer(bytes(piece.data), np.float32), "FP32").tolist()
        assert len(found) == len(expected)
        assert all(
            x == y or (math.isnan(x) and math.isnan(y))
            for x, y in zip(found, expected, strict=True)
        )


@needs_gcc
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_cuda_source_writes_the_same_bytes(source: str, target: str, shift: int) -> None:
    values = result(source, 3)
    here, there = answers(target, 3, shift), answers(target, 3, shift)
    scatter.scatter(values, here, source, target)
    kernel = on_host(scatter.source_of(source, target), "scatter")
    lies = aligned_copy(values)
    table = scatter.entries_of(lies.ctypes.data, 9, 3, there, source, target)
    kernel((1, 2), scatter.THREADS, np.array(table, np.uint64), len(table))
    assert [bytes(p.data) for p in there] == [bytes(p.data) for p in here]


def test_a_result_need_not_be_contiguous() -> None:
    values = result("FP32", 6)[:, :, ::2]
    here, there = answers("FP16", 3), answers("FP16", 3)
    scatter.scatter(values, here, "FP32", "FP16")
    scatter.scatter(values.copy(), there, "FP32", "FP16")
    assert [bytes(p.data) for p in here] == [bytes(p.data) for p in there]


@pytest.mark.parametrize(
    ("values", "pieces", "message"),
    [
        (np.zeros((1, 2, 1), np.float32), [Piece(bytearray(7), 1, 2)], "request 0"),
        (np.zeros((1, 2, 1), np.float32), [Piece(bytes(8), 1, 2)], "request 0"),
        (np.zeros((1, 2, 1), np.float32), [Piece(bytearray(12), 1, 3)], "request 0"),
        (np.zeros((2, 2, 1), np.float32), [Piece(bytearray(8), 1, 2)], "a result of 2 rows"),
        (np.zeros((1, 2), np.float32), [], "a result must be"),
        (np.zeros((1, 2, 1), np.float64), [], "a result must be"),
    ],
)
def test_what_does_not_fit_is_refused_unwritten(values: Any, pieces: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scatter.scatter(values, pieces, "FP32", "FP32")
    assert not any(any(piece.data) for piece in pieces)
