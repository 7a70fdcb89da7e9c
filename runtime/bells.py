"""The bells by which the children of a site wake each other, without the supervisor on the way.

Owns an eventfd for each mover, which outlives it; a worker's doorbell is lent to the mover beside it.

Invariants
 1. A bell carries no news: who is rung looks at what it says elsewhere, and may be rung for nothing.
 2. A mover that serves has the doorbell of every worker of its site that serves.

Called by the fleet.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Protocol

from overcommit.runtime.messages import Message
from overcommit.runtime.mover_messages import WorkerBell
from overcommit.runtime.seats import Seat


def make_bell() -> int:
    """Make an eventfd that nobody waits for by chance: not inherited, and never blocking."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


class Ringable(Protocol):
    """What of a child matters here."""

    seat: Seat
    fds: dict[str, int]

    def post(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send it something."""


class MoverBells:
    """A bell for the mover of each site."""

    def __init__(self, sites: int) -> None:
        self._fds = [make_bell() for _ in range(sites)]

    def fd(self, site: int) -> int:
        """Return the bell, to send it to the mover."""
        return self._fds[site]

    def ring(self, site: int) -> None:
        """Wake the mover: a load may follow at once."""
        os.eventfd_write(self._fds[site], 1)

    def close(self) -> None:
        """Nobody is left."""
        for fd in self._fds:
            os.close(fd)


def lend_doorbells(movers: Iterable[Ringable], workers: Iterable[Ringable]) -> None:
    """Give the doorbell of each of these workers to each of these movers."""
    for worker in workers:
        for mover in movers:
            mover.post(WorkerBell(seat=worker.seat.index), (worker.fds["doorbell"],))
