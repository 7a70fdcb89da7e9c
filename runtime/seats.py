"""The place of a child process, and which incarnation sits in it.

Pure: it starts, watches and kills nothing; the fleet does, and tells the seat.

Invariants
 1. A seat is occupied by at most one process, and its epoch names that one incarnation: it changes
    when a process was reaped, never while something of it may still run.  16 bits, never 0.
 2. A seat whose process dies again and again is started ever later (RESTART_BACKOFF_S, by deaths in
    a row); RESTART_BUDGET deaths within RESTART_WINDOW_S break it for good.
 3. A process that was LIVE for more than LIVED_S has proved itself: its death counts as the first
    in a row.
 4. A start that fails before there is a process counts as a death, with the back-off; but it breaks no
    seat: the machine lacks something, and that passes.

                  on_started          on_ready
        EMPTY ---------------> STARTING -------> LIVE
          ^                     |    |            |
          |          on_kill_sent    |            | on_kill_sent
          | epoch + 1           v    | on_dead    v
        REAPED <------------- DYING  |          DYING
          |  ^      on_dead          |
          |  +-----------------------+---- LIVE (on_dead)
          v
        BROKEN

EMPTY      nobody; may be started from `start_at_ns()` on
STARTING   a process exists (or is being forked, pid 0) and has not said Ready
LIVE       it serves
DYING      SIGKILL was sent; it may still write to whatever it has mapped
REAPED     inside `on_dead` and `on_start_failed` only: nothing is left, the seat decides what comes next
BROKEN     the budget is spent; never started again

EMPTY -> STARTING [on_started]
STARTING -> STARTING [on_started], when the fork server has named the pid
STARTING -> LIVE [on_ready]
STARTING -> DYING [on_kill_sent]
LIVE -> DYING [on_kill_sent]
STARTING -> REAPED [on_dead]
LIVE -> REAPED [on_dead]
DYING -> REAPED [on_dead]
EMPTY -> REAPED [on_start_failed]
STARTING -> REAPED [on_start_failed], when the fork server could not make it
DYING -> REAPED [on_start_failed], likewise
REAPED -> EMPTY [on_dead]
REAPED -> EMPTY [on_start_failed]
REAPED -> BROKEN [on_dead]

Called by the fleet, from the supervisor's one thread.
"""

from __future__ import annotations

import collections
from enum import Enum
from typing import Final

from overcommit.runtime.config import (
    RESTART_BACKOFF_S,
    RESTART_BUDGET,
    RESTART_WINDOW_S,
    START_TIMEOUT_S,
)
from overcommit.runtime.messages import Kind

LIVED_S: Final = 10.0
EPOCH_MAX: Final = 0xFFFF


class SeatState(Enum):
    """See the module's diagram."""

    EMPTY = "empty"
    STARTING = "starting"
    LIVE = "live"
    DYING = "dying"
    REAPED = "reaped"
    BROKEN = "broken"


_OCCUPIED: Final = (SeatState.STARTING, SeatState.LIVE, SeatState.DYING)


class Seat:
    """One place, from the server's start to its end."""

    __slots__ = (
        "_deaths_in_row",
        "_deaths_ns",
        "_ready_ns",
        "_start_at_ns",
        "_started_ns",
        "deaths",
        "epoch",
        "failed_starts",
        "index",
        "kind",
        "pid",
        "site",
        "state",
    )

    def __init__(self, kind: Kind, index: int, site: int = 0) -> None:
        self.kind: Kind = kind
        self.index = index
        self.site = site  # a mover's and a worker's
        self.failed_starts = 0  # in a row: it died before it served
        self.epoch = 1
        self.state = SeatState.EMPTY
        self.pid = 0
        self.deaths = 0
        self._deaths_in_row = 0
        self._deaths_ns: collections.deque[int] = collections.deque(maxlen=RESTART_BUDGET)
        self._start_at_ns = 0
        self._started_ns = 0
        self._ready_ns: int | None = None

    def __repr__(self) -> str:
        pid = f", pid {self.pid}" if self.state in _OCCUPIED and self.pid else ""
        return f"Seat({self.kind} {self.index}, epoch {self.epoch}, {self.state.name}{pid})"

    def describe(self) -> dict[str, object]:
        """Return what status shows of it."""
        return {
            "kind": self.kind,
            "seat": self.index,
            "site": self.site,
            "epoch": self.epoch,
            "state": self.state.name,
            "deaths": self.deaths,
        }

    # --- asking ---------------------------------------------------------------------------------
    def can_start(self, now_ns: int) -> bool:
        """Whether the seat is free and its back-off is over."""
        return self.state is SeatState.EMPTY and now_ns >= self._start_at_ns

    def start_at_ns(self) -> int | None:
        """Return from when on the seat may be started; None if it is taken or broken."""
        return self._start_at_ns if self.state is SeatState.EMPTY else None

    def start_overdue(self, now_ns: int) -> bool:
        """Whether the process has not said Ready in time, and was not killed for it yet."""
        timeout_ns = int(START_TIMEOUT_S * 1e9)
        return self.state is SeatState.STARTING and now_ns - self._started_ns > timeout_ns

    # --- what happens ---------------------------------------------------------------------------
    def on_started(self, pid: int, now_ns: int) -> None:
        """A process was started (pid 0: the fork server will name it, by a second call)."""
        if self.state in _OCCUPIED:
            assert self.pid in (0, pid), f"{self!r} is taken, pid {pid} cannot have it"
        else:
            assert self.can_start(now_ns), f"{self!r} must not be started now"
            self.state = SeatState.STARTING
            self._started_ns = now_ns
        self.pid = pid

    def on_ready(self, now_ns: int) -> None:
        """It serves.  Said too late (killed already) or twice, it changes nothing."""
        if self.state is SeatState.STARTING:
            self.state = SeatState.LIVE
            self._ready_ns = now_ns
            self.failed_starts = 0

    def on_kill_sent(self, now_ns: int) -> None:
        """SIGKILL is on its way; the seat stays taken until `on_dead`."""
        if self.state in _OCCUPIED:
            self.state = SeatState.DYING

    def on_dead(self, now_ns: int) -> None:
        """The process was reaped: the next epoch begins, after a back-off."""
        assert self.state in _OCCUPIED, f"{self!r} has nobody who could die"
        self._deaths_ns.append(now_ns)
        self._settle(now_ns)

    def on_start_failed(self, now_ns: int) -> None:
        """There was never a process: as `on_dead`, but nobody was there who could be broken."""
        assert self.state is not SeatState.LIVE, f"{self!r} was started"
        assert self.state is not SeatState.BROKEN, f"{self!r} must not be started"
        self._settle(now_ns)

    def _settle(self, now_ns: int) -> None:
        self.state = SeatState.REAPED
        self.pid = 0
        lived_ns = 0 if self._ready_ns is None else now_ns - self._ready_ns
        self.failed_starts += self._ready_ns is None
        self._ready_ns = None
        self._deaths_in_row = 1 if lived_ns > LIVED_S * 1e9 else self._deaths_in_row + 1
        self.deaths += 1
        self.epoch = self.epoch % EPOCH_MAX + 1
        if self._is_budget_spent(now_ns):
            self.state = SeatState.BROKEN
            return
        step = min(self._deaths_in_row, len(RESTART_BACKOFF_S)) - 1
        self._start_at_ns = now_ns + int(RESTART_BACKOFF_S[step] * 1e9)
        self.state = SeatState.EMPTY

    def _is_budget_spent(self, now_ns: int) -> bool:
        window_ns = int(RESTART_WINDOW_S * 1e9)
        recent = [at for at in self._deaths_ns if now_ns - at <= window_ns]
        return len(recent) >= RESTART_BUDGET
