"""Copies to the GPU: asynchronous, on one urgent stream, a few in flight, an event for each.

A caller's spans are cut into pieces that are adjacent on both sides, not longer than COPY_BYTES_MAX,
and inside one registration of host memory.  It keeps as many of them in flight as it gets places
for, and returns when all of its own are done; so a piece's copy overlaps the next one's call, and the
callers' copies each other's.  One direction of PCIe needs no second stream.

A place (one event each):

    FREE --[a caller begins a piece]--> IN FLIGHT --[its event has fired]--> FREE

Invariants
 1. COPIES_IN_FLIGHT pieces are in flight at most, of prefetches PREFETCH_COPIES_IN_FLIGHT, and no
    prefetch begins one while a foreground copy waits for a place.
 2. `copy` returns, or raises, only when none of its pieces is in flight.
 3. Each piece of host memory is registered once, after its pages are there, PIN_BYTES at most a
    call; a copy reaches over no border between two registrations.

The driver's errors are not caught: most of them stick, the mover ends, and its successor repeats the
loads.  Only host memory that cannot be registered is slower and no more.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator

from overcommit.runtime import _shm
from overcommit.runtime.config import (
    COPIES_IN_FLIGHT,
    COPY_BYTES_MAX,
    PIN_BYTES,
    PREFETCH_COPIES_IN_FLIGHT,
    READ_BYTES,
    READ_THREADS,
)
from overcommit.runtime.copier import pairs
from overcommit.runtime.driver import Driver, DriverError, Event
from overcommit.runtime.image_file import Span
from overcommit.runtime.memory import create_memfd
from overcommit.runtime.mover_messages import Urgency

log = logging.getLogger("overcommit.mover")


class CudaCopier:
    """`Copier` to one GPU.  `host_address` is where the HOST arena begins."""

    is_remote: bool = True

    def __init__(self, driver: Driver, device: int, host_address: int) -> None:
        self._driver = driver
        self._context = driver.primary_context_retain(device)
        self._entered = threading.local()
        self._host_address = host_address
        self._is_pinning = True
        self._enter()
        self._stream = driver.stream_create(is_urgent=True)
        self._places = threading.Condition()
        self._free = [driver.event_create() for _ in range(COPIES_IN_FLIGHT)]
        self._prefetching = 0  # places that prefetches have
        self._waiting = 0  # foreground copies that wait for a place
        self._stages = _Stages(READ_THREADS)
        self.pin(self._stages.address, self._stages.nbytes)

    def _enter(self) -> None:
        """See to it that this thread has the context."""
        if not hasattr(self._entered, "context"):
            self._driver.context_set_current(self._context)
            self._entered.context = self._context

    # --- copies ---------------------------------------------------------------------------------
    def copy(self, sources: list[Span], targets: list[Span], urgency: Urgency) -> None:
        """Copy; see `Copier`."""
        self._enter()
        own: deque[Event] = deque()
        try:
            for target, source, nbytes in self._pieces(pairs(sources, targets)):
                while (event := self._take(urgency, may_wait=not own)) is None:
                    self._finish(own, urgency)
                own.append(event)
                self._driver.memcpy_htod_async(target, source, nbytes, self._stream)
                self._driver.event_record(event, self._stream)
        finally:
            with contextlib.ExitStack() as ends:  # each of them, though one fails
                for _ in own:
                    ends.callback(self._finish, own, urgency)

    def _pieces(self, found: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
        for target, source, nbytes in found:
            while nbytes:
                part = min(nbytes, COPY_BYTES_MAX, self._to_border(source))
                yield target, source, part
                target, source, nbytes = target + part, source + part, nbytes - part

    def _to_border(self, source: int) -> int:
        """Bytes from here to the end of the registration that this lies in, or would."""
        if 0 <= (inside := source - self._stages.address) < self._stages.nbytes:
            return self._stages.nbytes - inside
        return PIN_BYTES - (source - self._host_address) % PIN_BYTES

    def _take(self, urgency: Urgency, may_wait: bool) -> Event | None:
        """Take a place; None: there is none now, and the caller has some that will be free."""
        with self._places:
            while not self._is_free(urgency):
                if not may_wait:
                    return None
                is_foreground = urgency == "foreground"
                self._waiting += is_foreground
                self._places.wait()
                self._waiting -= is_foreground
            self._prefetching += urgency == "prefetch"
            return self._free.pop()

    def _is_free(self, urgency: Urgency) -> bool:
        if urgency == "foreground":
            return bool(self._free)
        is_under = self._prefetching < PREFETCH_COPIES_IN_FLIGHT
        return bool(self._free) and is_under and not self._waiting

    def _finish(self, own: deque[Event], urgency: Urgency) -> None:
        """Wait for the oldest piece of one's own; its place is free then, whatever happened."""
        event = own.popleft()
        try:
            self._driver.event_synchronize(event)
        finally:
            with self._places:
                self._free.append(event)
                self._prefetching -= urgency == "prefetch"
                self._places.notify_all()

    # --- host memory ----------------------------------------------------------------------------
    @contextlib.contextmanager
    def stage(self) -> Iterator[int]:
        """Lend host memory; see `Copier`."""
        address = self._stages.take()
        try:
            yield address
        finally:
            self._stages.give(address)

    def pin(self, address: int, nbytes: int) -> None:
        """Register a piece; what cannot be registered is copied through the driver's own buffers."""
        assert nbytes <= PIN_BYTES, "the kernel's lock would be held for long"
        if not self._is_pinning:
            return
        self._enter()
        try:
            self._driver.host_register(address, nbytes)
        except DriverError as error:
            self._is_pinning = False
            log.warning(
                "%s: copies from host memory that is not registered are slower; raise the limit "
                "of locked memory (ulimit -l), or lower --host-memory",
                error,
            )


class _Stages:
    """Pieces of READ_BYTES of host memory."""

    def __init__(self, count: int) -> None:
        self.nbytes = count * READ_BYTES
        self._fd = create_memfd("stages", self.nbytes)
        self.address = _shm.reserve(self.nbytes)
        _shm.map_fixed(self.address, self._fd, 0, self.nbytes, True, True)
        self._free = [self.address + number * READ_BYTES for number in range(count)]
        self._are_free = threading.Condition()

    def take(self) -> int:
        with self._are_free:
            while not self._free:
                self._are_free.wait()
            return self._free.pop()

    def give(self, address: int) -> None:
        with self._are_free:
            self._free.append(address)
            self._are_free.notify()
