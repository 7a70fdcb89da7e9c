"""What torch does on the fake device: `Backend` on the CPU, whose graphs keep buffers of their own.

A replay calls the model again, over the weights as they are mapped then, which is what a CUDA graph
does with addresses that it holds.  Captures are said on stdout, for tests of the whole server.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from overcommit.runtime.engines.graphs import Call, Tensors


class FakeGraph:
    """A recorded call."""

    def __init__(self, call: Call, inputs: Tensors) -> None:
        self._call = call
        self._buffers = {name: tensor.clone() for name, tensor in inputs.items()}

    def replay(self, inputs: Tensors) -> Tensors:
        for name, buffer in self._buffers.items():
            buffer.copy_(inputs[name])
        return self._call(self._buffers)


class FakeBackend:
    """The device; what it does fails once `is_lost`."""

    def __init__(self, is_lost: Callable[[], bool] = lambda: False) -> None:
        self._is_lost = is_lost

    def entered(self) -> Any:
        return contextlib.nullcontext()

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def settle(self) -> None:
        """Nothing is ever under way."""
        if self._is_lost():
            raise RuntimeError("CUDA error: unspecified launch failure")

    def capture(self, call: Call, inputs: Tensors) -> FakeGraph:
        print("fake backend: captured", flush=True)
        return FakeGraph(call, inputs)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)

    def give_back(self) -> None:
        """It keeps nothing for later."""
