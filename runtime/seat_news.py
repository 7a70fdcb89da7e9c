"""What is special about workers' seats, and who has to know.

A worker that dies again and again is not started any more (`seats`).  Requests for most models go to other
workers; but a sequence's worker follows from its id, so front ends leave such a seat out.  And while a
worker is occupied (`occupied`), others get what can go there.

Invariants
 1. Every front end is told of all of them: when that changes, and when it is new.  Of a worker it hears
    only after it was linked with it.

Called by the supervisor, from its one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from overcommit.runtime.fleet import Fleet
from overcommit.runtime.front_end_messages import Occupied, SeatNews
from overcommit.runtime.occupied import Occupation
from overcommit.runtime.seats import SeatState

log = logging.getLogger("overcommit")

_NOTHING = SeatNews()


class Seats:
    """Tells front ends, and the log.  `occupied` says who is occupied."""

    def __init__(self, fleet: Fleet, occupied: Callable[[], list[Occupation]]) -> None:
        self._fleet = fleet
        self._occupied = occupied
        self._is_logged = False
        self._told: dict[tuple[int, int], SeatNews] = {}  # by front end: what it knows

    def step(self) -> None:
        """Tell what is not known yet."""
        broken = [seat for seat in self._fleet.seats if seat.state is SeatState.BROKEN]
        if broken and not self._is_logged:
            self._is_logged = True
            log.error("a process dies again and again: see its log above; it is not started again")
        news = SeatNews(
            broken=tuple(seat.index for seat in broken if seat.kind == "worker"),
            occupied=tuple(Occupied(each.seat, each.epoch, each.slot) for each in self._occupied()),
        )
        told: dict[tuple[int, int], SeatNews] = {}
        for front in self._fleet.of_kind("front_end"):
            if self._told.get(front.incarnation, _NOTHING) != news:
                front.post(news)
            told[front.incarnation] = news
        self._told = told
