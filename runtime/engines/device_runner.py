"""Running batches on a device of its own: in and out by its kernels, a graph or a call in between.

    blocks --gather--> device --pad to a bucket, graph or call--> device --scatter--> blocks   [start]
    arrays --pad--> pinned --> device --graph or call--> device --> pinned --> arrays          [run]

`start` begins a batch and returns; `run`, for warm-ups, trials and models with state, waits.  What only a
GPU can do is behind `Backend` (`cuda_backend.py`), and what its kernels do behind `Kernels`: where there
are none, or they cannot reach a batch, `start` makes it and splits it with the CPU.

A backend has FLIGHTS_MAX seats: a seat is a stream and a pool of memory for graphs.  A batch takes the one
with the fewest batches under way, but that of a model with graphs takes theirs: a graph's memory is its
seat's, and nothing else is under way there while it is replayed, as a stream does one thing after the other.

Invariants
 1. When `run` returns or raises, or `start` raises, nothing of that batch is under way on the device; when
    `start` returns, until its work is finished.  The caller gives the lease back then, not before.
 2. Memory that runs out fails this batch: the device comes to rest, every graph is let go of, and the next
    batch runs.
 3. When the device does not come to rest after an error, it is lost for this process: DeviceLost ends
    the worker, and its successor starts afresh.
 4. Rows are added only to batches of models whose rows do not mix, and are cut off again.
 5. No graph is let go of while a batch is under way.

Called by `bound_module`, from the worker's one thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from overcommit.runtime.assembly import gather, split
from overcommit.runtime.config import ModelConfig
from overcommit.runtime.device_limits import FLIGHTS_MAX
from overcommit.runtime.engines import device_batch
from overcommit.runtime.engines.device_kernels import Kernels
from overcommit.runtime.engines.dtypes import host_array, to_array, to_tensor
from overcommit.runtime.engines.graphs import (
    Call,
    Graph,
    GraphBook,
    Tensors,
    bucket_of,
)
from overcommit.runtime.errors import DeviceLost
from overcommit.runtime.launch import Blocks
from overcommit.runtime.signature import NUMPY_TYPES

if TYPE_CHECKING:
    from overcommit.runtime.engines.bound_module import BoundModule

Array = np.ndarray[Any, Any]
Shapes = dict[str, tuple[int, ...]]


class Mark(Protocol):
    """A point of a stream."""

    def is_reached(self) -> bool:
        """Whether all before it is done.  Raises what the device reports."""
        ...

    def wait(self) -> None:
        """Wait until it is.  Raises what the device reports."""


class Backend(Protocol):
    """A device, and the streams that this process runs on: seats 0 to FLIGHTS_MAX - 1."""

    place: str  # what torch calls it
    kernels: Kernels | None

    def entered(self, seat: int) -> Any:
        """Return a context in which torch computes there, on the seat's stream."""
        ...

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor of host memory there; it may be reused at once."""
        ...

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor back; it is there once the stream has come so far."""
        ...

    def mark(self, seat: int) -> Mark:
        """Return the point that a seat's stream has been filled up to."""
        ...

    def settle(self, seat: int | None = None) -> None:
        """Wait until a stream, or all, are at rest.  Raises what the device reports."""

    def capture(self, seat: int, call: Call, inputs: Tensors) -> Graph:
        """Record a call, in memory of the seat.  Raises CannotCapture."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether this says that the device has no memory left."""
        ...

    def give_back(self) -> None:
        """Give the memory that torch keeps for later back to the device."""


class Started:
    """`Work` on the device."""

    __slots__ = ("_blocks", "_homes", "_kept", "_mark", "_model", "_needs", "_runner", "_seat")

    def __init__(
        self, runner: DeviceRunner, model: BoundModule, blocks: Blocks, seat: int, mark: Mark
    ) -> None:
        self._runner, self._model, self._blocks = runner, model, blocks
        self._seat, self._mark = seat, mark
        self._needs: list[int] = []
        self._homes: Mapping[str, Any] | None = None
        self._kept: list[object] = []

    def will_be_there(self, needs: list[int], kept: list[object]) -> None:
        """The device writes the blocks."""
        self._needs, self._kept = needs, kept

    def will_be_split(self, homes: Mapping[str, Any], kept: list[object]) -> None:
        """The outputs come to host memory; the CPU writes the blocks."""
        self._homes, self._kept = homes, kept

    def is_done(self) -> bool:
        """See `Work`."""
        with self._runner.losing():
            return self._mark.is_reached()

    def finish(self) -> list[int]:
        """See `Work`."""
        with self._runner.losing():
            self._mark.wait()
        self._runner.leave(self._seat)
        self._kept.clear()
        if self._homes is None:
            return self._needs
        arrays = {name: host_array(value) for name, value in self._homes.items()}
        return split(self._blocks.signature, arrays, self._blocks.forms, self._blocks.egress)


class DeviceRunner:
    """Runs the bound models of a process on a device."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.book = GraphBook(self._capture)
        self._under_way = [0] * FLIGHTS_MAX  # batches, by seat
        self._entered = 0  # the seat of the batch that is being begun

    # --- a batch that is waited for -------------------------------------------------------------
    def run(self, model: BoundModule, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run one batch.  Raises what the model raises, and DeviceLost."""
        seat = self._entered = self._seat_of(model)
        try:
            with self._backend.entered(seat), torch.inference_mode():
                outputs = self._homes(self._run(model, inputs))
                self._backend.settle(seat)
            return {name: to_array(v) if torch.is_tensor(v) else v for name, v in outputs.items()}
        except BaseException as error:
            self._recover(error)
            raise

    def _run(self, model: BoundModule, inputs: dict[str, Array]) -> dict[str, Any]:
        is_plain = all(array.dtype != object for array in inputs.values())
        shapes = {name: array.shape for name, array in inputs.items()}
        types = {name: array.dtype.str for name, array in inputs.items()}
        rows, padded = _padded(model.config, shapes)
        key = tuple((name, types[name], shape) for name, shape in padded.items())
        if not is_plain or not self.book.is_wanted(model.graphs, key):
            return dict(model.compute(self._moved(model, inputs)))
        return self._called(model, key, self._moved(model, _filled(inputs, padded)), rows)

    # --- a batch that is begun ------------------------------------------------------------------
    def start(self, model: BoundModule, blocks: Blocks) -> Started:
        """Begin one batch.  Raises what the model raises, BadRequest, and DeviceLost."""
        seat = self._entered = self._seat_of(model)
        try:
            with self._backend.entered(seat), torch.inference_mode():
                kernels = self._backend.kernels
                if kernels is not None and device_batch.can_bring(blocks):
                    outputs, kept = self._brought(kernels, model, blocks)
                else:
                    inputs = gather(blocks.signature, blocks.forms, blocks.ingress)
                    outputs, kept = self._run(model, inputs), []
                sent = None if kernels is None else device_batch.send(kernels, blocks, outputs)
                homes = self._homes(outputs) if sent is None else {}
                work = Started(self, model, blocks, seat, self._backend.mark(seat))
        except BaseException as error:
            self._recover(error)
            raise
        if sent is None:
            work.will_be_split(homes, [*kept, outputs])
        else:
            work.will_be_there(sent[0], [*kept, *sent[1]])
        self._under_way[seat] += 1
        return work

    def _brought(
        self, kernels: Kernels, model: BoundModule, blocks: Blocks
    ) -> tuple[dict[str, Any], list[object]]:
        shapes = device_batch.shapes_of(blocks)
        rows, padded = _padded(model.config, shapes)
        types = {spec.name: NUMPY_TYPES[spec.datatype].str for spec in blocks.signature.inputs}
        key = tuple((name, types[name], shape) for name, shape in padded.items())
        is_wanted = self.book.is_wanted(model.graphs, key)
        given, kept = device_batch.bring(
            *(kernels, blocks, padded if is_wanted else shapes, self._backend.place)
        )
        taken: dict[str, Any] = {name: given[name] for name, _ in model.takes if name in given}
        if is_wanted:
            return self._called(model, key, taken, rows), [*kept, given]
        return dict(model.compute(taken)), [*kept, given]

    def leave(self, seat: int) -> None:
        """A batch of this seat is done."""
        self._under_way[seat] -= 1

    @contextlib.contextmanager
    def losing(self) -> Iterator[None]:
        """What the device reports of work that was begun ends the process."""
        try:
            yield
        except Exception as error:
            raise DeviceLost(f"the GPU is lost for this process: {error}") from error

    # --- inside ---------------------------------------------------------------------------------
    def _seat_of(self, model: BoundModule) -> int:
        graphs = model.graphs
        if not graphs.has_any:
            graphs.seat = self._under_way.index(min(self._under_way))
        return graphs.seat

    def _capture(self, call: Call, inputs: Tensors) -> Graph:
        self._backend.settle()
        return self._backend.capture(self._entered, call, inputs)

    def _recover(self, error: BaseException) -> None:
        try:
            self._backend.settle()
        except Exception as lost:
            raise DeviceLost(f"the GPU is lost for this process: {lost}") from error
        if self._backend.is_out_of_memory(error):
            self.book.clear()
            self._backend.give_back()

    def _called(
        self, model: BoundModule, key: Hashable, given: dict[str, Any], rows: int | None
    ) -> dict[str, Any]:
        def call(tensors: Tensors) -> Tensors:
            return dict(model.compute(dict(tensors)))  # type: ignore[arg-type]

        outputs = self.book.run(model.graphs, key, call, given)
        if rows is None:
            return dict(outputs)
        return {name: value[:rows] for name, value in outputs.items()}

    def _moved(self, model: BoundModule, inputs: dict[str, Array]) -> dict[str, Any]:
        moved: dict[str, Any] = {}
        for name, datatype in model.takes:
            array = inputs.get(name)
            if array is None:
                continue
            is_bytes = datatype == "BYTES"
            moved[name] = array if is_bytes else self._backend.to_device(to_tensor(array, datatype))
        return moved

    def _homes(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Begin to copy outputs to host memory."""
        return {
            name: self._backend.to_host(value) if torch.is_tensor(value) else value
            for name, value in outputs.items()
        }


def _padded(config: ModelConfig, shapes: Shapes) -> tuple[int | None, Shapes]:
    """Return the rows that count, None for all, and the shapes with rows up to a bucket."""
    rows_max = config.batching.max_batch_size
    specs = (*config.inputs, *config.outputs)
    if not rows_max or not all(spec.axes and spec.axes[0] == "batch" for spec in specs):
        return None, shapes
    lengths = {shape[0] for shape in shapes.values() if shape}
    if len(lengths) != 1:
        return None, shapes
    (rows,) = lengths
    bucket = bucket_of(rows, rows_max)
    if bucket == rows:
        return None, shapes
    return rows, {name: (bucket, *shape[1:]) for name, shape in shapes.items()}


def _filled(inputs: dict[str, Array], shapes: Shapes) -> dict[str, Array]:
    """Return the inputs with rows of zeros, up to these shapes."""
    filled: dict[str, Array] = {}
    for name, array in inputs.items():
        more = shapes[name][0] - array.shape[0] if array.ndim else 0
        zeros = np.zeros((more, *array.shape[1:]), array.dtype) if more else array
        filled[name] = np.concatenate((array, zeros)) if more else array
    return filled
