"""Finding out what a module takes and gives, by trial runs.

A module is run with inputs of two different sizes for every axis that varies; an output axis that
moves as an input axis does is that axis.  So a client sees true shapes, and a batch can be split.

Invariants
 1. What the model's configuration says is kept; only what it does not say is inferred.
 2. A module that fails a trial run cannot be served: the error is raised, with the sizes tried.

Called by the packer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from overcommit.runtime.config import ModelConfig, TensorSpec
from overcommit.runtime.errors import ModelError, RepositoryError

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
Datatypes = Callable[[], Mapping[str, str]]

_SIZES = ({"batch": 2, "sequence": 7}, {"batch": 3, "sequence": 11})
_NUMPY = {
    "BOOL": "bool",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BF16": "uint16",
    "BYTES": "object",
}


def numpy_type(datatype: str) -> np.dtype:
    """Host array type of a V2 datatype."""
    return np.dtype(_NUMPY.get(datatype, datatype.lower()))


def axis_names(spec: TensorSpec) -> tuple[str | None, ...]:
    """Names of a spec's axes: given, or "batch" for a varying first axis and "x<i>" for others."""
    if spec.axes:
        return spec.axes
    names = (
        None if size >= 0 else ("batch" if axis == 0 else f"{spec.name}.{axis}")
        for axis, size in enumerate(spec.shape)
    )
    return tuple(names)


def trial_inputs(inputs: Sequence[TensorSpec], trial: int) -> dict[str, np.ndarray]:
    """Make small inputs of the trial's sizes: ones, which are valid token ids and masks."""
    arrays = {}
    for spec in inputs:
        shape = []
        for axis, (size, name) in enumerate(zip(spec.shape, axis_names(spec), strict=True)):
            if size >= 0:
                shape.append(size)
            else:
                shape.append(_SIZES[trial].get(name or "", 5 + 3 * trial + axis))
        if spec.datatype == "BYTES":
            arrays[spec.name] = np.full(shape, b"text", object)
        else:
            arrays[spec.name] = np.ones(shape, numpy_type(spec.datatype))
    return arrays


def infer_outputs(
    name: str, inputs: Sequence[TensorSpec], run: Run, datatypes: Mapping[str, str] | None = None
) -> tuple[TensorSpec, ...]:
    """Run the module twice and describe its outputs.

    Raises ModelError when a trial run fails or the runs do not agree on the outputs.
    """
    used = [spec for spec in inputs if not spec.optional]
    given = [trial_inputs(used, trial) for trial in (0, 1)]
    results = [run(arrays) for arrays in given]
    if list(results[0]) != list(results[1]):
        raise ModelError(f"model '{name}' gives other outputs for other sizes")
    sizes: list[tuple[str, int, int]] = []
    for spec in used:
        for axis, axis_name in enumerate(axis_names(spec)):
            if axis_name is not None:
                first, second = (arrays[spec.name].shape[axis] for arrays in given)
                sizes.append((axis_name, first, second))
    outputs = []
    for output, first_array in results[0].items():
        second_array = results[1][output]
        if first_array.ndim != second_array.ndim:
            raise ModelError(f"output '{output}' of model '{name}' changes its rank")
        shape: list[int] = []
        axes: list[str | None] = []
        for one, two in zip(first_array.shape, second_array.shape, strict=True):
            match = next((axis for axis, a, b in sizes if (a, b) == (one, two)), None)
            varies = one != two
            shape.append(-1 if varies else one)
            axes.append(match if varies else None)
        datatype = (datatypes or {}).get(output) or _v2_of_numpy(first_array)
        outputs.append(
            TensorSpec(name=output, datatype=datatype, shape=tuple(shape), axes=tuple(axes))
        )
    return tuple(outputs)


def _v2_of_numpy(array: np.ndarray) -> str:
    if array.dtype == object:
        return "BYTES"
    names = {np.dtype(kind): name for name, kind in _NUMPY.items() if name != "BF16"}
    return names.get(array.dtype, array.dtype.name.upper())


def complete(
    name: str,
    config: ModelConfig,
    inputs: Sequence[TensorSpec],
    run: Run,
    datatypes: Datatypes,
) -> ModelConfig:
    """Fill in a configuration's inputs, outputs and whether the model batches at all."""
    inputs = config.inputs or tuple(inputs)
    if not inputs:
        raise RepositoryError(
            f"model '{name}' does not say what it takes: add [[input]] tables to its model.toml"
        )
    inputs = tuple(msgspec.structs.replace(spec, axes=axis_names(spec)) for spec in inputs)
    # The module runs in any case: a model that fails here would fail for every client.
    outputs = infer_outputs(name, inputs, run)
    types = datatypes()
    outputs = tuple(
        msgspec.structs.replace(spec, datatype=types.get(spec.name, spec.datatype))
        for spec in outputs
    )
    if config.outputs:
        known = {spec.name: spec for spec in outputs}
        if missing := [spec.name for spec in config.outputs if spec.name not in known]:
            raise RepositoryError(
                f"model '{name}' has no output {missing}, which its model.toml lists; it gives "
                f"{sorted(known)}"
            )
        outputs = tuple(known[spec.name] for spec in config.outputs)
    batches = all(
        spec.axes and spec.axes[0] == "batch"
        for spec in (*(spec for spec in inputs if not spec.optional), *outputs)
    )
    batching = config.batching
    if not batches and batching.max_batch_size:
        batching = msgspec.structs.replace(batching, max_batch_size=0)
    return msgspec.structs.replace(config, inputs=inputs, outputs=outputs, batching=batching)
