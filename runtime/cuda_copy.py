"""Copies to the GPU: asynchronous, on one urgent stream, a few in flight, an event for each.

A caller's spans are cut into pieces that are adjacent on both sides, not longer than COPY_BYTES_MAX,
and inside one registration of host memory.  It keeps as many of them in flight as it gets places
for, and returns when all of its own are done; so a piece's copy overlaps the next one's call, and the
callers' copies each other's.  One direction of PCIe needs no second stream.

A place (one event each):

    FREE --[a caller begins a piece]--> IN FLIGHT --[its event has fired]--> FREE

Invariants
 1. COPIES_IN_FLIGHT pieces are in flight at most, by the rules of `copy_places`.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

from overcommit.runtime.config import (
    COPIES_IN_FLIGHT,
    COPY_BYTES_MAX,
    PIECE_BYTES_MAX,
    PIN_BYTES,
    READ_THREADS,
)
from overcommit.runtime.copier import joined, pairs
from overcommit.runtime.copy_places import CopyPlaces
from overcommit.runtime.cuda_unpack import CudaUnpacking
from overcommit.runtime.driver import Driver, DriverError, Event, Stream
from overcommit.runtime.image_file import Span
from overcommit.runtime.mover_messages import Urgency
from overcommit.runtime.packed import decode
from overcommit.runtime.staging import Stages

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
        self._back = driver.stream_create(is_urgent=False)  # the other direction of PCIe
        self._places = CopyPlaces([driver.event_create() for _ in range(COPIES_IN_FLIGHT)])
        self._stages = Stages(READ_THREADS)
        self.pin(self._stages.address, self._stages.nbytes)
        self._device = device
        self._unpacking: CudaUnpacking | None = None
        self._spare: Stages | None = None
        self._is_opening = threading.Lock()

    def _enter(self) -> None:
        """See to it that this thread has the context."""
        if not hasattr(self._entered, "context"):
            self._driver.context_set_current(self._context)
            self._entered.context = self._context

    # --- copies ---------------------------------------------------------------------------------
    def copy(self, sources: list[Span], targets: list[Span], urgency: Urgency) -> None:
        """Copy; see `Copier`."""
        pieces = self._pieces(pairs(sources, targets))
        self._move(pieces, self._driver.memcpy_htod_async, self._stream, urgency)

    def fetch(self, sources: list[Span], targets: list[Span], urgency: Urgency) -> None:
        """Copy the other way, on a stream of its own; see `Copier`."""
        # Cut by what lies on HOST, as ever.
        pieces = self._pieces((source, target, n) for target, source, n in pairs(sources, targets))
        back = ((target, source, nbytes) for source, target, nbytes in pieces)
        self._move(back, self._driver.memcpy_dtoh_async, self._back, urgency)

    def _move(
        self,
        pieces: Iterable[tuple[int, int, int]],
        begin: Callable[[int, int, int, Stream], None],
        stream: Stream,
        urgency: Urgency,
    ) -> None:
        self._enter()
        own: deque[Event] = deque()
        try:
            for target, source, nbytes in pieces:
                while (event := self._places.take(urgency, may_wait=not own)) is None:
                    self._finish(own, urgency)
                own.append(event)
                begin(target, source, nbytes, stream)
                self._driver.event_record(event, stream)
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

    def _finish(self, own: deque[Event], urgency: Urgency) -> None:
        """Wait for the oldest piece of one's own; its place is free then, whatever happened."""
        event = own.popleft()
        try:
            self._driver.event_synchronize(event)
        finally:
            self._places.give(event, urgency)

    # --- packed pieces --------------------------------------------------------------------------
    def unpack(
        self, sources: list[Span], targets: list[Span], first: int, urgency: Urgency
    ) -> None:
        """Have the GPU decode a piece, or do it here where it cannot; see `Copier`."""
        self._enter()
        with self._is_opening:
            if self._unpacking is None:
                self._unpacking = CudaUnpacking(self._driver, self._device)
        if self._unpacking.is_possible:
            self._unpacking.run(sources, targets, first, urgency, self._pieces)
            return
        with self._spare_stages().lend() as address:
            raw = address + PIECE_BYTES_MAX
            nbytes = sum(length for _, length in targets)
            decode(joined(sources, address), [(raw, nbytes)], first)
            self.copy([(raw, nbytes)], targets, urgency)

    @contextlib.contextmanager
    def read_back(self, targets: list[Span], urgency: Urgency) -> Iterator[list[Span]]:
        """Copy what is on the device back to host memory; see `Copier`."""
        self._enter()
        with self._spare_stages().lend() as address:
            event = self._places.take(urgency, may_wait=True)
            assert event is not None
            at = address
            with contextlib.ExitStack() as ends:
                ends.callback(self._finish, deque((event,)), urgency)
                ends.callback(self._driver.event_record, event, self._stream)
                for source, nbytes in targets:
                    self._driver.memcpy_dtoh_async(at, source, nbytes, self._stream)
                    at += nbytes
            yield [(address, at - address)]

    def _spare_stages(self) -> Stages:
        """Return stages that are not `_stages`: who holds one of those would wait for another."""
        with self._is_opening:
            if self._spare is None:
                self._spare = Stages(COPIES_IN_FLIGHT, 2 * PIECE_BYTES_MAX)
            return self._spare

    # --- host memory ----------------------------------------------------------------------------
    def stage(self) -> AbstractContextManager[int]:
        """Lend host memory; see `Copier`."""
        return self._stages.lend()

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
