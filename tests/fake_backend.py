"""What torch does on the fake device: `Backend` on the CPU, whose graphs keep buffers of their own.

What a batch leaves in host memory is written when its mark is reached, not before: each seat has a queue, and
a mark is reached the second time that somebody asks, or when somebody waits.

A replay calls the model again, over the weights as they are mapped then, which is what a CUDA graph does
with addresses that it holds.  Captures are said on stdout, for tests of the whole server.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator

import torch
from fake_kernels import FakeKernels

from overcommit.runtime.device_limits import FLIGHTS_MAX
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


class FakeMark:
    """A point of a seat's queue."""

    def __init__(self, backend: FakeBackend, seat: int, until: int) -> None:
        self._backend, self._seat, self._until = backend, seat, until
        self._asked = 0

    def is_reached(self) -> bool:
        self._asked += 1
        if self._backend.is_held or self._asked < 2:
            return False
        self.wait()
        return True

    def wait(self) -> None:
        self._backend.advance(self._seat, self._until)


class FakeBackend:
    """The device; what it does fails once `is_lost`.  `reaches(address, bytes)`: host memory, by kernels."""

    def __init__(
        self,
        is_lost: Callable[[], bool] = lambda: False,
        reaches: Callable[[int, int], bool] = lambda address, nbytes: True,
    ) -> None:
        self._is_lost = is_lost
        self.place = "cpu"
        self.kernels: FakeKernels | None = FakeKernels(self, reaches)
        self.is_held = False  # no mark is reached by asking
        self.seat = 0
        self._queues: list[deque[Callable[[], None]]] = [deque() for _ in range(FLIGHTS_MAX)]
        self._done = [0] * FLIGHTS_MAX

    @contextlib.contextmanager
    def entered(self, seat: int) -> Iterator[None]:
        self.seat = seat
        yield

    def enqueue(self, work: Callable[[], None]) -> None:
        """Put something on the stream that was entered."""
        self._queues[self.seat].append(work)

    def advance(self, seat: int, until: int) -> None:
        """Do what a stream was given, up to there."""
        if self._is_lost():
            raise RuntimeError("CUDA error: unspecified launch failure")
        while self._done[seat] < until:
            self._done[seat] += 1
            self._queues[seat].popleft()()

    def _asked(self, seat: int) -> int:
        return self._done[seat] + len(self._queues[seat])

    def mark(self, seat: int) -> FakeMark:
        return FakeMark(self, seat, self._asked(seat))

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        home, there = torch.full_like(tensor, 77), tensor.clone()

        def arrive() -> None:
            with torch.inference_mode():
                home.copy_(there)

        self.enqueue(arrive)
        return home

    def settle(self, seat: int | None = None) -> None:
        for each in range(FLIGHTS_MAX) if seat is None else (seat,):
            self.advance(each, self._asked(each))

    def capture(self, seat: int, call: Call, inputs: Tensors) -> FakeGraph:
        assert not any(self._queues), "something is under way while a graph is captured"
        print("fake backend: captured", flush=True)
        return FakeGraph(call, inputs)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)

    def give_back(self) -> None:
        """It keeps nothing for later."""
