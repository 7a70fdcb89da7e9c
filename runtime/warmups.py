"""The requests that warm a version up in a worker, as its configuration has them.

    [[warmup]]  name, batch_size, count, inputs.x = {datatype, shape, data = "zero" | "random" | "file"}

Invariants
 1. An input that a request leaves out is one row of zeros, as without any `[[warmup]]`.
 2. A file is read whole only if it has exactly the bytes that the shape needs; else ImageError says so.

Called by the runner, once for each version that was bound.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from overcommit.runtime.config import BODY_BYTES_MAX, ModelConfig, TensorSpec, WarmupInput, smallest
from overcommit.runtime.errors import ImageError
from overcommit.runtime.signature import NUMPY_TYPES

Array = np.ndarray[Any, Any]
SEED: Final = 0


def requests_of(config: ModelConfig) -> Iterator[tuple[str, dict[str, Array]]]:
    """Yield name and inputs of each run.  Raises ImageError when a file does not fit."""
    zero = {spec.name: zeros(spec) for spec in config.inputs}
    for warmup in config.warmup:
        rows = (warmup.batch_size,) if config.batching.max_batch_size else ()
        inputs = dict(zero)
        for spec in config.inputs:
            if rows and spec.shape:
                inputs[spec.name] = np.repeat(zero[spec.name], rows[0], axis=0)
        for each in warmup.inputs:
            if each.name in zero:
                inputs[each.name] = _array(each, (*rows, *each.shape))
        for _ in range(warmup.count):
            yield warmup.name, inputs


def zeros(spec: TensorSpec) -> Array:
    """One row, the smallest that the spec allows."""
    shape = smallest(spec.shape)
    kind = NUMPY_TYPES[spec.datatype]
    return np.full(shape, b"", object) if kind == np.dtype(object) else np.zeros(shape, kind)


def _array(given: WarmupInput, shape: tuple[int, ...]) -> Array:
    kind = NUMPY_TYPES[given.datatype]
    if given.data == "file":
        return _read(given, shape, kind)
    if kind == np.dtype(object):
        return np.full(shape, b"warm-up" if given.data == "random" else b"", object)
    if given.data == "zero":
        return np.zeros(shape, kind)
    rng = np.random.default_rng(SEED)
    if given.datatype == "BF16":
        return (rng.random(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if kind.kind == "f":
        return rng.random(shape).astype(kind)
    return rng.integers(0, 2, shape).astype(kind)


def _read(given: WarmupInput, shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
    count = math.prod(shape)
    try:
        size = os.stat(given.file).st_size
        if size > BODY_BYTES_MAX or (kind != np.dtype(object) and size != count * kind.itemsize):
            raise ImageError(
                f"warm-up input '{given.name}': {given.file} has {size} bytes, the shape "
                f"{list(shape)} of {given.datatype} needs {count * kind.itemsize}"
            )
        with open(given.file, "rb") as file:
            content = file.read(size)
    except OSError as error:
        raise ImageError(f"warm-up input '{given.name}': {error}") from error
    if kind != np.dtype(object):
        return np.frombuffer(content, kind).reshape(shape)
    texts: list[bytes] = []
    at = 0
    while at + 4 <= len(content) and len(texts) < count:
        (length,) = struct.unpack_from("<I", content, at)
        texts.append(content[at + 4 : at + 4 + length])
        at += 4 + length
    if len(texts) != count or at != len(content):
        raise ImageError(f"warm-up input '{given.name}': {given.file} has not {count} elements")
    array = np.empty(count, object)
    array[:] = texts
    return array.reshape(shape)
