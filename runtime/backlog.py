"""How long a job that joins a worker's lanes will wait, and what is said to one that cannot.

Lanes share a worker by start-time fair queueing (`turns.py`), so until a lane has had a share s of
compute, another one of equal weight has had the least of s and of what waits in it.  The wait of a
job is the sum of that over all lanes that can run, for the share that the jobs before it, and it
itself, need.

A job that is refused is told when to come back.  That is true only if its place is kept: a client
that is answered asks again at once, and whoever was sent away would find the queue full each time.
So `Promises` counts those who were told to come back as if they waited here; but they hold back
nobody while the queue is short, since nobody knows whether they will come.

Invariants
 1. `Backlog.until_ns` does not fall when the share or the work of any lane grows.
 2. A promise counts until its time and no longer; there are at most PROMISES_MAX.
 3. `Promises.judge` refuses nobody whose time is at least twice the wait for what really waits.
 4. A job that needs more of the worker than is foreseen is not refused; one in a lane whose pace is
    not known never is.

Pure.  Called by the door for the few jobs that might be late, never for the others.
"""

from __future__ import annotations

import bisect
import collections
import itertools
from collections.abc import Collection, Iterable
from typing import Final

from overcommit.runtime.by_slot import BySlot
from overcommit.runtime.lanes import BATCH_REQUESTS_MAX, Job
from overcommit.runtime.turns import LOWER_SHARE, Turn

BACKLOG_NS: Final = 1_000_000  # what all lanes hold is added up this often at most
LANES_WEIGHED_MAX: Final = 256  # and of so many lanes; the others are left out
HIGHER_WEIGHT: Final = 1e6  # a lane of a higher class has all it wants
PROMISES_MAX: Final = 4096  # of one lane
PROMISE_NS_MAX: Final = 10_000_000_000  # nobody is told to come back later than this


class Backlog:
    """The work that waits in some lanes, each with its weight."""

    def __init__(self, lanes: Iterable[tuple[float, float]]) -> None:
        """Take (work in ns, weight) of each."""
        # By the share at which a lane has nothing left: below it, it takes what it is due.
        rows = sorted((work_ns / weight, work_ns, weight) for work_ns, weight in lanes)
        self._ends = [end for end, _, _ in rows]
        self._done = [0.0, *itertools.accumulate(work for _, work, _ in rows)]
        weights = list(itertools.accumulate((weight for _, _, weight in reversed(rows)), initial=0))
        self._weights = weights[::-1]  # of the lanes from this one on

    def until_ns(self, share_ns: float) -> float:
        """Return what these lanes run until one more, of weight 1, has had this share."""
        at = bisect.bisect_left(self._ends, share_ns)
        return self._done[at] + share_ns * self._weights[at]


class Foresight:
    """What the lanes of one batcher, which are looked at and not changed, will take."""

    def __init__(self, turns: BySlot[Turn], waiting: Collection[Turn]) -> None:
        self._turns = turns
        self._waiting = waiting
        self._works: dict[Turn, float] = {}  # of the lanes in the backlog
        self._backlog = Backlog(())
        self._priority = 0  # for which it was added up
        self._at_ns = -BACKLOG_NS

    def batch_ns(self, slot: int) -> int:
        """Return what the next batch of a lane, when it is full, takes; 0: unknown."""
        turn = self._turns.find(slot)
        return 0 if turn is None else int(turn.pace.of(turn.lane.limits.rows_max))

    def of(self, job: Job, now_ns: int) -> tuple[float, float] | None:
        """Return in how many ns a job would be done that joined its lane now, and what it costs.

        None where its lane has not run enough to say.  The lanes that share the worker are as they
        were BACKLOG_NS ago at most, its own as it is.
        """
        turn = self._turns.find(job.slot)
        if turn is None or not turn.pace.is_known:
            return None
        priority, weight = turn.lane.limits.priority, turn.lane.limits.weight
        if now_ns - self._at_ns >= BACKLOG_NS or priority != self._priority:
            self._at_ns, self._priority = now_ns, priority
            self._add_up()
        jobs, rows = turn.lane.before(job)
        own_ns = _work_ns(turn, jobs + 1, rows + job.rows)
        # Its lane is itself one of those that wait.
        mine_ns = min(self._works.get(turn, 0.0), own_ns)
        others_ns = self._backlog.until_ns(own_ns / weight) - mine_ns
        return own_ns + max(0.0, others_ns), own_ns / (jobs + 1)

    def _add_up(self) -> None:
        self._works.clear()
        lanes: list[tuple[float, float]] = []
        for turn in itertools.islice(self._waiting, LANES_WEIGHED_MAX):
            lane = turn.lane
            if not turn.can_run or not lane.count:
                continue
            self._works[turn] = work_ns = _work_ns(turn, lane.count, lane.rows)
            weight: float = lane.limits.weight
            if lane.limits.priority > self._priority:
                weight = HIGHER_WEIGHT
            elif lane.limits.priority < self._priority:
                weight /= LOWER_SHARE
            lanes.append((work_ns, weight))
        self._backlog = Backlog(lanes)


def _work_ns(turn: Turn, jobs: int, rows: int) -> float:
    """What so many jobs of a lane take, in batches as full as they can be."""
    batches = max(-(-rows // turn.lane.limits.rows_max), -(-jobs // BATCH_REQUESTS_MAX))
    return turn.pace.of(rows, batches)


class Promises:
    """Who was told to come back to one lane."""

    def __init__(self) -> None:
        self._due: collections.deque[tuple[int, float]] = collections.deque()  # when, cost in ns
        self._sum_ns = 0.0

    def __len__(self) -> int:
        return len(self._due)

    def judge(self, wait_ns: float, cost_ns: float, left_ns: int, now_ns: int) -> int:
        """Return 0 for a job that may wait, else in how many ns it should come back.

        It would be answered after `wait_ns`, of which it costs `cost_ns` itself, and has `left_ns`.
        """
        due = self._due
        while due and due[0][0] <= now_ns:
            self._sum_ns -= due.popleft()[1]
        if not due:
            self._sum_ns = 0.0
        with_promised_ns = wait_ns + self._sum_ns
        if with_promised_ns <= left_ns or 2.0 * wait_ns <= left_ns:
            return 0
        # In turn: each comes when those before it have been served.
        back_ns = max(1, int(min(with_promised_ns - left_ns, PROMISE_NS_MAX)))
        if len(due) < PROMISES_MAX:
            at_ns = now_ns + back_ns
            if due and due[-1][0] > at_ns:
                at_ns = due[-1][0]  # in order; it counts a little longer
            due.append((at_ns, cost_ns))
            self._sum_ns += cost_ns
        return back_ns
