"""Running a batch on a device of its own: in by pinned memory, a graph or a call, and out again.

    arrays --pad to a bucket--> pinned --> device --> graph or call --> device --> pinned --> arrays

What only a GPU can do is behind `Backend` (`cuda_backend.py`).

Invariants
 1. When `run` returns or raises, nothing of it is under way on the device: the caller gives the lease
    back, and then the weights may go.
 2. Memory that runs out fails this batch: every graph is let go of, and the next batch runs.
 3. When the device does not come to rest after an error, it is lost for this process: DeviceLost ends
    the worker, and its successor starts afresh.
 4. Rows are added only to batches of models whose rows do not mix, and are cut off again.

Called by `bound_module`, from the worker's one thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from overcommit.runtime.config import ModelConfig
from overcommit.runtime.engines.dtypes import to_array, to_tensor
from overcommit.runtime.engines.graphs import (
    Call,
    Graph,
    GraphBook,
    Tensors,
    bucket_of,
)
from overcommit.runtime.errors import DeviceLost

if TYPE_CHECKING:
    from overcommit.runtime.engines.bound_module import BoundModule

Array = np.ndarray[Any, Any]


class Backend(Protocol):
    """A device, and the one stream that this process runs on."""

    def entered(self) -> Any:
        """Return a context in which torch computes there, on the stream."""
        ...

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor of host memory there; it may be reused at once."""
        ...

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor back; it is there after `settle`."""
        ...

    def settle(self) -> None:
        """Wait until the stream is at rest.  Raises what the device reports."""

    def capture(self, call: Call, inputs: Tensors) -> Graph:
        """Record a call.  Raises CannotCapture."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether this says that the device has no memory left."""
        ...

    def give_back(self) -> None:
        """Give the memory that torch keeps for later back to the device."""


class DeviceRunner:
    """Runs the bound models of a process on a device."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.book = GraphBook(backend.capture)

    def run(self, model: BoundModule, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run one batch.  Raises what the model raises, and DeviceLost."""
        try:
            with self._backend.entered(), torch.inference_mode():
                outputs = self._run(model, inputs)
                self._backend.settle()
            return {name: to_array(v) if torch.is_tensor(v) else v for name, v in outputs.items()}
        except BaseException as error:
            self._recover(error)
            raise

    def _recover(self, error: BaseException) -> None:
        try:
            self._backend.settle()
        except Exception as lost:
            raise DeviceLost(f"the GPU is lost for this process: {lost}") from error
        if self._backend.is_out_of_memory(error):
            self.book.clear()
            self._backend.give_back()

    def _run(self, model: BoundModule, inputs: dict[str, Array]) -> dict[str, Any]:
        rows, padded = _pad(model.config, inputs)
        key = tuple((name, array.dtype.str, array.shape) for name, array in padded.items())
        is_plain = all(array.dtype != object for array in padded.values())
        if not is_plain or not self.book.is_wanted(model.graphs, key):
            outputs: Mapping[str, Any] = model.compute(self._moved(model, inputs))
            return {name: self._home(value) for name, value in outputs.items()}

        def call(tensors: Tensors) -> Tensors:
            return dict(model.compute(dict(tensors)))  # type: ignore[arg-type]

        given = self._moved(model, padded)
        outputs = self.book.run(model.graphs, key, call, given)
        if rows is not None:
            outputs = {name: value[:rows] for name, value in outputs.items()}
        return {name: self._home(value) for name, value in outputs.items()}

    def _moved(self, model: BoundModule, inputs: dict[str, Array]) -> dict[str, Any]:
        moved: dict[str, Any] = {}
        for name, datatype in model.takes:
            array = inputs.get(name)
            if array is None:
                continue
            is_bytes = datatype == "BYTES"
            moved[name] = array if is_bytes else self._backend.to_device(to_tensor(array, datatype))
        return moved

    def _home(self, value: Any) -> Any:
        return self._backend.to_host(value) if torch.is_tensor(value) else value


def _pad(config: ModelConfig, inputs: dict[str, Array]) -> tuple[int | None, dict[str, Array]]:
    """Return the rows that count, None for all, and the inputs with zeros up to a bucket."""
    rows_max = config.batching.max_batch_size
    specs = (*config.inputs, *config.outputs)
    if not rows_max or not all(spec.axes and spec.axes[0] == "batch" for spec in specs):
        return None, inputs
    lengths = {array.shape[0] for array in inputs.values() if array.ndim}
    if len(lengths) != 1:
        return None, inputs
    (rows,) = lengths
    bucket = bucket_of(rows, rows_max)
    if bucket == rows:
        return None, inputs
    more = bucket - rows
    return rows, {
        name: np.concatenate((array, np.zeros((more, *array.shape[1:]), array.dtype)))
        for name, array in inputs.items()
    }
