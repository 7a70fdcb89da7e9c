"""Finding out what a module takes and gives, by trial runs.

A module is run with inputs of two different sizes for every axis that varies; an output axis that
moves as an input axis does is that axis.  So a client sees true shapes, and a batch can be split.
Then it is tried whether a row's answer depends on its neighbours, or on padding: a module that
normalises over the batch, or pays no heed to its mask, would give answers that depend on who else
asks, and nobody would see it.

First axes that vary are taken for the batch, unless nothing batches: then they have nothing to do with
each other but what the program says.  Where trials have shown that nothing batches, they are made anew.

Invariants
 1. What the model's configuration says is kept; only what it does not say is inferred.
 2. A module that fails a trial run cannot be served: the error is raised, with the sizes tried.
 3. Batching and padding are switched off where a trial shows that they change answers; for a model with
    state nobody tries, its answers depend on what it answered before.

Called by the packer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from overcommit.runtime import sequence_terms
from overcommit.runtime.config import TENSORS_MAX, Batching, ModelConfig, TensorSpec
from overcommit.runtime.errors import ModelError, RepositoryError
from overcommit.runtime.misfits import fits
from overcommit.runtime.probes import (
    Array,
    Arrays,
    Known,
    Sizes,
    axis_names,
    free_axes,
    row_sizes,
    settled,
    trial_inputs,
)

log = logging.getLogger("overcommit.packer")

Run = Callable[[Arrays], tuple[Arrays, dict[str, str]]]  # outputs, and their V2 datatypes

# Other batch sizes take other paths through a BLAS; answers that really mix rows differ by far more.
TOLERANCE: Final = {"FP16": 2e-2, "BF16": 5e-2}
TOLERANCE_DEFAULT: Final = 1e-3
WIDE_BELOW: Final = 128  # whole numbers of the second draw


@dataclass(slots=True, frozen=True)
class Outcome:
    """What the trials found, and one run to compare other ways of running with."""

    config: ModelConfig
    inputs: Arrays
    outputs: Arrays


# --- outputs ------------------------------------------------------------------------------------
def describe_outputs(
    name: str,
    inputs: Sequence[TensorSpec],
    given: Sequence[Arrays],
    results: Sequence[tuple[Arrays, dict[str, str]]],
) -> tuple[TensorSpec, ...]:
    """Describe the outputs of two runs.  Raises ModelError when the runs do not agree."""
    (first, types), (second, _) = results
    if list(first) != list(second) or not 0 < len(first) <= TENSORS_MAX:
        raise ModelError(
            f"{name} gives the outputs {list(first)[:9]} for one size and {list(second)[:9]} for "
            f"another"
        )
    moves: list[tuple[str, int, int]] = []
    for spec in inputs:
        for axis, axis_name in enumerate(axis_names(spec)):
            if axis_name is not None:
                one, two = (arrays[spec.name].shape[axis] for arrays in given)
                moves.append((axis_name, one, two))
    outputs = []
    for output, array in first.items():
        if array.ndim != second[output].ndim:
            raise ModelError(
                f"output '{output}' of {name} has shape {list(array.shape)} for one row and "
                f"{list(second[output].shape)} for more: it must not drop the axis"
            )
        sizes_of = list(zip(array.shape, second[output].shape, strict=True))
        axes = tuple(
            next((axis for axis, a, b in moves if (a, b) == pair), None)
            if pair[0] != pair[1]
            else None
            for pair in sizes_of
        )
        shape = tuple(-1 if one != two else one for one, two in sizes_of)
        outputs.append(TensorSpec(name=output, datatype=types[output], shape=shape, axes=axes))
    return tuple(outputs)


# --- does a row stand alone? --------------------------------------------------------------------
def is_close(one: Array, two: Array, datatype: str) -> bool:
    """Whether two answers are equal but for the order of sums."""
    if one.shape != two.shape:
        return False
    if one.dtype == object or (one.dtype.kind in "bui" and datatype != "BF16"):
        return bool(np.array_equal(one, two))
    if datatype == "BF16":
        one, two = ((x.astype(np.uint32) << 16).view(np.float32) for x in (one, two))
    limit = TOLERANCE.get(datatype, TOLERANCE_DEFAULT)
    finite = np.abs(one[np.isfinite(one)].astype(np.float64))
    scale = float(finite.max()) if finite.size else 1.0
    return bool(np.allclose(one, two, rtol=limit, atol=limit * scale, equal_nan=True))


def rows_stand_alone(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], run: Run, sizes: Sizes
) -> bool:
    """Whether each row of a batch gets the answer that it gets alone.

    True as well when the values that are tried are none that the model takes.  A model that mixes rows
    does so with any values; one whose answers hang on the last bit of a sum (magika, given nothing but
    zeros and ones) seems to with some.  So it takes two draws to be found guilty.
    """
    verdict = _rows_agree(inputs, outputs, run, sizes, below=2)
    if verdict is False:
        return _rows_agree(inputs, outputs, run, sizes, below=WIDE_BELOW) is True
    return True


def _rows_agree(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    run: Run,
    sizes: Sizes,
    *,
    below: int,
) -> bool | None:
    """Compare a batch with its rows; None when the model takes no such values."""
    batch = trial_inputs(inputs, sizes[1], below - 1, vary=True, below=below)
    rows = sizes[1].get("batch", 0)
    try:
        together, _ = run(batch)
        alone = [
            run({name: array[row : row + 1].copy() for name, array in batch.items()})[0]
            for row in range(rows)
        ]
    except ModelError as error:
        log.debug("rows were not compared: %s", error.message)
        return None
    return all(
        is_close(together[spec.name][row : row + 1], answer[spec.name], spec.datatype)
        for spec in outputs
        for row, answer in enumerate(alone)
    )


def ragged_axes(inputs: Sequence[TensorSpec]) -> set[str]:
    """Names of the axes that may be padded."""
    padded: dict[str, bool] = {}
    for spec in inputs:
        for axis, name in enumerate(axis_names(spec)):
            if axis and name is not None:
                padded[name] = padded.get(name, True) and spec.pad is not None
    return {name for name, is_padded in padded.items() if is_padded}


def padding_is_harmless(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], run: Run, sizes: Sizes
) -> bool:
    """Whether an answer stays what it is when the input is padded and the output cut back."""
    axes = ragged_axes(inputs)
    least = {**sizes[0], "batch": 1}
    short = trial_inputs(inputs, least, 0, vary=True)
    long: Arrays = {}
    for spec in inputs:
        array = short[spec.name]
        extra = [
            (0, 4 if name in axes and axis else 0) for axis, name in enumerate(axis_names(spec))
        ]
        fill: Any = b"" if spec.datatype == "BYTES" else spec.pad or 0
        long[spec.name] = np.pad(array, extra, constant_values=fill)
    try:
        (one, _), (two, _) = run(short), run(long)
    except ModelError as error:
        log.debug("padding was not tried: %s", error.message)
        return True
    for spec in outputs:
        cut = tuple(
            slice(size) if name in axes and axis else slice(None)
            for axis, (size, name) in enumerate(zip(one[spec.name].shape, spec.axes, strict=True))
        )
        if not is_close(one[spec.name], two[spec.name][cut], spec.datatype):
            return False
    return True


# --- all of it ----------------------------------------------------------------------------------
def complete(name: str, config: ModelConfig, known: Known, run: Run) -> Outcome:
    """Fill in a configuration's inputs, outputs and whether the model batches at all.

    Raises ModelError when the module fails its runs, RepositoryError when the configuration does
    not fit it.
    """
    may_batch = bool(config.batching.max_batch_size) and known.batch_limits[0] == 1
    outcome = _complete(name, config, known, run, may_batch=may_batch)
    batching, inputs = outcome.config.batching, outcome.config.inputs
    if may_batch and not batching.max_batch_size and _is_assumed(name, config, known, inputs):
        return _complete(name, config, known, run, may_batch=False)
    return outcome


def _is_assumed(name: str, config: ModelConfig, known: Known, inputs: Sequence[TensorSpec]) -> bool:
    """Whether several of these inputs have one first axis because it was taken for the batch."""
    own = settled(name, config.inputs, known, batches=False)
    pairs = [(one.axes[:1], two.axes[:1]) for one, two in zip(inputs, own, strict=True)]
    return sum(one == ("batch",) != two for one, two in pairs) > 1


def _complete(
    name: str, config: ModelConfig, known: Known, run: Run, *, may_batch: bool
) -> Outcome:
    inputs = settled(name, config.inputs, known, batches=may_batch)
    sequence_terms.check_found(name, config, inputs)
    used = tuple(spec for spec in inputs if not spec.optional)
    free = free_axes(inputs, known)
    first_sizes, seconds = row_sizes(free, known.sizes)
    first_given = trial_inputs(used, first_sizes, 0)
    first = run(first_given)
    given, second, sizes, misfit = _run_more_rows(used, seconds, run)
    batches = may_batch
    if sizes is seconds[-1]:
        # One row works: then it may be that more than one does not.
        log.info("%s takes one row at a time: %s", name, misfit)
        batches = False
        inputs = tuple(_one_row(spec, ("batch", *free)) for spec in inputs)
    found = describe_outputs(name, used, (first_given, given), (first, second))
    outputs = _chosen(name, config, found)
    batches = batches and all(
        bool(spec.axes) and spec.axes[0] == "batch" for spec in (*inputs, *outputs)
    )
    tried = (first_sizes, sizes)
    # What the rows of a model with state have to do with each other is said by its file.
    is_stateful = config.sequence is not None
    if batches and not is_stateful and not rows_stand_alone(used, outputs, run, tried):
        log.warning("%s mixes the rows of a batch: it is served request by request", name)
        batches = False
    if batches and ragged_axes(inputs) and not padding_is_harmless(used, outputs, run, tried):
        log.warning("%s changes its answers with padding: only equal sizes share a batch", name)
        inputs = tuple(msgspec.structs.replace(spec, pad=None) for spec in inputs)
    return Outcome(
        msgspec.structs.replace(
            config,
            inputs=inputs,
            outputs=outputs,
            batching=_batching(config.batching, batches, known.batch_limits[1]),
        ),
        given,
        second[0],
    )


def _run_more_rows(
    inputs: Sequence[TensorSpec], seconds: Sequence[Mapping[str, int]], run: Run
) -> tuple[Arrays, tuple[Arrays, dict[str, str]], Mapping[str, int], str]:
    """Run with the first of these sizes that the module takes: what was given, came, which, why not others.

    Raises ModelError where it takes none of them.
    """
    misfit = ""
    for sizes in seconds[:-1]:
        given = trial_inputs(inputs, sizes, 1)
        try:
            return given, run(given), sizes, misfit
        except ModelError as error:
            misfit = error.message
    given = trial_inputs(inputs, seconds[-1], 1)
    return given, run(given), seconds[-1], misfit


def _one_row(spec: TensorSpec, firsts: Collection[str]) -> TensorSpec:
    if not spec.axes or spec.axes[0] not in firsts:
        return spec
    return msgspec.structs.replace(spec, shape=(1, *spec.shape[1:]), axes=(None, *spec.axes[1:]))


def _chosen(
    name: str, config: ModelConfig, found: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    if not config.outputs:
        return found
    known = {spec.name: spec for spec in found}
    if missing := [spec.name for spec in config.outputs if spec.name not in known]:
        raise RepositoryError(
            f"{name} has no output {missing}, which its model.toml lists; it gives {sorted(known)}"
        )
    for spec in config.outputs:
        other = known[spec.name]
        if spec.datatype != other.datatype or not fits(spec.shape, other.shape):
            raise RepositoryError(
                f"output '{spec.name}' of {name} is {other.datatype} {list(other.shape)}, its "
                f"model.toml says {spec.datatype} {list(spec.shape)}"
            )
    return tuple(
        msgspec.structs.replace(known[spec.name], declared=spec.shape) for spec in config.outputs
    )


def _batching(batching: Batching, batches: bool, rows_max: int) -> Batching:
    size = min(batching.max_batch_size, rows_max) if batches else 0
    return msgspec.structs.replace(batching, max_batch_size=size)
