"""A GPU, as the probe found it: what the supervisor, which has no CUDA, knows of it."""

from __future__ import annotations

import msgspec


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
