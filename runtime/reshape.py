"""Tensors that a client gives otherwise than the model takes them, or gets so (`reshape`, `picture`).

A spec's `shape` is the client's, its `reshape` the model's; with `picture` the client gives pixels and the
model gets normalised planes.  Everybody but the packer and the bound model
knows the client's alone; the packer packs the model as it is, and the worker puts `Reshaped` around it.

Invariants
 1. Of the two shapes the fixed sizes have equal products, and there are as many that vary, in one order.
 2. A model with neither is never wrapped.
 3. Of a model with pictures alone the device may begin batches: it makes the planes itself, the same bits.

Pure.  Called by `model_toml`, the packer and workers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from overcommit.runtime.config import PICTURE_CHANNELS_MAX, ModelConfig, TensorSpec
from overcommit.runtime.errors import ModelError

if TYPE_CHECKING:
    import numpy as np  # the supervisor reads configurations, and has none

    from overcommit.runtime.launch import Starter

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


def picture_problem(spec: TensorSpec) -> str | None:
    """Say why a spec cannot take pictures; None: it can, or there are none."""
    picture = spec.picture
    if picture is None:
        return None
    channels = len(picture.mean)
    is_one = spec.reshape is None and spec.pad is None and spec.datatype == "UINT8"
    is_one = is_one and len(spec.shape) == 4 and spec.shape[3] == channels == len(picture.std)
    if is_one and 1 <= channels <= PICTURE_CHANNELS_MAX and all(picture.std):
        return None
    return (
        f"'{spec.name}' has a picture, so it has to be UINT8 of the shape [rows, height, width, channels] "
        f"without pad and reshape, with a mean and a std that is not 0 for each of 1 to "
        f"{PICTURE_CHANNELS_MAX} channels"
    )


def _is_other(spec: TensorSpec) -> bool:
    return spec.reshape is not None or spec.picture is not None


def _own_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The model's shape of a spec that is other for clients."""
    if spec.picture is None:
        return spec.reshape or ()
    rows, height, width, channels = spec.shape
    return rows, channels, height, width


def has_any(config: ModelConfig) -> bool:
    """Whether anything is other for a model than for its clients."""
    return any(_is_other(spec) for spec in (*config.inputs, *config.outputs))


def model_side(config: ModelConfig) -> ModelConfig:
    """Return what the model itself takes and gives, with no `reshape` and no `picture`."""
    if not has_any(config):
        return config
    inputs, outputs = (
        tuple(
            spec
            if not _is_other(spec)
            else msgspec.structs.replace(
                spec,
                shape=_own_shape(spec),
                datatype=spec.datatype if spec.picture is None else spec.picture.datatype,
                reshape=None,
                picture=None,
                axes=(),
            )
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
    if said is None or not _is_other(said):
        return found
    shape, reshape = said.shape, _own_shape(said)
    if shape[:1] == reshape[:1] == (-1,) and found.shape[:1] != (-1,):
        # It takes one row at a time, as trials have shown.
        shape, reshape = ((found.shape[0], *each[1:]) for each in (shape, reshape))
    is_batch = shape[:1] == (-1,) and found.axes[:1] == ("batch",)
    axes = tuple(
        None if size >= 0 else "batch" if is_batch and axis == 0 else f"{found.name}.{axis}"
        for axis, size in enumerate(shape)
    )
    if said.picture is not None:
        return msgspec.structs.replace(
            found, shape=shape, datatype=said.datatype, picture=said.picture, axes=axes, pad=None
        )
    declared = said.shape if found.declared else ()
    return msgspec.structs.replace(
        found, shape=shape, reshape=reshape, axes=axes, pad=None, declared=declared
    )


class Reshaped:
    """A bound model for clients."""

    def __init__(self, model: Model, config: ModelConfig) -> None:
        self._model = model
        self._pictures = [
            (spec.name, spec.picture) for spec in config.inputs if spec.picture is not None
        ]
        self._inputs = [spec for spec in config.inputs if spec.reshape is not None]
        self._outputs = [spec for spec in config.outputs if spec.reshape is not None]

    @property
    def incarnation(self) -> Hashable:
        """The model's own, if it has one."""
        return getattr(self._model, "incarnation", None)

    @property
    def starter(self) -> Starter | None:
        """What begins a batch on a device, which makes planes of pictures and no other shapes."""
        return None if self._inputs or self._outputs else getattr(self._model, "starter", None)

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch.  Raises ModelError."""
        given = dict(inputs)
        if self._pictures:
            from overcommit.kernels import image  # brings numpy, which workers have

            for name, picture in self._pictures:
                if name in given:
                    given[name] = image.normalise(
                        given[name], picture.mean, picture.std, picture.datatype
                    )
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
