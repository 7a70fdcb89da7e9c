"""Where torch computes in this process, and tensors over weights that lie there.

Invariants
 1. The place is chosen once, before the first program is loaded.
 2. A tensor over weights holds their address range for as long as it lives.

Called by the engines.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from overcommit.runtime.device_bytes import DeviceBytes

if TYPE_CHECKING:
    from overcommit.runtime.engines.device_runner import Backend, DeviceRunner


class _Choice:
    """What was chosen."""

    place = "cpu"
    runner: DeviceRunner | None = None


def choose(place: str, backend: Backend | None = None) -> None:
    """Compute here from now on: "cpu", or what torch calls a GPU, by its backend."""
    from overcommit.runtime.engines.device_runner import DeviceRunner

    _Choice.place = place
    _Choice.runner = None if backend is None else DeviceRunner(backend)


def chosen() -> str:
    """Return where torch computes."""
    return _Choice.place


def runner() -> DeviceRunner | None:
    """Return what runs batches on the GPU; None where the CPU runs them."""
    return _Choice.runner


def tensor_over(memory: DeviceBytes) -> torch.Tensor:
    """Make a tensor of bytes over weights, without a copy; they have to be mapped now."""
    if memory.place == "cpu":
        # A device whose memory the CPU can touch.
        span = (ctypes.c_ubyte * memory.nbytes).from_address(memory.address)
        span.keeper = memory  # type: ignore[attr-defined]
        return torch.frombuffer(memoryview(span).toreadonly(), dtype=torch.uint8)
    return torch.as_tensor(memory, device=memory.place)
