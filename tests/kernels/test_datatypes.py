"""Conversions: to the nearest of the float64 value, special numbers included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_rig import aligned, aligned_copy, needs_gcc, on_host

from overcommit.kernels import cuda, datatypes
from overcommit.kernels.datatypes import CONVERSIONS, NUMPY_TYPES, convert, size_of, to_float64

# One thread an element, which is all that a conversion is.
KERNEL = r"""
KERNEL convert_all(const u8 *in, u8 *out) {
  u64 x = load(in + threadIdx.x * SOURCE_BYTES, SOURCE_BYTES);
  store(out + threadIdx.x * TARGET_BYTES, TARGET_BYTES, CONVERT(x));
}
"""


def every_kind(datatype: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Return elements with each special number, what lies between two of a shorter type, and noise."""
    kind = np.dtype(NUMPY_TYPES[datatype])
    bits = np.random.default_rng(1).integers(0, 256, 500 * kind.itemsize, np.uint8)
    if datatype == "FP32":
        tops = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7FC00001])
        near = [0x33000000, 0x33000001, 0x387FC000, 0x387FE000, 0x477FF000, 0x477FEFFF, 0x7F7FFFFF]
        halves = [0x3F800000 + k * 0x1000 + d for k in range(8) for d in (-1, 0, 1)]
        halves += [0x3F800000 + k * 0x8000 + d for k in range(8) for d in (-1, 0, 1)]
        specials = np.array([*tops, *near, *halves, 1, 0x007FFFFF, 0x80000001], np.uint32)
        bits = np.concatenate([specials.view(np.uint8), bits])
    elif size_of(datatype) == 2:
        bits = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    elif datatype == "UINT8":
        bits = np.arange(256, dtype=np.uint8)
    return bits.view(kind)


@pytest.mark.parametrize(("source", "target"), [p for p in CONVERSIONS if "INT" not in p[0]])
def test_floats_become_the_nearest(source: str, target: str) -> None:
    given = every_kind(source)
    exact = to_float64(given, source)
    found = to_float64(convert(given, source, target), target)
    assert np.array_equal(np.isnan(exact), np.isnan(found))
    assert np.array_equal(np.signbit(exact), np.signbit(found))
    # No other value of the shorter type is nearer.
    values = to_float64(np.arange(1 << 16, dtype=np.uint16).view(NUMPY_TYPES[target]), target)
    values = np.unique(values[np.isfinite(values)])
    step = values[-1] - values[-2]
    is_number = np.isfinite(exact)
    x, y = exact[is_number], found[is_number]
    assert (np.abs(x[np.isinf(y)]) >= values[-1] + step / 2).all()
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    at = np.searchsorted(values, y)
    assert (np.abs(x - y) <= np.abs(x - values[np.maximum(at - 1, 0)]))[at > 0].all()
    top = len(values) - 1
    assert (np.abs(x - y) <= np.abs(x - values[np.minimum(at + 1, top)]))[at < top].all()


def test_a_nan_keeps_its_sign_and_nothing_else() -> None:
    nans = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert convert(nans, "FP32", "FP16").view(np.uint16).tolist() == [0x7E00, 0xFE00]
    assert convert(nans, "FP32", "BF16").tolist() == [0x7FC0, 0xFFC0]
    halves = np.array([0x7C01, 0xFFFF], np.uint16).view(np.float16)
    assert convert(halves, "FP16", "FP32").view(np.uint32).tolist() == [0x7FC00000, 0xFFC00000]


def test_integers_keep_their_low_bits() -> None:
    given = np.array([1, -1, 2**31, -(2**40) - 7], np.int64)
    assert convert(given, "INT64", "INT32").tolist() == [1, -1, -(2**31), -7]
    assert convert(np.array([-5], np.int32), "INT32", "INT64").tolist() == [-5]


@needs_gcc
@pytest.mark.parametrize(("source", "target"), CONVERSIONS)
@pytest.mark.parametrize("shift", [0, 1])
def test_the_cuda_source_converts_to_the_same_bits(source: str, target: str, shift: int) -> None:
    given = every_kind(source)
    text = cuda.with_constants(datatypes.SOURCE + KERNEL, datatypes.constants(source, target))
    kernel = on_host(text, "convert_all")
    for start in range(0, len(given), 512):
        piece = given[start : start + 512]
        expected = convert(piece, source, target)
        memory = aligned_copy(bytes(shift) + piece.tobytes())
        out = aligned(expected.nbytes + shift)
        kernel((1, 1), len(piece), memory[shift:], out[shift:])
        assert out[shift:].tobytes() == expected.tobytes()


def test_other_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="no conversion from FP32 to INT8"):
        convert(np.zeros(1, np.float32), "FP32", "INT8")
    with pytest.raises(ValueError, match="'BYTES' is no datatype"):
        size_of("BYTES")


def test_padding_that_does_not_fit_is_refused() -> None:
    assert datatypes.bits_of(-1, "INT32") == 0xFFFFFFFF
    assert datatypes.bits_of(1.0, "BF16") == 0x3F80
    with pytest.raises(ValueError, match="does not fit"):
        datatypes.bits_of(300, "UINT8")
