"""Packed pieces to the GPU: the packed bytes are copied to a staging range there, and decoded by the GPU.

A slot is a stream, an event and PIECE_BYTES_MAX of the GPU's memory.  On a slot's stream come the copies of
one piece, then the kernel that writes its destination, then the event: nothing of it overlaps, but
what is on other slots does, so the link copies one piece while another is decoded.

    FREE --[copies and kernel are on its stream]--> IN FLIGHT --[its event has fired]--> FREE

Invariants
 1. A slot's range is written only while nothing of the slot is in flight.
 2. `run` returns, or raises, only when nothing of its piece is in flight.
 3. At most COPIES_IN_FLIGHT pieces are in flight, by the rules of `copy_places`.

The driver's errors are not caught: see `cuda_copy`.  Where the GPU cannot decode (no cupy),
`is_possible` says so, and the caller decodes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from overcommit.runtime.config import COPIES_IN_FLIGHT, PIECE_BYTES_MAX
from overcommit.runtime.copier import pairs
from overcommit.runtime.copy_places import CopyPlaces
from overcommit.runtime.driver import Driver, Event, Stream
from overcommit.runtime.image_file import Span
from overcommit.runtime.mover_messages import Urgency
from overcommit.runtime.packed import blocks_of

log = logging.getLogger("overcommit.mover")

# Cuts (target, source, bytes) where one copy may not reach on.
Cut = Callable[[Iterable[tuple[int, int, int]]], Iterator[tuple[int, int, int]]]


@dataclass(slots=True, frozen=True)
class Slot:
    """See the module."""

    stream: Stream
    event: Event
    address: int


class CudaUnpacking:
    """Decoding on one GPU.  The calling thread has the context."""

    def __init__(self, driver: Driver, device: int) -> None:
        self._driver = driver
        self._unpacker: Final = driver.unpacker(device)
        slots: list[Slot] = []
        if self._unpacker is None:
            log.warning(
                "packed weights are decoded by the CPU, for the GPU's decoder needs cupy: install "
                "overcommit[cuda12] or [cuda13], or set --host-packing off"
            )
        else:
            for _ in range(COPIES_IN_FLIGHT):
                address = self._unpacker.allocate(PIECE_BYTES_MAX)
                stream = driver.stream_create(is_urgent=True)
                slots.append(Slot(stream, driver.event_create(), address))
        self._places = CopyPlaces(slots)

    @property
    def is_possible(self) -> bool:
        """Whether the GPU decodes."""
        return self._unpacker is not None

    def run(
        self, sources: list[Span], targets: list[Span], first: int, urgency: Urgency, cut: Cut
    ) -> None:
        """Copy a piece, decode its blocks from `first` on to `targets`.  Raises DriverError."""
        assert self._unpacker is not None
        slot = self._places.take(urgency, may_wait=True)
        assert slot is not None
        driver = self._driver
        with contextlib.ExitStack() as ends:
            ends.callback(self._places.give, slot, urgency)
            ends.callback(driver.event_synchronize, slot.event)
            ends.callback(driver.event_record, slot.event, slot.stream)
            total = sum(nbytes for _, nbytes in sources)
            for target, source, nbytes in cut(pairs(sources, [(slot.address, total)])):
                driver.memcpy_htod_async(target, source, nbytes, slot.stream)
            for address, _, block, count in blocks_of(targets):
                self._unpacker.launch(slot.address, address, first + block, count, slot.stream)
