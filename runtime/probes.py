"""What a module is tried with: the axes of its inputs, sizes for them, and tensors of these sizes.

An axis that varies has the name that the configuration or the program gives it, and axes of one name
have one size.  A first axis without a name is taken for the batch, "batch", where the model may batch;
otherwise it is its input's own, "<name>.0", as every other axis without a name is.

Invariants
 1. What the configuration or the program says of an axis is kept.
 2. The two runs of a module differ in every axis that varies, unless the second is of one row as well.

Pure.  Called by the trials and by engines' sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from overcommit.runtime.config import TensorSpec
from overcommit.runtime.errors import RepositoryError

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Sizes = tuple[Mapping[str, int], Mapping[str, int]]

# One row comes first: it is the commonest request, and where models squeeze an axis away.
SIZES: Final[Sizes] = ({"batch": 1, "sequence": 7}, {"batch": 3, "sequence": 11})
_NUMPY: Final = {
    "BOOL": "bool",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BF16": "uint16",
    "BYTES": "object",
}


@dataclass(slots=True, frozen=True)
class Known:
    """What an engine knows about a module's inputs before it has run."""

    inputs: tuple[TensorSpec, ...] = ()
    sizes: Sizes = SIZES
    batch_limits: tuple[int, int] = (1, 1 << 40)


def numpy_type(datatype: str) -> np.dtype[Any]:
    """Host array type of a V2 datatype."""
    return np.dtype(_NUMPY.get(datatype, datatype.lower()))


def axis_names(spec: TensorSpec, *, batches: bool = True) -> tuple[str | None, ...]:
    """Names of an input's axes: given, or "batch" for a varying first axis and "<name>.<i>".

    None where an axis does not vary.
    """
    given = spec.axes or (None,) * len(spec.shape)
    names = (
        None if size >= 0 else name or ("batch" if batches and not axis else f"{spec.name}.{axis}")
        for axis, (size, name) in enumerate(zip(spec.shape, given, strict=True))
    )
    return tuple(names)


def settled(
    name: str, given: Sequence[TensorSpec], known: Known, *, batches: bool
) -> tuple[TensorSpec, ...]:
    """Take what the configuration says about inputs, with the axes that the engine knows.

    `batches`: the model may.  Raises RepositoryError where nobody says anything.
    """
    specs = tuple(given) or known.inputs
    if not specs:
        raise RepositoryError(
            f"{name} does not say what it takes: add [[input]] tables to its model.toml"
        )
    by_name = {spec.name: spec for spec in known.inputs}
    with_axes = []
    for spec in specs:
        engine = by_name.get(spec.name)
        if not spec.axes and engine is not None and len(engine.shape) == len(spec.shape):
            axes = zip(axis_names(engine, batches=batches), spec.shape, strict=True)
            spec = msgspec.structs.replace(
                spec, axes=tuple(axis if size < 0 else None for axis, size in axes)
            )
        with_axes.append(msgspec.structs.replace(spec, axes=axis_names(spec, batches=batches)))
    return tuple(with_axes)


def trial_inputs(
    inputs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    trial: int,
    *,
    vary: bool = False,
    below: int = 2,
) -> Arrays:
    """Make small inputs: ones, which are valid token ids and masks, or seeded values that differ.

    Of the latter, whole numbers are below `below`.
    """
    rng = np.random.default_rng(trial)
    arrays: Arrays = {}
    for spec in inputs:
        shape = tuple(
            size if size >= 0 else sizes.get(name or "", 5 + 3 * trial + axis)
            for axis, (size, name) in enumerate(zip(spec.shape, axis_names(spec), strict=True))
        )
        arrays[spec.name] = _values(spec, shape, rng if vary else None, below)
    return arrays


def _values(
    spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator | None, below: int
) -> Array:
    kind = numpy_type(spec.datatype)
    # A mask of ones is the one that every model takes.
    if rng is None or spec.name.endswith("mask"):
        fill: Any = b"text" if spec.datatype == "BYTES" else 1
        if spec.datatype == "BF16":
            fill = 0x3F80
        return np.full(shape, fill, kind)
    if spec.datatype == "BYTES":
        texts = np.empty(shape, object)
        texts.reshape(-1)[:] = [b"text %d" % i for i in range(texts.size)]
        return texts
    if spec.datatype == "BF16":
        return (rng.random(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if kind.kind == "f":
        return rng.random(shape).astype(kind)
    if kind.kind == "b":
        below = 2
    return rng.integers(0, below, shape).astype(kind)  # below 2: ids that any vocabulary has


def free_axes(inputs: Sequence[TensorSpec], known: Known) -> list[str]:
    """Names of the first axes that are an input's own, and that the engine chooses no sizes for."""
    firsts = [(f"{spec.name}.0", spec.axes[:1]) for spec in inputs]
    return [own for own, axes in firsts if axes == (own,) and own not in known.sizes[0]]


def row_sizes(free: Sequence[str], sizes: Sizes) -> tuple[Mapping[str, int], list[dict[str, int]]]:
    """Sizes of the first run, and of the second: where it fails, the next of these may do.

    Inputs with first axes of their own get unlike numbers of rows; but a model may want like ones of
    some, or one row at a time.
    """
    ones = dict.fromkeys(free, 1)
    unlike = {axis: SIZES[1]["batch"] + number for number, axis in enumerate(free)}
    like = dict.fromkeys(free, SIZES[1]["batch"])
    seconds = [{**sizes[1], **unlike}]
    if unlike != like:
        seconds.append({**sizes[1], **like})
    seconds.append({**sizes[1], **ones, "batch": sizes[0].get("batch", 1)})
    return {**sizes[0], **ones}, seconds
