"""Tensors that a client gives in another shape than the model takes them, or gets so (`reshape`).

A spec's `shape` is the client's, its `reshape` the model's.  Everybody but the packer and the bound model
knows the client's alone; the packer packs the model as it is, and the worker puts `Reshaped` around it.

Invariants
 1. Of the two shapes the fixed sizes have equal products, and there are as many that vary, in one order.
 2. A model without a `reshape` is never wrapped.

Pure.  Called by `model_toml`, the packer and workers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from overcommit.runtime.config import ModelConfig, TensorSpec
from overcommit.runtime.errors import ModelError

if TYPE_CHECKING:
    import numpy as np  # the supervisor reads configurations, and has none

    Arrays = dict[str, np.ndarray[Any, Any]]


class Model(Protocol):
    """What a bound model of any engine does."""

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch."""
        ...


def problem_of(spec: TensorSpec) -> str | None:
    """Say why a spec's two shapes do not fit each other; None: they do, or there is one."""
    if spec.reshape is None:
        return None
    varying = [sum(size < 0 for size in shape) for shape in (spec.shape, spec.reshape)]
    products = [math.prod(max(size, 1) for size in s) for s in (spec.shape, spec.reshape)]
    zeros = [0 in shape for shape in (spec.shape, spec.reshape)]
    if varying[0] == varying[1] and products[0] == products[1] and not any(zeros):
        return None
    return (
        f"'{spec.name}' has the shape {list(spec.shape)}, which cannot be reshaped to "
        f"{list(spec.reshape)}: they need as many elements, and as many sizes that vary"
    )


def has_any(config: ModelConfig) -> bool:
    """Whether a model has another shape for anything than its clients."""
    return any(spec.reshape is not None for spec in (*config.inputs, *config.outputs))


def model_side(config: ModelConfig) -> ModelConfig:
    """Return what the model itself takes and gives, with no `reshape`."""
    if not has_any(config):
        return config
    inputs, outputs = (
        tuple(
            spec
            if spec.reshape is None
            else msgspec.structs.replace(spec, shape=spec.reshape, reshape=None, axes=())
            for spec in specs
        )
        for specs in (config.inputs, config.outputs)
    )
    return msgspec.structs.replace(config, inputs=inputs, outputs=outputs)


def client_side(found: ModelConfig, said: ModelConfig) -> ModelConfig:
    """Put the clients' shapes into what packing found out of the model's."""
    if not has_any(said):
        return found
    sides = []
    for specs, given in ((found.inputs, said.inputs), (found.outputs, said.outputs)):
        by_name = {spec.name: spec for spec in given}
        sides.append(tuple(_client(spec, by_name.get(spec.name)) for spec in specs))
    return msgspec.structs.replace(found, inputs=sides[0], outputs=sides[1])


def _client(found: TensorSpec, said: TensorSpec | None) -> TensorSpec:
    if said is None or said.reshape is None:
        return found
    shape, reshape = said.shape, said.reshape
    if shape[:1] == reshape[:1] == (-1,) and found.shape[:1] != (-1,):
        # It takes one row at a time, as trials have shown.
        shape, reshape = ((found.shape[0], *each[1:]) for each in (shape, reshape))
    is_batch = shape[:1] == (-1,) and found.axes[:1] == ("batch",)
    axes = tuple(
        None if size >= 0 else "batch" if is_batch and axis == 0 else f"{found.name}.{axis}"
        for axis, size in enumerate(shape)
    )
    return msgspec.structs.replace(found, shape=shape, reshape=reshape, axes=axes, pad=None)


class Reshaped:
    """A bound model for clients."""

    def __init__(self, model: Model, config: ModelConfig) -> None:
        self._model = model
        self._inputs = [spec for spec in config.inputs if spec.reshape is not None]
        self._outputs = [spec for spec in config.outputs if spec.reshape is not None]

    @property
    def incarnation(self) -> Hashable:
        """The model's own, if it has one."""
        return getattr(self._model, "incarnation", None)

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch.  Raises ModelError."""
        given = dict(inputs)
        for spec in self._inputs:
            if spec.name in given:
                given[spec.name] = _turned(given[spec.name], spec.shape, spec.reshape or (), spec)
        result = dict(self._model.run(given))
        for spec in self._outputs:
            if spec.name in result:
                result[spec.name] = _turned(result[spec.name], spec.reshape or (), spec.shape, spec)
        return result


def _turned(
    array: np.ndarray[Any, Any], before: Sequence[int], after: Sequence[int], spec: TensorSpec
) -> np.ndarray[Any, Any]:
    sizes = iter([size for size, each in zip(array.shape, before, strict=False) if each < 0])
    try:
        if array.ndim != len(before):
            raise ValueError
        return array.reshape([each if each >= 0 else next(sizes) for each in after])
    except (ValueError, StopIteration) as error:
        raise ModelError(
            f"'{spec.name}' has the shape {list(array.shape)}, which is not {list(before)}"
        ) from error
