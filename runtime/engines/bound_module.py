"""One version, ready to run: named arrays in, named arrays out, around any torch callable.

Invariants
 1. What a model raises leaves as ModelError, with its type and text.
 2. An array that is returned shares no memory with an input: the caller may reuse those at once.
 3. Outputs have exactly the names that the signature lists, in its order, once it lists any.

Called by the engines; the packer uses `call` to find out what a model gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from overcommit.runtime.config import ModelConfig
from overcommit.runtime.engines.dtypes import to_array, to_tensor, v2_of_numpy, v2_of_torch
from overcommit.runtime.errors import ModelError

Array = np.ndarray[Any, Any]
Value = torch.Tensor | Array
Arguments = dict[str, Value]
ERROR_CHARS_MAX: Final = 2000  # a shape mismatch deep inside a model can list megabytes


class BoundModule:
    """A callable over bound tensors, and the names of what it takes and gives."""

    def __init__(self, call: Callable[[Arguments], object], config: ModelConfig) -> None:
        self._call = call
        self._inputs = config.inputs
        self._names = [spec.name for spec in config.outputs]

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run one batch.  Raises ModelError with what the model raised."""
        arrays, _ = self.run_typed(inputs)
        if not self._names:
            return arrays
        if missing := [name for name in self._names if name not in arrays]:
            raise ModelError(f"the model gave no output {missing}")
        return {name: arrays[name] for name in self._names}

    def run_typed(self, inputs: dict[str, Array]) -> tuple[dict[str, Array], dict[str, str]]:
        """Run one batch; also return the V2 datatype of every output."""
        arguments: Arguments = {
            spec.name: inputs[spec.name]
            if spec.datatype == "BYTES"
            else to_tensor(inputs[spec.name], spec.datatype)
            for spec in self._inputs
            if spec.name in inputs
        }
        try:
            with torch.inference_mode():
                outputs = flatten_outputs(self._call(arguments), self._names)
                types = {name: _datatype(value) for name, value in outputs.items()}
                return _to_host(outputs, arguments), types
        except ModelError:
            raise
        except Exception as error:  # the batch boundary: whatever the model's code raises
            text = f"{type(error).__name__}: {error}"
            raise ModelError(text[:ERROR_CHARS_MAX]) from error


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
            array = value.astype(object) if value.dtype.kind in "SU" else value
            array = np.ascontiguousarray(array) if array.ndim else array
            shares = any(
                np.may_share_memory(array, to_array(other) if torch.is_tensor(other) else other)
                for other in arguments.values()
            )
        arrays[name] = array.copy() if shares else array
    return arrays
