"""Payload memory that a worker's GPU reads and writes by itself: registered with CUDA, link by link.

    link up --[thread: a piece after the other]--> pinned --[link down]--> gone
                        \\--[a piece is refused]--> plain, for good

Once for each link and worker, in pieces of PAYLOAD_PIN_BYTES, by a thread of the link's, because lanes would
wait for a tenth of a second and more; until all of a link is done its batches are made by the CPU.  A worker
may not write ingress memory, and CUDA registers such memory only where the device can: where it cannot, the
worker's own mapping of it is writable, and nothing else changes.

Invariants
 1. Memory is unmapped only after every piece of it that was registered is not any more.
 2. `is_pinned` says so only when all of a link is, ingress and egress.
 3. No piece reaches over a border of BLOCK_BYTES_MAX: a block lies inside one registration.

What is registered stays in memory: with one front end up to twice `payload_bytes`, once for all workers.

Called by a worker's links.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Iterator

from overcommit.kernels.cuda import address_of
from overcommit.runtime.config import BLOCK_BYTES_MAX, PIN_BYTES
from overcommit.runtime.device_limits import PAYLOAD_PIN_BYTES
from overcommit.runtime.driver import Attribute, Driver, DriverError

log = logging.getLogger("overcommit.worker")

assert PAYLOAD_PIN_BYTES <= PIN_BYTES
assert PAYLOAD_PIN_BYTES % BLOCK_BYTES_MAX == 0


class LinkPin:
    """The payload memory of one link; `ingress` and `egress` are its mappings."""

    def __init__(
        self, driver: Driver, device: int, ingress: memoryview, egress: memoryview
    ) -> None:
        self.ingress_at = address_of(ingress)
        self.egress_at = address_of(egress)
        self.is_pinned = False
        self._driver = driver
        self._device = device
        self._lengths = (
            (self.ingress_at, len(ingress), ingress.readonly),
            (self.egress_at, len(egress), False),
        )
        self._lock = threading.Lock()  # held while a piece is registered
        self._is_closed = False
        self._registered: list[int] = []
        self._thread = threading.Thread(target=self._run, name="pin", daemon=True)

    def begin(self) -> None:
        """Register all of it, in the thread."""
        self._thread.start()

    def wait(self) -> None:
        """Wait for the thread."""
        self._thread.join()

    def _enter(self) -> None:
        self._driver.context_set_current(self._driver.primary_context_retain(self._device))

    def _run(self) -> None:
        try:
            self._enter()
            for address, nbytes, is_read_only in self._pieces():
                with self._lock:
                    if self._is_closed:
                        return
                    self._driver.host_register(
                        address, nbytes, is_mapped=True, is_read_only=is_read_only
                    )
                    self._registered.append(address)
            self.is_pinned = True
        except DriverError as error:
            log.warning(
                "%s: batches of this link are made by the CPU and copied; raise the limit of locked "
                "memory (ulimit -l), or lower the payload memory",
                error,
            )

    def _pieces(self) -> Iterator[tuple[int, int, bool]]:
        for begin, length, is_read_only in self._lengths:
            for at in range(0, length, PAYLOAD_PIN_BYTES):
                yield begin + at, min(PAYLOAD_PIN_BYTES, length - at), is_read_only

    def close(self) -> None:
        """Let go of it; the memory may be unmapped then.  Nothing of it is under way."""
        with self._lock:
            self._is_closed = True
            self.is_pinned = False
        for address in self._registered:
            try:
                self._driver.host_unregister(address)
            except DriverError as error:
                log.warning("%s", error)
        self._registered.clear()


class PayloadPins:
    """What registers payload memory in one worker.  Raises DriverError."""

    def __init__(self, driver: Driver, device: int) -> None:
        self._driver = driver
        self._device = device
        self.can_pin = bool(
            driver.device_attribute(Attribute.CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, device)
        )
        takes_read_only = driver.device_attribute(
            Attribute.READ_ONLY_HOST_REGISTER_SUPPORTED, device
        )
        # How a worker maps ingress memory.
        self.protection = mmap.PROT_READ
        if self.can_pin and not takes_read_only:
            self.protection |= mmap.PROT_WRITE

    def pin(self, ingress: memoryview, egress: memoryview) -> LinkPin | None:
        """Begin to register a link's memory; None where the device could not address it."""
        if not self.can_pin:
            return None
        pin = LinkPin(self._driver, self._device, ingress, egress)
        pin.begin()
        return pin
