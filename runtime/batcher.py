"""Which batch a worker runs next.

Owns the lanes of a worker and their order.  State and `now_ns` go in, batches and expired jobs come
out; nothing here blocks, reads a clock or touches memory that others see.

A lane is due at once when the worker is free: whatever gathered while it ran the last batch goes
together, without artificial delay.  Only where a version's config sets a queue delay, its lane
waits until it is full or its oldest job has waited that long.

Between lanes: weighted deficit round robin, with the turn as short as it can be, one batch.  A
lane's deficit is kept as the time at which its share is used up on a clock that runs only while
lanes wait (start-time fair queueing): the lane whose clock is furthest behind goes next, and its
clock is put forward by the cost of its batch over its weight.  The cost is the measured compute
time, so a heavy model cannot take more than its share by having heavy batches.  Round robin by
quanta was left because a batch of a second needs a thousand rounds of a quantum of a millisecond to
pay for, and because a lane that empties would lose its deficit with every batch.

Between classes of priority: higher first, but while a lower class waits it gets one part in
LOWER_SHARE of the compute time of those above it, so it is slowed and never starved.

A lane's states:

    EMPTY  --add-->  PARKED     its version cannot run now (not resident, not bound)
                     WAITING    it can, but its queue delay is not over
                     DUE        it has its place in its class
    DUE    --next--> RUNNING  --finish, put_back-->  any of the four above

    EMPTY, PARKED, WAITING, DUE -> each other   [_place]
    DUE -> RUNNING                              [next]
    RUNNING -> *                                [finish, put_back]
    any -> GONE                                 [remove]

Invariants
 1. Every job that was added leaves exactly once: in a batch that is finished, as expired, or by
    cancel, drain, drop_link or remove.
 2. A lane that cannot run is not looked at by `next`: it delays no other, whatever waits in it.
 3. A lane has at most one entry in its class's heap and one among the timers; an entry of a lane
    that is no longer DUE (WAITING) is void and thrown away when it comes up.
 4. No expired job is in a batch.

Called by the worker's loop.
"""

from __future__ import annotations

import enum
import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from overcommit.runtime.lanes import NEVER_NS, Job, Lane, Limits

LOWER_SHARE: Final = 8
SWEEP_NS: Final = 2_000_000  # a job that waits may be answered EXPIRED this much late


class State(enum.Enum):
    """Where a lane stands."""

    EMPTY = enum.auto()
    PARKED = enum.auto()
    WAITING = enum.auto()
    DUE = enum.auto()
    RUNNING = enum.auto()
    GONE = enum.auto()


@dataclass(slots=True, frozen=True)
class Batch:
    """Jobs of one version and shape that run together."""

    slot: int
    jobs: list[Job]


class _Turn:
    """A lane with its place in the order."""

    __slots__ = ("can_run", "in_heap", "in_timers", "lane", "start_ns", "state", "used_ns")

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.state = State.EMPTY
        self.can_run = False
        self.used_ns = 0.0  # its share is used up to here, on its class's clock
        self.start_ns = 0.0  # its entry's key, on the same clock
        self.in_heap = False
        self.in_timers = False


class _Class:
    """The lanes of one priority."""

    __slots__ = ("clock_ns", "due", "owed_ns", "priority", "used_ns")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.clock_ns = 0.0
        self.used_ns = 0.0  # the furthest that any lane has come
        self.owed_ns = 0.0  # by the classes above, for what they ran while this one waited
        self.due: list[tuple[float, int, _Turn]] = []

    def first(self) -> _Turn | None:
        while self.due:
            turn = self.due[0][2]
            if turn.state is State.DUE:
                return turn
            heapq.heappop(self.due)
            turn.in_heap = False
        return None


class Batcher:
    """All lanes of one worker.  One batch is out at a time."""

    def __init__(self) -> None:
        self._turns: dict[int, _Turn] = {}
        self._jobs: dict[int, Job] = {}
        self._classes: list[_Class] = []  # highest priority first
        self._timers: list[tuple[int, int, _Turn]] = []
        self._waiting: set[_Turn] = set()  # lanes with jobs
        self._running: _Turn | None = None
        self._expired: list[Job] = []
        self._sweep_ns = NEVER_NS
        self._swept_ns = 0
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._jobs

    # --- lanes ----------------------------------------------------------------------------------
    def configure(self, slot: int, limits: Limits) -> None:
        """Make a version's lane, in place of the one there was, which must be empty."""
        left = self.remove(slot)
        assert not left, "a lane is configured before it gets jobs"
        self._turns[slot] = _Turn(Lane(slot, limits))

    def set_runnable(self, slot: int, can_run: bool, now_ns: int) -> None:
        """Say whether batches of this version can run now."""
        turn = self._turn(slot)
        turn.can_run = can_run
        if turn is not self._running:
            self._place(turn, now_ns)

    def remove(self, slot: int) -> list[Job]:
        """Forget a lane; return what was in it."""
        turn = self._turns.pop(slot, None)
        if turn is None:
            return []
        assert turn is not self._running, "a version is not removed while its batch runs"
        jobs = self._take_out(turn, turn.lane.remove(lambda _: True))
        turn.state = State.GONE
        return jobs

    def waiting(self, slot: int) -> int:
        """How many jobs wait in this lane."""
        turn = self._turns.get(slot)
        return 0 if turn is None else turn.lane.count

    # --- jobs -----------------------------------------------------------------------------------
    def add(self, job: Job, now_ns: int) -> bool:
        """Queue a job; False when its lane is full."""
        turn = self._turns.get(job.slot) or self._turn(job.slot)
        lane = turn.lane
        if lane.count >= lane.limits.jobs_max:
            return False
        assert job.request_id not in self._jobs, "a request is queued once"
        self._enter(turn, job)
        # A lane that is DUE stays where it is; one that is WAITING may have become full.
        if turn.state is State.EMPTY or (
            turn.state is State.WAITING and lane.rows >= lane.limits.rows_max
        ):
            self._place(turn, now_ns)
        return True

    def cancel(self, request_id: int, now_ns: int) -> Job | None:
        """Take a job out; None when it does not wait here (any more)."""
        job = self._jobs.get(request_id)
        if job is None:
            return None
        turn = self._turns[job.slot]
        removed = self._take_out(turn, turn.lane.remove(lambda other: other is job))
        self._settle(turn, now_ns)
        return removed[0] if removed else None

    def drain(self, slot: int, now_ns: int) -> list[Job]:
        """Take every job of a lane out."""
        turn = self._turns.get(slot)
        if turn is None:
            return []
        jobs = self._take_out(turn, turn.lane.remove(lambda _: True))
        self._settle(turn, now_ns)
        return jobs

    def drop_link(self, link: int, now_ns: int) -> list[Job]:
        """Take every job of a front-end incarnation out."""
        jobs: list[Job] = []
        for turn in list(self._waiting):
            jobs += self._take_out(turn, turn.lane.remove(lambda job: job.link == link))
            self._settle(turn, now_ns)
        return jobs

    def take_expired(self) -> list[Job]:
        """Return the jobs whose time was over before they were run, once."""
        expired, self._expired = self._expired, []
        return expired

    # --- batches --------------------------------------------------------------------------------
    def next(self, now_ns: int) -> Batch | None:
        """Take the batch that runs next; `finish` or `put_back` must follow."""
        assert self._running is None, "one batch is out at a time"
        if now_ns >= self._sweep_ns:
            self._sweep(now_ns)
        while self._timers and self._timers[0][0] <= now_ns:
            turn = heapq.heappop(self._timers)[2]
            turn.in_timers = False
            if turn.state is State.WAITING:
                self._place(turn, now_ns)
        while (chosen := self._choose()) is not None:
            first, turn = chosen
            heapq.heappop(first.due)
            turn.in_heap = False
            late: list[Job] = []
            jobs = turn.lane.take(now_ns, late)
            if late:
                self._expired += self._take_out(turn, late)
            if jobs:
                first.clock_ns = max(first.clock_ns, turn.start_ns)
                turn.state = State.RUNNING
                self._running = turn
                return Batch(turn.lane.slot, jobs)
            self._place(turn, now_ns)
        # Nothing waits that could run: clocks are put right, so that no lane pays later for
        # compute that nobody else wanted.
        for rank in self._classes:
            rank.clock_ns = max(rank.clock_ns, rank.used_ns)
            rank.owed_ns = 0.0
        return None

    def finish(self, batch: Batch, cost_ns: int, now_ns: int) -> None:
        """The batch has run; charge its lane."""
        turn = self._back(batch)
        for job in batch.jobs:
            del self._jobs[job.request_id]
        rank = self._rank(turn.lane.limits.priority)
        turn.used_ns = turn.start_ns + cost_ns / turn.lane.limits.weight
        rank.used_ns = max(rank.used_ns, turn.used_ns)
        self._settle_classes(rank, cost_ns)
        self._place(turn, now_ns)

    def put_back(self, batch: Batch, now_ns: int) -> None:
        """The batch could not run; its jobs wait again, in their old order, and cost nothing."""
        turn = self._back(batch)
        for job in batch.jobs:
            self._enter(turn, job)
        self._place(turn, now_ns)

    def wake_ns(self) -> int | None:
        """When `next` should be asked again although nothing was added; None: no need."""
        wake_ns = self._timers[0][0] if self._timers else NEVER_NS
        if self._sweep_ns != NEVER_NS:
            wake_ns = min(wake_ns, max(self._sweep_ns, self._swept_ns + SWEEP_NS))
        return None if wake_ns == NEVER_NS else wake_ns

    # --- inside ---------------------------------------------------------------------------------
    def _turn(self, slot: int) -> _Turn:
        turn = self._turns.get(slot)
        if turn is None:
            turn = self._turns[slot] = _Turn(Lane(slot, Limits()))
        return turn

    def _rank(self, priority: int) -> _Class:
        for rank in self._classes:
            if rank.priority == priority:
                return rank
        rank = _Class(priority)
        self._classes.append(rank)
        self._classes.sort(key=lambda rank: -rank.priority)
        return rank

    def _enter(self, turn: _Turn, job: Job) -> None:
        turn.lane.push(job)
        self._jobs[job.request_id] = job
        self._waiting.add(turn)
        self._sweep_ns = min(self._sweep_ns, job.deadline_ns)

    def _take_out(self, turn: _Turn, jobs: list[Job]) -> list[Job]:
        for job in jobs:
            del self._jobs[job.request_id]
        if not turn.lane.count:
            self._waiting.discard(turn)
        return jobs

    def _settle(self, turn: _Turn, now_ns: int) -> None:
        if turn is not self._running:
            self._place(turn, now_ns)

    def _back(self, batch: Batch) -> _Turn:
        turn = self._running
        assert turn is not None, "no batch is out"
        assert turn.lane.slot == batch.slot, "another batch is out"
        self._running = None
        return turn

    def _place(self, turn: _Turn, now_ns: int) -> None:
        """Put a lane where it belongs now."""
        lane = turn.lane
        if not lane.count:
            self._waiting.discard(turn)
            turn.state = State.EMPTY
        elif not turn.can_run:
            turn.state = State.PARKED
        else:
            due_ns = self._due_ns(lane)
            if due_ns <= now_ns:
                self._make_due(turn)
                return
            turn.state = State.WAITING
            if not turn.in_timers:
                turn.in_timers = True
                heapq.heappush(self._timers, (due_ns, next(self._order), turn))

    @staticmethod
    def _due_ns(lane: Lane) -> int:
        if not lane.limits.delay_ns or lane.rows >= lane.limits.rows_max:
            return 0
        return lane.oldest_ns() + lane.limits.delay_ns

    def _make_due(self, turn: _Turn) -> None:
        turn.state = State.DUE
        if turn.in_heap:
            return
        rank = self._rank(turn.lane.limits.priority)
        turn.start_ns = max(turn.used_ns, rank.clock_ns)
        turn.in_heap = True
        heapq.heappush(rank.due, (turn.start_ns, next(self._order), turn))

    def _due_classes(self) -> Iterator[tuple[_Class, _Turn]]:
        for rank in self._classes:
            turn = rank.first()
            if turn is not None:
                yield rank, turn

    def _choose(self) -> tuple[_Class, _Turn] | None:
        """The highest class that waits, unless one below it is owed time."""
        chosen: tuple[_Class, _Turn] | None = None
        for rank, turn in self._due_classes():
            if chosen is None or rank.owed_ns > max(0.0, chosen[0].owed_ns):
                chosen = rank, turn
        return chosen

    def _settle_classes(self, ran: _Class, cost_ns: int) -> None:
        """Owe the classes that waited below; what a class ran before its betters, it has had."""
        if len(self._classes) == 1:
            return
        is_below = waited_above = False
        for rank in self._classes:
            if rank is ran:
                is_below = True
            elif rank.first() is not None:
                if is_below:
                    rank.owed_ns += cost_ns / LOWER_SHARE
                else:
                    waited_above = True
        ran.owed_ns = ran.owed_ns - cost_ns if waited_above else 0.0

    def _sweep(self, now_ns: int) -> None:
        """Expire what waits in lanes that do not come up; at most once in SWEEP_NS."""
        if now_ns < self._swept_ns + SWEEP_NS:
            return
        self._swept_ns = now_ns
        for turn in list(self._waiting):
            late: list[Job] = []
            turn.lane.expire(now_ns, late)
            self._expired += self._take_out(turn, late)
            self._place(turn, now_ns)
        deadlines = (turn.lane.first_deadline_ns() for turn in self._waiting)
        self._sweep_ns = min(deadlines, default=NEVER_NS)
