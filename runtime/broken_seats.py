"""Workers' seats that nobody will sit in again, and who has to know.

A worker that dies again and again is not started any more (`seats`).  Requests for most models go to other
workers; but a sequence's worker follows from its id, so front ends leave such a seat out.

Invariants
 1. Every front end is told of all of them: when another one breaks, and when it is new.

Called by the supervisor, from its one thread.
"""

from __future__ import annotations

import logging

from overcommit.runtime.fleet import Fleet
from overcommit.runtime.front_end_messages import SeatsBroken
from overcommit.runtime.seats import SeatState

log = logging.getLogger("overcommit")


class BrokenSeats:
    """Tells front ends, and the log."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._is_logged = False
        self._told: dict[tuple[int, int], tuple[int, ...]] = {}  # by front end: what it knows

    def step(self) -> None:
        """Tell what is not known yet."""
        broken = [seat for seat in self._fleet.seats if seat.state is SeatState.BROKEN]
        if not broken:
            return
        if not self._is_logged:
            self._is_logged = True
            log.error("a process dies again and again: see its log above; it is not started again")
        seats = tuple(seat.index for seat in broken if seat.kind == "worker")
        for front in self._fleet.of_kind("front_end"):
            if self._told.get(front.incarnation, ()) != seats:
                self._told[front.incarnation] = seats
                front.post(SeatsBroken(seats=seats))
