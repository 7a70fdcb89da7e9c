"""Arrays of a caller to V2 tensors and back.

    NumPy     bool int8..int64 uint8..uint64 float16 float32 float64   object, str, bytes
    V2        BOOL INT8..INT64 UINT8..UINT64 FP16    FP32    FP64      BYTES

BF16 has no NumPy type: it is given as any float, rounded to nearest even, and comes back as float32,
in which each of its values is exact.

Invariants
 1. Numbers are converted only where no value can change its meaning: whole numbers to floats and to
    whole numbers that hold them, floats to floats.  Else ValueError names the input and both types.
 2. What comes back is writable and the caller's own.

Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike

from overcommit.server import binary

Array = np.ndarray[Any, Any]

NUMPY_TYPES: Final = {
    "BOOL": "?",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
_DATATYPES: Final = {np.dtype(code): name for name, code in NUMPY_TYPES.items()}


def to_wire(
    name: str, value: ArrayLike, datatype: str
) -> tuple[tuple[int, ...], bytes | memoryview]:
    """Give an input as the model takes it: its shape and its bytes.  Raises ValueError.

    The bytes may be the caller's own array: they are to be sent before the caller goes on.
    """
    array = np.asarray(value)
    if datatype == "BYTES":
        return array.shape, _texts(name, array)
    if array.dtype == object or array.dtype.kind in "SUV":
        raise ValueError(f"input '{name}' is {array.dtype}, the model takes {datatype}")
    if datatype == "BF16":
        return array.shape, _to_bf16(name, array)
    wanted = np.dtype(NUMPY_TYPES[datatype])
    if array.dtype != wanted:
        array = _converted(name, array, wanted, datatype)
    # Not `array.data.cast`: a tensor without elements has no view of another format.
    return array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _converted(name: str, array: Array, wanted: np.dtype[Any], datatype: str) -> Array:
    kinds = array.dtype.kind + wanted.kind
    if kinds in ("ff", "if", "uf", "bf", "bi", "bu"):
        return array.astype(wanted)
    if kinds in ("ii", "iu", "ui", "uu"):
        limits = np.iinfo(wanted)
        if array.size and not (limits.min <= int(array.min()) and int(array.max()) <= limits.max):
            raise ValueError(
                f"input '{name}' holds {array.min()} to {array.max()}, the model takes {datatype}"
            )
        return array.astype(wanted)
    raise ValueError(f"input '{name}' is {array.dtype}, the model takes {datatype}")


def _to_bf16(name: str, array: Array) -> bytes:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"input '{name}' is {array.dtype}, the model takes BF16")
    values = np.ascontiguousarray(array, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding would carry a NaN of small payload into infinity.
    quiet = np.where(np.isnan(values), (bits >> 16) | 0x40, rounded)
    return quiet.astype("<u2").tobytes()


def _texts(name: str, array: Array) -> bytes:
    elements: list[bytes] = []
    for element in array.reshape(-1).tolist():
        if isinstance(element, str):
            elements.append(element.encode())
        elif isinstance(element, bytes):
            elements.append(element)
        else:
            raise ValueError(
                f"input '{name}' holds {type(element).__name__}, the model takes texts or bytes"
            )
    return binary.join_bytes(elements)


def datatype_of(name: str, value: ArrayLike) -> str:
    """Guess a datatype when the model's own is not known.  Raises ValueError."""
    array = np.asarray(value)
    if array.dtype == object or array.dtype.kind in "SU":
        return "BYTES"
    found = _DATATYPES.get(array.dtype.newbyteorder("<"))
    if found is None:
        raise ValueError(f"input '{name}' is {array.dtype}, for which V2 has no datatype")
    return found


def from_wire(datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """Make an array of a tensor's bytes.  Raises ValueError when they do not fit the shape."""
    if datatype == "BYTES":
        elements = binary.split_bytes(memoryview(data))
        array = np.empty(len(elements), object)
        array[:] = elements
        return array.reshape(tuple(shape))
    if datatype == "BF16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tuple(shape))
    return np.frombuffer(bytearray(data), NUMPY_TYPES[datatype]).reshape(tuple(shape))


def from_json(datatype: str, shape: Sequence[int], values: Sequence[object]) -> Array:
    """Make an array of a tensor that came as JSON."""
    if datatype == "BYTES":
        array = np.empty(math.prod(shape), object)
        array[:] = [str(value).encode() for value in values]
        return array.reshape(tuple(shape))
    plain = [math.nan if value is None else value for value in values]
    kind = "<f4" if datatype == "BF16" else NUMPY_TYPES[datatype]
    return np.array(plain, kind).reshape(tuple(shape))
