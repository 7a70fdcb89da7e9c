"""One version, ready to run: named arrays in, named arrays out, around any torch callable.

Invariants
 1. What a model raises leaves as ModelError, with its type and text, also where it means to end the process.
 2. An array that `run_typed` returns shares no memory with an input.  What `run` returns may: its
    caller owns the inputs, and reads the outputs before it lets go of them.
 3. Outputs have exactly the names that the signature lists, in its order, once it lists any.

Called by the engines; the packer uses `call` to find out what a model gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from overcommit.runtime.config import ModelConfig
from overcommit.runtime.engines import places
from overcommit.runtime.engines.dtypes import (
    host_array,
    to_array,
    to_tensor,
    v2_of_numpy,
    v2_of_torch,
)
from overcommit.runtime.engines.graphs import ModelGraphs
from overcommit.runtime.errors import DeviceLost, ModelError, OvercommitError
from overcommit.runtime.launch import Blocks, Starter, Work

Array = np.ndarray[Any, Any]
Value = torch.Tensor | Array
Arguments = dict[str, Value]


class BoundModule:
    """A callable over bound tensors, and the names of what it takes and gives."""

    def __init__(self, call: Callable[[Arguments], object], config: ModelConfig) -> None:
        self._call = call
        self.config = config
        self.graphs = ModelGraphs()
        self._runner = places.runner()
        self.takes = [(spec.name, spec.datatype) for spec in config.inputs]
        self._names = [spec.name for spec in config.outputs]

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run one batch.  Raises ModelError with what the model raised."""
        try:
            if self._runner is not None:
                arrays = self._runner.run(self, inputs)
                return {name: host_array(value) for name, value in arrays.items()}
            with torch.inference_mode():
                outputs = self.compute(self._arguments(inputs))
                return {name: host_array(value) for name, value in outputs.items()}
        except ModelError:
            raise
        except Exception as error:  # the batch boundary: whatever the model's code raises
            raise ModelError.of(error) from error

    @property
    def starter(self) -> Starter | None:
        """What begins a batch on the device; None where the CPU runs them."""
        return None if self._runner is None else self._start

    def _start(self, blocks: Blocks) -> Work:
        assert self._runner is not None, "asked by its `starter`"
        try:
            return self._runner.start(self, blocks)
        except OvercommitError:  # ModelError, and BadRequest of its texts
            raise
        except Exception as error:  # as in `run`
            raise ModelError.of(error) from error

    def compute(self, arguments: Arguments) -> dict[str, Value]:
        """Call it; return the outputs that the signature lists.  Raises what the model raises."""
        names = self._names
        try:
            result = self._call(arguments)
        except (Exception, DeviceLost):
            raise
        except BaseException as error:  # it may end its batch, not the process
            raise ModelError.of(error) from error
        if len(names) == 1:  # most models; the general way takes 2 us
            value = result.get(names[0]) if type(result) is dict else result
            if type(value) is torch.Tensor:
                return {names[0]: value}
        outputs = flatten_outputs(result, names)
        if missing := [name for name in names if name not in outputs]:
            raise ModelError(f"the model gave no output {missing}")
        return {name: outputs[name] for name in names} if names else outputs

    def run_typed(self, inputs: dict[str, Array]) -> tuple[dict[str, Array], dict[str, str]]:
        """Run one batch; also return the V2 datatype of every output."""
        arguments = self._arguments(inputs)
        try:
            with torch.inference_mode():
                outputs = flatten_outputs(self._call(arguments), self._names)
                types = {name: _datatype(value) for name, value in outputs.items()}
                return _to_host(outputs, arguments), types
        except (ModelError, DeviceLost):
            raise
        except BaseException as error:  # as in `compute`
            raise ModelError.of(error) from error

    def _arguments(self, inputs: dict[str, Array]) -> Arguments:
        arguments: Arguments = {}
        for name, datatype in self.takes:
            array = inputs.get(name)
            if array is not None:
                arguments[name] = array if datatype == "BYTES" else to_tensor(array, datatype)
        return arguments


def flatten_outputs(result: object, names: Sequence[str]) -> dict[str, Value]:
    """Give every output a name.

    Names come from a mapping, a ModelOutput, a dataclass or a named tuple; else from `names`; else
    they are "output", or "output0", "output1" ... for a sequence.  What is no tensor, array, text
    or list of texts (None, caches) is left out.
    """
    items: list[tuple[str, object]]
    if isinstance(result, Mapping):
        items = [(str(name), value) for name, value in result.items()]
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        items = [(field.name, getattr(result, field.name)) for field in dataclasses.fields(result)]
    elif isinstance(result, (tuple, list)) and not _is_texts(result):
        fields = getattr(result, "_fields", names)
        items = [
            (fields[i] if i < len(fields) else f"output{i}", value)
            for i, value in enumerate(result)
        ]
    else:
        items = [(names[0] if names else "output", result)]
    values = ((name, _value(item)) for name, item in items)
    return {name: value for name, value in values if value is not None}


def _is_texts(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(item, (str, bytes)) for item in value)
    )


def _value(item: object) -> Value | None:
    if isinstance(item, (torch.Tensor, np.ndarray)):
        return item
    if isinstance(item, np.generic):
        return np.asarray(item)
    if isinstance(item, (str, bytes)):
        return np.array(item, dtype=object)
    if _is_texts(item):
        texts: Any = item
        array = np.empty(len(texts), dtype=object)
        array[:] = texts
        return array
    return None


def _datatype(value: Value) -> str:
    return v2_of_torch(value.dtype) if isinstance(value, torch.Tensor) else v2_of_numpy(value)


def _to_host(outputs: Mapping[str, Value], arguments: Arguments) -> dict[str, Array]:
    """Make host arrays that share nothing with the arguments."""
    given = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    storages = {value.untyped_storage().data_ptr() for value in given}
    arrays: dict[str, Array] = {}
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor):
            array = to_array(value)
            shares = value.untyped_storage().data_ptr() in storages
        else:
            array = host_array(value)
            shares = any(
                np.may_share_memory(array, to_array(other) if torch.is_tensor(other) else other)
                for other in arguments.values()
            )
        arrays[name] = array.copy() if shares else array
    return arrays
