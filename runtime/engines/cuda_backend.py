"""`Backend` on an NVIDIA GPU, by torch; thin, because nothing of it runs in a test without one.

Invariants
 1. Everything of a batch goes over its seat's stream, captures included: so the graphs of a seat share
    one pool of memory, since no two of them are ever under way together.
 2. A graph's inputs are buffers of its own; they and what the graph returns are reused by the next
    replay.

Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from overcommit.runtime.device_limits import FLIGHTS_MAX
from overcommit.runtime.engines import cuda_kernels
from overcommit.runtime.engines.device_kernels import Kernels
from overcommit.runtime.engines.graphs import Call, CannotCapture, Tensors


class CudaGraph:
    """A captured call, its inputs and its outputs."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: Tensors, outputs: Tensors) -> None:
        self._graph = graph
        self._inputs = inputs
        self._outputs = outputs

    def replay(self, inputs: Tensors) -> Tensors:
        """Run it over these."""
        for name, buffer in self._inputs.items():
            buffer.copy_(inputs[name], non_blocking=True)
        self._graph.replay()
        return self._outputs


class CudaMark:
    """`Mark` by an event."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def is_reached(self) -> bool:
        """Ask."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Wait."""
        self._event.synchronize()


class CudaBackend:
    """One GPU."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._device = torch.device(place)
        torch.cuda.set_device(self._device)
        self._streams = [
            torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            for _ in range(FLIGHTS_MAX)
        ]
        self._pools = [torch.cuda.graph_pool_handle() for _ in range(FLIGHTS_MAX)]
        self.kernels: Kernels | None = cuda_kernels.try_open(place)

    @contextlib.contextmanager
    def entered(self, seat: int) -> Iterator[None]:
        """Compute on the seat's stream."""
        with torch.cuda.stream(self._streams[seat]):
            yield

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy by pinned memory, which torch keeps until the copy is done."""
        if not tensor.numel():
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy into pinned memory."""
        if tensor.is_cpu:
            return tensor
        there = tensor.detach().resolve_conj().resolve_neg().contiguous()
        home = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
        return home.copy_(there, non_blocking=True)

    def mark(self, seat: int) -> CudaMark:
        """Record an event."""
        return CudaMark(self._streams[seat])

    def settle(self, seat: int | None = None) -> None:
        """Wait for a stream, or all of them."""
        for stream in self._streams if seat is None else (self._streams[seat],):
            stream.synchronize()

    def capture(self, seat: int, call: Call, inputs: Tensors) -> CudaGraph:
        """Record a call that has run before, so that libraries are loaded and workspaces made."""
        stream = self._streams[seat]
        buffers = {name: tensor.clone() for name, tensor in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        stream.synchronize()
        try:
            with torch.cuda.graph(
                graph, pool=self._pools[seat], stream=stream, capture_error_mode="thread_local"
            ):
                outputs = call(buffers)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's own code: it waits for the GPU, looks at values ...
            # Where the device did not survive that, the next `settle` says so.
            stream.synchronize()
            raise CannotCapture(str(error)) from error
        if not all(isinstance(value, torch.Tensor) and value.is_cuda for value in outputs.values()):
            raise CannotCapture("an output is not a tensor of the GPU")
        return CudaGraph(graph, buffers, outputs)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether torch found no memory."""
        while error is not None:
            if isinstance(error, torch.OutOfMemoryError):
                return True
            if error.__cause__ is None:
                return False
            error = error.__cause__
        return False

    def give_back(self) -> None:
        """Empty torch's cache."""
        torch.cuda.empty_cache()
