"""A worker's way to DEVICE: ranges over a memfd, or over the chunks of a GPU.

Called by a worker before it is ready.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from overcommit.runtime.arena import MemfdRanges, Ranges
from overcommit.runtime.control import ControlSocket, Received
from overcommit.runtime.cuda_tier import open_for_worker, open_ipc_for_worker
from overcommit.runtime.drivers import open_driver
from overcommit.runtime.messages import Start
from overcommit.runtime.payload_pins import PayloadPins

if TYPE_CHECKING:
    from overcommit.runtime.engines.device_runner import Backend


class WorkerMemory(NamedTuple):
    """What opens mappings, torch's name of their place, and what runs torch and registers payloads there."""

    ranges: Ranges
    place: str
    backend: Backend | None = None
    pins: PayloadPins | None = None

    @property
    def digest_of(self) -> Callable[[int, int], int] | None:
        """What digests weights there; None: the CPU's are checked by the mover, or nothing can."""
        kernels = None if self.backend is None else self.backend.kernels
        return None if kernels is None else kernels.digest


def open_memory(control: ControlSocket, start: Start, fds: dict[str, int]) -> WorkerMemory | None:
    """Take over DEVICE; None: told to stop instead.  Raises DriverError."""
    if start.cuda_device is None:
        return WorkerMemory(MemfdRanges(fds["device"]), "cpu")
    driver, device = open_driver(start.settings), start.cuda_device

    def receive() -> Received:
        received = control.receive()
        assert received is not None, "waited without a limit"
        return received

    ranges: Ranges | None
    if start.shares == "ipc":
        ranges = open_ipc_for_worker(driver, device, start.device_bytes, receive)
    else:
        ranges = open_for_worker(
            driver, device, start.device_bytes, start.chunks_count, receive, control.send
        )
    if ranges is None:
        return None
    return WorkerMemory(
        *(ranges, driver.torch_device(device), driver.torch_backend(device)),
        PayloadPins(driver, device),
    )
