"""Tensor datatypes by their protocol names, and the conversions that `gather` and `scatter` make.

BF16 has no NumPy type here: its arrays are uint16 with the bits.

A conversion rounds to the nearest, ties to even; what is too large becomes infinity.  A NaN stays a NaN
with its sign and loses its payload: what NumPy and the GPU keep of it differs, and the two paths must
give the same bits.  INT64 to INT32 keeps the low bits, as NumPy does.  The same datatype on both sides
moves bits, whatever they are.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

NUMPY_TYPES: Final[dict[str, Any]] = {
    "BOOL": np.uint8,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "BF16": np.uint16,
    "FP32": np.float32,
    "FP64": np.float64,
}

# Of each conversion, the CUDA expression: the source's bits in `x` to the target's bits.
CONVERSIONS: Final[dict[tuple[str, str], str]] = {
    ("INT64", "INT32"): "(u32)(x)",
    ("INT32", "INT64"): "(u64)(i64)(int)(x)",
    ("FP32", "FP16"): "f16_of_f32((u32)(x))",
    ("FP32", "BF16"): "bf16_of_f32((u32)(x))",
    ("FP16", "FP32"): "f32_of_f16((u32)(x))",
    ("BF16", "FP32"): "f32_of_bf16((u32)(x))",
    ("FP16", "BF16"): "bf16_of_f32(f32_of_f16((u32)(x)))",
    ("BF16", "FP16"): "f16_of_f32(f32_of_bf16((u32)(x)))",
    ("UINT8", "BOOL"): "(u32)((x) != 0)",
    ("UINT8", "FP32"): "f32_of_u8((u32)(x))",
    ("UINT8", "FP16"): "f16_of_f32(f32_of_u8((u32)(x)))",
}

# Loads and stores of an element at any address: clients' tensors lie where their bytes ended up.
SOURCE: Final = r"""
DEVICE u32 f16_of_f32(u32 x) {
  return (x & 0x7fffffffu) > 0x7f800000u ? (x >> 16 & 0x8000u) | 0x7e00u : f16_of_f32_hardware(x);
}
DEVICE u32 f32_of_f16(u32 x) {
  return (x & 0x7fffu) > 0x7c00u ? (x & 0x8000u) << 16 | 0x7fc00000u : f32_of_f16_hardware(x);
}
DEVICE u32 bf16_of_f32(u32 x) {
  if ((x & 0x7fffffffu) > 0x7f800000u) return (x >> 16 & 0x8000u) | 0x7fc0u;
  return (x + 0x7fffu + (x >> 16 & 1u)) >> 16;
}
DEVICE u32 f32_of_bf16(u32 x) {
  return (x & 0x7fffu) > 0x7f80u ? (x & 0x8000u) << 16 | 0x7fc00000u : x << 16;
}
DEVICE u64 load(const u8 *at, int size) {
  u64 x = 0;
  int i;
  if (((u64)at & (u64)(size - 1)) == 0) {
    if (size == 1) return *at;
    if (size == 2) return *(const u16 *)at;
    if (size == 4) return *(const u32 *)at;
    return *(const u64 *)at;
  }
  for (i = 0; i < size; i++) x |= (u64)at[i] << (8 * i);
  return x;
}
DEVICE void store(u8 *at, int size, u64 x) {
  int i;
  if (((u64)at & (u64)(size - 1)) == 0) {
    if (size == 1) *at = (u8)x;
    else if (size == 2) *(u16 *)at = (u16)x;
    else if (size == 4) *(u32 *)at = (u32)x;
    else *(u64 *)at = x;
    return;
  }
  for (i = 0; i < size; i++) at[i] = (u8)(x >> (8 * i));
}
"""


def size_of(datatype: str) -> int:
    """Return the bytes of one element; raise ValueError for a name that is no number's."""
    if datatype not in NUMPY_TYPES:
        raise ValueError(
            f"'{datatype}' is no datatype of numbers; there are {', '.join(NUMPY_TYPES)}"
        )
    return int(np.dtype(NUMPY_TYPES[datatype]).itemsize)


def expression(source: str, target: str) -> str:
    """Return the CUDA expression of a conversion; raise ValueError where there is none."""
    if source == target:
        return "(x)"
    size_of(source)
    size_of(target)
    if (source, target) not in CONVERSIONS:
        raise ValueError(f"there is no conversion from {source} to {target}")
    return CONVERSIONS[source, target]


def constants(source: str, target: str) -> dict[str, int | str]:
    """Return what a kernel that converts must be compiled with."""
    return {
        "SOURCE_BYTES": size_of(source),
        "TARGET_BYTES": size_of(target),
        "CONVERT(x)": expression(source, target),
    }


def convert(array: Array, source: str, target: str) -> Array:
    """Return the array in the target's type, the array itself where nothing changes."""
    if source == target:
        return array
    expression(source, target)
    if source == "BF16":
        bits = array.astype(np.uint32) << np.uint32(16)
        wide: Array = bits.view(np.float32)
        if target == "FP32":
            return _plain_nans(wide, np.isnan(wide), bits, np.uint32(0x7FC00000), 0)
        return convert(wide, "FP32", "FP16")
    if source == "FP16":
        wide = array.astype(np.float32)
        bits = array.view(np.uint16).astype(np.uint32) << np.uint32(16)
        wide = _plain_nans(wide, np.isnan(array), bits, np.uint32(0x7FC00000), 0)
        return wide if target == "FP32" else convert(wide, "FP32", "BF16")
    if source == "FP32":
        bits = np.ascontiguousarray(array).view(np.uint32)
        if target == "FP16":
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                narrow: Array = array.astype(np.float16)
            return _plain_nans(narrow, np.isnan(array), bits, np.uint16(0x7E00), 16)
        odd = bits >> np.uint32(16) & np.uint32(1)
        with np.errstate(over="ignore"):
            rounded = (bits + np.uint32(0x7FFF) + odd >> np.uint32(16)).astype(np.uint16)
        return _plain_nans(rounded, np.isnan(array), bits, np.uint16(0x7FC0), 16)
    if target == "BOOL":  # a client's byte may be 2, which is no truth value of anybody's
        truth: Array = (array != 0).view(np.uint8)
        return truth
    return array.astype(NUMPY_TYPES[target])


def _plain_nans(array: Array, where: Array, bits: Array, quiet: Any, shift: int) -> Array:
    """Put NaNs with the sign of `bits` (32 each) and no payload where they are."""
    if where.any():
        sign = bits[where] >> np.uint32(shift) & np.uint32(0x80000000 >> shift)
        array.view(quiet.dtype)[where] = sign.astype(quiet.dtype) | quiet
    return array


def bits_of(value: float, datatype: str) -> int:
    """Return the bits of one number in a datatype; raise ValueError where it does not fit."""
    if datatype == "BF16":
        return int(convert(np.array([value], np.float32), "FP32", "BF16")[0])
    kind = NUMPY_TYPES[datatype]
    try:
        array = np.array([value], kind)
    except OverflowError as error:
        raise ValueError(f"{value} does not fit {datatype}") from error
    return int.from_bytes(array.tobytes(), "little")


def to_float64(array: Array, datatype: str) -> Array:
    """Return the numbers that an array stands for, for references."""
    if datatype == "BF16":
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # of a NaN that signals
        return array.astype(np.float64)
