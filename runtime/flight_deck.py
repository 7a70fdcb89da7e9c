"""Flights and the rest of a worker: lanes, versions and wishes hear of a batch that begins, and of its end.

Invariants
 1. A lane whose batch is in the air has no other; it has its place again when that has landed.
 2. Before anything is said or done to a version, its batch lands; before memory goes, every batch.

Called by a worker's loop, where DEVICE is a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from overcommit.runtime.batcher import Batcher
from overcommit.runtime.bound import Version, Versions
from overcommit.runtime.flights import Flight, Flights
from overcommit.runtime.lanes import Batch

if TYPE_CHECKING:
    from overcommit.runtime.wishes import Wishes


class FlightDeck:
    """Joins them."""

    def __init__(
        self, flights: Flights, batcher: Batcher, versions: Versions, wishes: Wishes
    ) -> None:
        self.flights = flights
        self._batcher = batcher
        self._versions = versions
        self._wishes = wishes

    @property
    def is_full(self) -> bool:
        """Whether no further batch may be begun."""
        return self.flights.is_full

    def nap_ns(self, now_ns: int) -> int | None:
        """Return how long who has nothing to do may sleep, as far as flights go; 0: not at all."""
        return self.flights.nap_ns(now_ns) if self.flights else None

    def try_start(self, version: Version, batch: Batch, now_ns: int) -> bool:
        """Begin a batch; False where it runs by itself: nothing is in the air then."""
        if version.starter is None:
            self.clear(None, now_ns)
            return False
        flight = self.flights.try_start(version, batch)
        if flight is None:
            self._batcher.put_back(batch, now_ns)
            self._wishes.lose(version, now_ns)
        elif flight.work is None:
            self._finish(flight)
        else:
            self._batcher.lift(batch)
        self._wishes.note_waiting(batch.slot)
        return True

    def land(self, now_ns: int) -> bool:
        """Take back what the device has done; False when there was nothing."""
        landed = self.flights.take_landed()
        if self.flights:
            self.flights.tell()  # binding and warming up have used the page
        for flight in landed:
            self._finish(flight)
            self._wishes.note_waiting(flight.batch.slot)
        return bool(landed)

    def clear(self, slot: int | None, now_ns: int) -> None:
        """Wait until no batch of this version, or none at all, is in the air."""
        if self.flights and (slot is None or self.flights.has(slot)):
            self.flights.wait_for(slot)
            self.land(now_ns)

    def _finish(self, flight: Flight) -> None:
        self._batcher.finish(flight.batch, flight.cost_ns, flight.ended_ns)
        self._versions.on_run(flight.batch.slot)


def deck_of(
    flights: Flights | None, batcher: Batcher, versions: Versions, wishes: Wishes
) -> FlightDeck | None:
    """Return the deck of these flights; None where there are none, on the CPU."""
    return None if flights is None else FlightDeck(flights, batcher, versions, wishes)
