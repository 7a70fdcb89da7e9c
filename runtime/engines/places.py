"""Where torch computes in this process, and tensors over weights that lie there.

Invariants
 1. The place is chosen once, before the first program is loaded.
 2. A tensor over weights holds their address range for as long as it lives.

Called by the engines.
"""

from __future__ import annotations

import ctypes

import torch

from overcommit.runtime.device_bytes import DeviceBytes

_place = ["cpu"]


def choose(place: str) -> None:
    """Compute here from now on: "cpu", or what torch calls a GPU."""
    _place[0] = place
    if place != "cpu":
        torch.cuda.set_device(torch.device(place))


def chosen() -> str:
    """Return where torch computes."""
    return _place[0]


def tensor_over(memory: DeviceBytes) -> torch.Tensor:
    """Make a tensor of bytes over weights, without a copy; they have to be mapped now."""
    if memory.place == "cpu":
        # A device whose memory the CPU can touch.
        span = (ctypes.c_ubyte * memory.nbytes).from_address(memory.address)
        span.keeper = memory  # type: ignore[attr-defined]
        return torch.frombuffer(memoryview(span).toreadonly(), dtype=torch.uint8)
    return torch.as_tensor(memory, device=memory.place)
