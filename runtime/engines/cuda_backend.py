"""`Backend` on an NVIDIA GPU, by torch; thin, because nothing of it runs in a test without one.

Invariants
 1. Everything of a process goes over one stream, captures included: so graphs share one pool of
    memory, since no two of them are ever under way together.
 2. A graph's inputs are buffers of its own; they and what the graph returns are reused by the next
    replay.

Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

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


class CudaBackend:
    """One GPU."""

    def __init__(self, place: str) -> None:
        self._device = torch.device(place)
        torch.cuda.set_device(self._device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Compute on the stream."""
        with torch.cuda.stream(self._stream):
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

    def settle(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def capture(self, call: Call, inputs: Tensors) -> CudaGraph:
        """Record a call that has run before, so that libraries are loaded and workspaces made."""
        buffers = {name: tensor.clone() for name, tensor in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        self._stream.synchronize()
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = call(buffers)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's own code: it waits for the GPU, looks at values ...
            # Where the device did not survive that, the next `settle` says so.
            self._stream.synchronize()
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
