"""Which batch a worker runs next.

Owns the lanes of a worker and their order.  State and `now_ns` go in, batches and expired jobs come
out; nothing here blocks, reads a clock or touches memory that others see.

A lane is due at once when the worker is free: whatever gathered while it ran the last batch goes
together, without artificial delay.  Only where a version's config sets a queue delay, its lane
waits until it is full or its oldest job has waited that long.

A batch may hold jobs of several lanes when their versions are of one family (`mixing.py`): the lane
whose turn it is takes others along that are due too, in the order in which they became due, with
requests of the same form.  Each is charged its share; that it runs earlier than its own turn delays
nobody, since the batch is run anyway.

A lane's states:

    EMPTY  --add-->  PARKED     its version cannot run now (not resident, not bound)
                     WAITING    it can, but its queue delay is not over
                     DUE        it has its place in its class
    DUE    --next--> RUNNING  --finish, put_back-->  any of the four above

    EMPTY, PARKED, WAITING, DUE -> each other   [_place]
    DUE -> RUNNING                              [next; after `lift` it may be asked again]
    RUNNING -> *                                [finish, put_back]
    any -> GONE                                 [remove]

Invariants
 1. Every job that was added leaves exactly once: in a batch that is finished, as expired, or by
    cancel, drain, drop_link or remove.
 2. A lane that cannot run is not looked at by `next`: it delays no other, whatever waits in it.
 3. A lane has at most one entry among the timers that counts, the earliest; one of a lane that is no
    longer WAITING is void and thrown away when it comes up.
 4. No expired job is in a batch.
 5. All jobs of a batch have one form when they are of several versions.

Called by the worker's loop.  The order between lanes is in `turns.py`.
"""

from __future__ import annotations

import heapq
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Collection
from typing import Final

from overcommit.runtime.backlog import Foresight
from overcommit.runtime.by_slot import BySlot
from overcommit.runtime.config import NEVER_NS
from overcommit.runtime.joining import common_form, may_join
from overcommit.runtime.lanes import Batch, Job, Lane, Limits
from overcommit.runtime.turns import Ranks, Rooms, State, Turn

PASSED_MAX: Final = 64  # lanes that are looked at and left, for one batch
# Attributes of an enumeration take as long to find as a call.
_DUE: Final = State.DUE
_EMPTY: Final = State.EMPTY
_RUNNING: Final = State.RUNNING
_WAITING: Final = State.WAITING
LONG_NS: Final = 1_000_000  # batches from here on teach their lane's pace each time
SWEEP_NS: Final = 2_000_000  # a job that waits may be answered EXPIRED this much late


class Batcher:
    """All lanes of one worker.  One batch is out at a time, beside those that were lifted."""

    def __init__(self) -> None:
        self.turns = BySlot[Turn]()
        self._jobs: dict[int, Job] = {}
        self._ranks = Ranks()
        self._timers: list[tuple[int, int, Turn]] = []
        self._waiting: set[Turn] = set()  # lanes with jobs
        self._running: list[Turn] = []
        self._aloft: dict[int, Turn] = {}  # lanes whose batch was lifted, by slot
        # Lanes that may share batches; an entry goes with the last of them.
        self._mates = weakref.WeakKeyDictionary[Rooms, deque[Turn]]()
        self._expired: list[Job] = []
        self._sweep_ns = NEVER_NS
        self._swept_ns = 0
        self._order = itertools.count(1)
        # About the longest batch of late: with the number of jobs, a cheap bound on what anybody waits.
        self.slowest_ns = 0
        self.finished = 0  # batches, ever
        self.foresight = Foresight(self.turns, self._waiting)

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._jobs

    # --- lanes ----------------------------------------------------------------------------------
    def configure(self, slot: int, limits: Limits, lane: Lane | None = None) -> None:
        """Make a version's lane, in place of the one there was, which must be empty.

        `lane`: one that orders its jobs in its own way.
        """
        left = self.remove(slot)
        assert not left, "a lane is configured before it gets jobs"
        self.turns.put(slot, Turn(Lane(slot, limits) if lane is None else lane))

    def set_family(self, slot: int, family: Rooms | None) -> None:
        """Say with which other versions this one may share batches."""
        turn = self._turn(slot)
        turn.leave_mates()
        turn.rooms = family
        if family is not None:
            turn.mates = self._mates.setdefault(family, deque())
            if turn.state is _DUE:
                turn.in_mates = True
                turn.mates.append(turn)

    def set_runnable(self, slot: int, can_run: bool, now_ns: int) -> None:
        """Say whether batches of this version can run now."""
        turn = self._turn(slot)
        turn.can_run = can_run
        self._settle(turn, now_ns)

    def remove(self, slot: int) -> list[Job]:
        """Forget a lane; return what was in it."""
        turn = self.turns.take(slot)
        if turn is None:
            return []
        assert not self._is_out(turn), "a version is not removed while its batch runs"
        jobs = self._take_out(turn, turn.lane.remove(lambda _: True))
        turn.leave_mates()
        turn.state = State.GONE
        return jobs

    def waiting(self, slot: int) -> int:
        """How many jobs wait in this lane."""
        return 0 if (turn := self.turns.find(slot)) is None else turn.lane.count

    def is_busy(self, slot: int) -> bool:
        """Whether jobs of this lane wait, or are on a device."""
        return self.waiting(slot) > 0 or slot in self._aloft

    # --- jobs -----------------------------------------------------------------------------------
    def add(self, job: Job, now_ns: int) -> bool:
        """Queue a job; False when its lane is full."""
        turn = self.turns.find(job.slot) or self._turn(job.slot)
        lane = turn.lane
        if lane.count >= lane.limits.jobs_max:
            return False
        assert job.request_id not in self._jobs, "a request is queued once"
        if lane.limits.wait_ns and not lane.takes(job):
            return False
        self._enter(turn, job)
        # A lane that is DUE stays where it is; one that is WAITING may have become full.
        state = turn.state
        if state is _EMPTY and turn.can_run and not lane.limits.delay_ns:
            self._ranks.make_due(turn)  # as `_place` does; nearly every first job comes here
        elif state is _EMPTY or (state is _WAITING and lane.is_full):
            self._place(turn, now_ns)
        return True

    def cancel(self, request_id: int, now_ns: int) -> Job | None:
        """Take a job out; None when it does not wait here (any more)."""
        job = self._jobs.get(request_id)
        if job is None:
            return None
        return next(iter(self._take_if(self._turn(job.slot), lambda x: x is job, now_ns)), None)

    def drain(self, slot: int, now_ns: int) -> list[Job]:
        """Take every job of a lane out."""
        turn = self.turns.find(slot)
        return [] if turn is None else self._take_if(turn, lambda _: True, now_ns)

    def take_before(self, slot: int, time_ns: int, now_ns: int) -> list[Job]:
        """Take the jobs of a lane out whose deadline is before then, but those that are retried."""
        return self._take_if(
            self._turn(slot), lambda job: job.deadline_ns < time_ns and not job.alone, now_ns
        )

    def drop_link(self, link: int, now_ns: int) -> list[Job]:
        """Take every job of a front-end incarnation out."""
        jobs: list[Job] = []
        for turn in list(self._waiting):
            jobs += self._take_if(turn, lambda job: job.link == link, now_ns)
        return jobs

    def take_expired(self) -> list[Job]:
        """Return the jobs whose time was over before they were run, once."""
        expired, self._expired = self._expired, []
        return expired

    # --- batches --------------------------------------------------------------------------------
    def next(self, now_ns: int) -> Batch | None:
        """Take the batch that runs next; `finish` or `put_back` must follow."""
        assert not self._running, "one batch is out at a time"
        if now_ns >= self._sweep_ns:
            self._sweep(now_ns)
        while self._timers and self._timers[0][0] <= now_ns:
            timer_ns, _, turn = heapq.heappop(self._timers)
            if timer_ns == turn.timer_ns:
                turn.timer_ns = 0
            if turn.state is _WAITING:
                self._place(turn, now_ns)
        while (chosen := self._ranks.pop()) is not None:
            rank, turn = chosen
            jobs = self._take(turn, now_ns)
            if jobs:
                if rank.clock_ns < turn.start_ns:
                    rank.clock_ns = turn.start_ns
                others = () if turn.rooms is None else self._take_along(turn, jobs, now_ns)
                return Batch(turn.lane.slot, jobs, others)
            self._place(turn, now_ns)
        self._ranks.rest()
        return None

    def finish(self, batch: Batch, cost_ns: int, now_ns: int, lost: Collection[int] = ()) -> None:
        """The batch has run; charge its lanes.  The jobs of the slots in `lost` wait again."""
        parts = self._back(batch)
        first = parts[0][0]
        ran = self._ranks.of(first)
        self.slowest_ns = max(cost_ns, self.slowest_ns - (self.slowest_ns >> 5))
        done = parts
        if lost:
            done = [part for part in parts if part[0].lane.slot not in lost]
            for turn, mine in parts:
                if turn.lane.slot in lost:
                    for job in mine:
                        self._enter(turn, job)
        jobs = self._jobs
        for _, mine in done:
            for job in mine:
                del jobs[job.request_id]
        one_ns = cost_ns / max(1, sum([len(mine) for _, mine in done]))
        self._ranks.charge(done, one_ns)
        # One lane of a batch is enough, and one in four short batches.
        if first.lane.slot not in lost and (cost_ns >= LONG_NS or not self.finished & 3):
            first.pace.note(first.lane.taken_rows, one_ns * len(parts[0][1]))
        self.finished += 1
        self._ranks.settle(ran, cost_ns)
        for turn, _ in parts:
            if turn.lane.count:
                self._place(turn, now_ns)
            else:
                self._waiting.discard(turn)
                turn.state = _EMPTY

    def lift(self, batch: Batch) -> None:
        """A device works on the batch, one lane's; `finish` comes later, others run meanwhile."""
        ((self._aloft[batch.slot], _),) = self._back(batch)

    def put_back(self, batch: Batch, now_ns: int) -> None:
        """The batch could not run; its jobs wait again, in their old order, and cost nothing."""
        for turn, jobs in self._back(batch):
            for job in jobs:
                self._enter(turn, job)
            self._place(turn, now_ns)

    def wake_ns(self) -> int | None:
        """When `next` should be asked again although nothing was added; None: no need."""
        wake_ns = self._timers[0][0] if self._timers else NEVER_NS
        if self._sweep_ns != NEVER_NS:
            wake_ns = min(wake_ns, max(self._sweep_ns, self._swept_ns + SWEEP_NS))
        return None if wake_ns == NEVER_NS else wake_ns

    def deadlines(self, slot: int) -> tuple[int, int]:
        """Return the first and the last deadline in a lane; NEVER_NS twice when it is empty."""
        turn = self.turns.find(slot)
        times = [] if turn is None else [job.deadline_ns for job in turn.lane.jobs()]
        return min(times, default=NEVER_NS), max(times, default=NEVER_NS)

    # --- inside ---------------------------------------------------------------------------------
    def _turn(self, slot: int) -> Turn:
        turn = self.turns.find(slot)
        if turn is None:
            turn = Turn(Lane(slot, Limits()))
            self.turns.put(slot, turn)
        return turn

    def _enter(self, turn: Turn, job: Job) -> None:
        turn.lane.push(job)
        self._jobs[job.request_id] = job
        self._waiting.add(turn)
        if job.deadline_ns < self._sweep_ns:
            self._sweep_ns = job.deadline_ns

    def _take_out(self, turn: Turn, jobs: list[Job]) -> list[Job]:
        for job in jobs:
            del self._jobs[job.request_id]
        if not turn.lane.count:
            self._waiting.discard(turn)
        return jobs

    def _take_if(self, turn: Turn, goes: Callable[[Job], bool], now_ns: int) -> list[Job]:
        jobs = self._take_out(turn, turn.lane.remove(goes))
        self._settle(turn, now_ns)
        return jobs

    def _settle(self, turn: Turn, now_ns: int) -> None:
        if not self._is_out(turn):
            self._place(turn, now_ns)

    def _is_out(self, turn: Turn) -> bool:
        return turn in self._running or turn.lane.slot in self._aloft

    def _take(self, turn: Turn, now_ns: int) -> list[Job]:
        """Take a lane's next batch, or what there is of it: DUE -> RUNNING, if there is any."""
        late: list[Job] = []
        jobs = turn.lane.take(now_ns, late)
        if late:
            self._expired += self._take_out(turn, late)
        if jobs:
            turn.state = _RUNNING
            self._running.append(turn)
        return jobs

    def _take_along(
        self, first: Turn, jobs: list[Job], now_ns: int
    ) -> tuple[tuple[int, list[Job]], ...]:
        """Take jobs like these from lanes that may share the batch and are due."""
        form = common_form(jobs)
        if first.rooms is None or form is None:
            return ()
        left = first.rooms.room(form) - len(jobs)
        others: list[tuple[int, list[Job]]] = []
        passed: list[Turn] = []
        mates, running = first.mates, self._running
        while left > 0 and mates and len(passed) < PASSED_MAX:
            turn = mates.popleft()
            turn.in_mates = False
            if turn.state is not _DUE:
                continue
            lane = turn.lane
            only = lane.only
            if (
                only is not None
                and only.form is form
                and only.deadline_ns > now_ns
                and turn.rank is first.rank
                and not only.alone
            ):
                # With many models nearly all are like this: what the general way does, at once.
                turn.state = _RUNNING
                turn.entry = 0
                running.append(turn)
                others.append((lane.slot, lane.take_only(only)))
                left -= 1
                continue
            if not may_join(lane, first.lane, form, left):
                passed.append(turn)
                continue
            taken = self._take(turn, now_ns)
            if taken:
                turn.entry = 0
                others.append((lane.slot, taken))
                left -= len(taken)
            else:
                self._place(turn, now_ns)
        for turn in passed:
            turn.in_mates = True
        mates.extend(passed)
        return tuple(others)

    def _back(self, batch: Batch) -> list[tuple[Turn, list[Job]]]:
        if self._aloft and (lifted := self._aloft.pop(batch.slot, None)) is not None:
            return [(lifted, batch.jobs)]
        turns, self._running = self._running, []
        assert turns, "no batch is out"
        assert turns[0].lane.slot == batch.slot, "another one is out"
        jobs = [batch.jobs, *(mine for _, mine in batch.others)]
        return list(zip(turns, jobs, strict=True))

    def _place(self, turn: Turn, now_ns: int) -> None:
        """Put a lane where it belongs now."""
        lane = turn.lane
        if not lane.count:
            self._waiting.discard(turn)
            turn.state = _EMPTY
        elif not turn.can_run:
            turn.state = State.PARKED
        elif not lane.limits.delay_ns:
            self._ranks.make_due(turn)
        else:
            due_ns = lane.due_ns()
            if due_ns <= now_ns:
                self._ranks.make_due(turn)
                return
            turn.state = _WAITING
            if not turn.timer_ns or due_ns < turn.timer_ns:
                turn.timer_ns = due_ns
                heapq.heappush(self._timers, (due_ns, next(self._order), turn))

    def _sweep(self, now_ns: int) -> None:
        """Expire what waits in lanes that do not come up; at most once in SWEEP_NS."""
        if now_ns < self._swept_ns + SWEEP_NS:
            return
        self._swept_ns = now_ns
        for turn in list(self._waiting):
            late: list[Job] = []
            turn.lane.expire(now_ns, late)
            self._expired += self._take_out(turn, late)
            self._settle(turn, now_ns)
        deadlines = (turn.lane.first_deadline_ns() for turn in self._waiting)
        self._sweep_ns = min(deadlines, default=NEVER_NS)
