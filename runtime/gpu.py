"""A GPU, as the probe found it: what the supervisor, which has no CUDA, knows of it."""

from __future__ import annotations

from typing import Literal

import msgspec

# Chunks as descriptors, or one allocation by CUDA IPC where these cannot be had.
Shares = Literal["vmm", "ipc"]


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU, by the driver's number; `why` says what is in the way of using it, "": nothing.

    `free_bytes` are those beside the probe's own context.
    """

    device: int
    why: str = ""
    uuid: str = ""
    bus_id: str = ""
    total_bytes: int = 0
    free_bytes: int = 0
    shares: Shares = "vmm"
    note: str = ""  # why it is not "vmm"
    unpack_gain: float = 0.0  # how many times as fast packed weights come as raw ones; 0: not asked
