"""SIGKILL to a server's children, at seeded random instants.

Only seats that were named are hit, and only a process that the kernel says belongs to the server.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from overcommit.bench import processes
from overcommit.bench.server import Server

INTERVAL_S: Final = (0.2, 1.0)
LIVE_LIMIT_S: Final = 30.0  # until a seat has somebody again
SeatName = tuple[str, int]


@dataclass(slots=True, frozen=True)
class Kill:
    """One process that was killed."""

    at_ns: int
    kind: str
    seat: int
    pid: int


class Killer:
    """Call `tick` often while a load runs."""

    def __init__(
        self,
        server: Server,
        seats: Collection[SeatName],
        seed: int,
        interval_s: tuple[float, float] = INTERVAL_S,
    ) -> None:
        self.kills: list[Kill] = []
        self._server = server
        self._seats = frozenset(seats)
        self._random = random.Random(seed)
        self._interval_s = interval_s
        self._next_s = time.monotonic() + self._random.uniform(*interval_s)

    def tick(self) -> None:
        """Kill one process if it is time."""
        if time.monotonic() < self._next_s:
            return
        # Drawn before looking who lives, so that what is drawn depends on the seed alone.
        order = self._random.sample(sorted(self._seats), len(self._seats))
        pause_s = self._random.uniform(*self._interval_s)
        live = self._live()
        for name in order:
            if name in live:
                self._kill(*name, live[name])
                break
        self._next_s = time.monotonic() + pause_s

    def kill_all(self) -> None:
        """Kill whoever lives in each of the seats; where one has just died, the next one."""
        left = set(self._seats)

        def is_done() -> bool:
            live = self._live()
            for name in sorted(left & live.keys()):
                if self._kill(*name, live[name]):
                    left.discard(name)
            return not left

        processes.wait_for(is_done, LIVE_LIMIT_S)

    def _live(self) -> dict[SeatName, int]:
        rows = self._server.status()["processes"]
        return {(row["kind"], row["seat"]): row["pid"] for row in rows if row["state"] == "LIVE"}

    def _kill(self, kind: str, seat: int, pid: int) -> bool:
        """Return whether it was there to be killed."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            # The pidfd is taken before the check: the pid cannot pass to a stranger in between.
            if any(row.pid == pid for row in self._server.family()):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    self.kills.append(Kill(time.monotonic_ns(), kind, seat, pid))
                    return True
        finally:
            os.close(pidfd)
        return False

    def count(self, kind: str) -> int:
        """How many of a kind were killed."""
        return sum(kill.kind == kind for kill in self.kills)
