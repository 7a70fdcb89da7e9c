"""A child of the supervisor: one incarnation in a seat, and what belongs to it.

Invariants
 1. What a child does not read is bounded: one whose backlog is full counts as hung and is killed.

Made and ended by the fleet.
"""

from __future__ import annotations

import logging
import mmap
import os
from dataclasses import dataclass, field

from overcommit.runtime import _shm
from overcommit.runtime.front_end_messages import Counters
from overcommit.runtime.messages import Message
from overcommit.runtime.process import Process
from overcommit.runtime.seats import Seat
from overcommit.runtime.vigil import Vigil

log = logging.getLogger("overcommit.fleet")


@dataclass(slots=True)
class Child:
    """One incarnation in a seat."""

    seat: Seat
    process: Process
    epoch: int
    fds: dict[str, int] = field(default_factory=dict)
    page: mmap.mmap | None = None
    leases: _shm.LeasePage | None = None
    status: _shm.StatusPage | None = None
    is_ready: bool = False
    told: set[int] = field(default_factory=set)  # slots whose VersionInfo this worker has
    counters: Counters = field(default_factory=Counters)
    vigil: Vigil | None = None  # over a worker that is ready

    @property
    def incarnation(self) -> tuple[int, int]:
        """Seat and epoch: no two children of a kind have the same ones."""
        return self.seat.index, self.epoch

    def post(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send; a child that leaves too many messages unread is hung and is killed."""
        try:
            if not self.process.control.post(message, fds):
                log.error("%r does not read its control socket: killed", self.seat)
                self.process.kill()
        except ConnectionError:
            self.process.kill()  # it is dying; the pidfd will tell
        except OSError as error:
            log.error(
                "%r cannot be told a %s (%s): killed", self.seat, type(message).__name__, error
            )
            self.process.kill()


def close_all(fds: dict[str, int]) -> None:
    """Close these descriptors and forget them."""
    while fds:
        os.close(fds.popitem()[1])
