"""Whose turn it is: the order between the lanes of a worker.

Between lanes: weighted deficit round robin, with the turn as short as it can be, one batch.  A
lane's deficit is kept as the time at which its share is used up on a clock that runs only while
lanes wait (start-time fair queueing): the lane whose clock is furthest behind goes next, and its
clock is put forward by the cost of its batch over its weight.  The cost is the measured compute
time, so a heavy model cannot take more than its share by having heavy batches.  Round robin by
quanta was left because a batch of a second needs a thousand rounds of a quantum of a millisecond to
pay for, and because a lane that empties would lose its deficit with every batch.

Between classes of priority: higher first, but while a lower class waits it gets one part in
LOWER_SHARE of the compute time of those above it, so it is slowed and never starved.

Invariants
 1. A lane has at most one entry that counts in its class's heap.  An entry of a lane that is no
    longer DUE, or that ran in another's batch since, is void and thrown away when it comes up.
 2. A lane's clock never goes back; one that was idle starts where its class is, with no credit.

Called by the batcher.
"""

from __future__ import annotations

import enum
import itertools
from collections import deque
from collections.abc import Sequence, Sized
from heapq import heappop, heappush
from typing import Final, Protocol

from overcommit.runtime.lanes import Lane
from overcommit.runtime.pace import Pace
from overcommit.runtime.signature import Form

LOWER_SHARE: Final = 8


class Rooms(Protocol):
    """Versions that may share batches."""

    def room(self, form: Form) -> int:
        """How many requests of this form one batch may hold now; 1: they cannot share one (yet)."""
        ...


class State(enum.Enum):
    """Where a lane stands."""

    EMPTY = enum.auto()
    PARKED = enum.auto()
    WAITING = enum.auto()
    DUE = enum.auto()
    RUNNING = enum.auto()
    GONE = enum.auto()


_DUE: Final = State.DUE  # an attribute of an enumeration takes as long to find as a call


class Turn:
    """A lane with its place in the order."""

    __slots__ = (
        *("can_run", "entry", "in_mates", "lane", "mates", "pace"),
        *("rank", "rooms", "start_ns", "state", "timer_ns", "used_ns"),
    )

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.state = State.EMPTY
        self.can_run = False
        self.used_ns = 0.0  # its share is used up to here, on its class's clock
        self.start_ns = 0.0  # its entry's key, on the same clock
        self.entry = 0  # the number of its entry that counts; 0: there is none
        self.timer_ns = 0  # of its entry among the timers that counts; 0: there is none
        self.pace = Pace()  # what its batches cost, over their rows
        self.rooms: Rooms | None = None
        self.rank: Rank | None = None  # of its priority, once it was due
        # The lanes that it may share batches with and that became due; some are no longer.
        self.mates: deque[Turn] = deque()
        self.in_mates = False  # whether it stands there, once

    def leave_mates(self) -> None:
        """Its version leaves its family: while no batch is shared nobody passes over who is gone."""
        if self.in_mates:
            self.in_mates = False
            self.mates.remove(self)


class Rank:
    """The lanes of one priority."""

    __slots__ = ("clock_ns", "due", "owed_ns", "priority", "used_ns")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.clock_ns = 0.0
        self.used_ns = 0.0  # the furthest that any lane has come
        self.owed_ns = 0.0  # by the classes above, for what they ran while this one waited
        self.due: list[tuple[float, int, Turn]] = []

    def first(self) -> Turn | None:
        """The lane that is next in this class."""
        due = self.due
        while due:
            _, entry, turn = due[0]
            if turn.entry == entry:
                if turn.state is _DUE:
                    return turn
                turn.entry = 0
            heappop(due)
        return None


class Ranks:
    """All lanes that are due."""

    def __init__(self) -> None:
        self._ranks: list[Rank] = []  # highest priority first
        self._entries = itertools.count(1)

    def make_due(self, turn: Turn) -> None:
        """Give a lane its place."""
        turn.state = _DUE
        if turn.rooms is not None and not turn.in_mates:
            turn.in_mates = True
            turn.mates.append(turn)
        if turn.entry:
            return
        rank = turn.rank or self.of(turn)
        start_ns = turn.used_ns
        if start_ns < rank.clock_ns:
            start_ns = rank.clock_ns
        turn.start_ns = start_ns
        turn.entry = entry = next(self._entries)
        heappush(rank.due, (start_ns, entry, turn))

    def of(self, turn: Turn) -> Rank:
        """The class of a lane."""
        if turn.rank is None:
            priority = turn.lane.limits.priority
            for rank in self._ranks:
                if rank.priority == priority:
                    break
            else:
                rank = Rank(priority)
                self._ranks.append(rank)
                self._ranks.sort(key=lambda rank: -rank.priority)
            turn.rank = rank
        return turn.rank

    def pop(self) -> tuple[Rank, Turn] | None:
        """Take the lane whose turn it is; None when none is due.

        It is the first of the highest class that waits, unless one below it is owed time.
        """
        chosen: tuple[Rank, Turn] | None = None
        for rank in self._ranks:
            turn = rank.first()
            if turn is not None and (chosen is None or rank.owed_ns > max(0.0, chosen[0].owed_ns)):
                chosen = rank, turn
        if chosen is not None:
            heappop(chosen[0].due)
            chosen[1].entry = 0
        return chosen

    def rest(self) -> None:
        """Nothing waits that could run: put clocks right.

        So no lane pays later for compute that nobody else wanted.
        """
        for rank in self._ranks:
            rank.clock_ns = max(rank.clock_ns, rank.used_ns)
            rank.owed_ns = 0.0

    def charge(self, parts: Sequence[tuple[Turn, Sized]], one_ns: float) -> None:
        """These lanes have had so much compute for each of their jobs."""
        for turn, jobs in parts:
            rank = turn.rank or self.of(turn)
            used_ns = turn.start_ns + one_ns * len(jobs) / turn.lane.limits.weight
            turn.used_ns = used_ns
            if used_ns > rank.used_ns:
                rank.used_ns = used_ns

    def settle(self, ran: Rank, cost_ns: float) -> None:
        """Owe the classes that waited below; what a class ran before its betters, it has had."""
        if len(self._ranks) == 1:
            return
        is_below = waited_above = False
        for rank in self._ranks:
            if rank is ran:
                is_below = True
            elif rank.first() is not None:
                if is_below:
                    rank.owed_ns += cost_ns / LOWER_SHARE
                else:
                    waited_above = True
        ran.owed_ns = ran.owed_ns - cost_ns if waited_above else 0.0
