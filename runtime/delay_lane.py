"""A worker's queue for a version whose requests are not refused for waiting, but come last.

    TIMELY --it has waited for `delay_after_ns`--> LATE

Triton's queue policy with `timeout_action: DELAY`: whoever is late lets all others of the queue pass, those
that come after him too, and is served when none of them waits.  Of a lane with levels each level is such a
queue, so who is late in one comes before the next level's.

Invariants
 1. No late request begins a batch while a timely one waits; batches are filled up with them.
 2. Late requests are among themselves as in any lane: earliest deadline first.

Pure.  Called by the batcher, and by the lane of levels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from overcommit.runtime.lanes import BATCH_REQUESTS_MAX, Job, Lane, Limits

ARRIVALS_SPARE: Final = 64  # of jobs that have left, before they are looked for


class DelayLane(Lane):
    """The jobs that wait for one version, or one level of it; `only` is never used."""

    __slots__ = ("_after_ns", "_arrivals", "_late", "_looked_ns", "_timely")

    def __init__(self, slot: int, limits: Limits) -> None:
        super().__init__(slot, limits)
        self._after_ns = limits.delay_after_ns
        self._timely, self._late = Lane(slot, limits), Lane(slot, limits)
        self._arrivals: deque[Job] = deque()  # those that are timely, and some that have left
        self._looked_ns = 0  # when it was last found out who is late

    def push(self, job: Job) -> None:
        """Queue a job, or take one back."""
        if not job.order:
            self._arrived += 1
            job.order = self._arrived
        if job.taken_ns + self._after_ns <= self._looked_ns:
            self._late.push(job)  # it comes back
        else:
            self._timely.push(job)
            if self._arrivals and job.taken_ns < self._arrivals[0].taken_ns:
                self._arrivals.appendleft(job)
            else:
                self._arrivals.append(job)
        self._add_up()

    def take(self, now_ns: int, expired: list[Job]) -> list[Job]:
        """Take one batch; what is found expired on the way goes to `expired`.  May be empty."""
        self._let_pass(now_ns)
        jobs = self._timely.take(now_ns, expired)
        if not jobs:
            jobs = self._late.take(now_ns, expired)
        elif self._late.count and not jobs[0].alone and len(jobs) < BATCH_REQUESTS_MAX:
            jobs += self._late.take_like(jobs, now_ns, expired)
        self.taken_rows = sum(job.rows for job in jobs)
        self._add_up()
        return jobs

    def take_like(self, jobs: list[Job], now_ns: int, expired: list[Job]) -> list[Job]:
        """Take what may share a batch with these jobs of another queue, as long as it fits."""
        self._let_pass(now_ns)
        more = self._timely.take_like(jobs, now_ns, expired)
        if len(jobs) + len(more) < BATCH_REQUESTS_MAX:
            more += self._late.take_like([*jobs, *more], now_ns, expired)
        self._add_up()
        return more

    def expire(self, now_ns: int, expired: list[Job]) -> None:
        """Move every job whose deadline is over to `expired`."""
        for queue in (self._timely, self._late):
            queue.expire(now_ns, expired)
        self._add_up()

    def remove(self, gone: Callable[[Job], bool]) -> list[Job]:
        """Take out every job for which `gone` is true."""
        removed = [job for queue in (self._timely, self._late) for job in queue.remove(gone)]
        self._add_up()
        return removed

    def jobs(self) -> list[Job]:
        """All jobs that wait, in no order."""
        return [*self._timely.jobs(), *self._late.jobs()]

    def first_deadline_ns(self) -> int:
        """The earliest deadline; NEVER_NS when the lane is empty."""
        return min(self._timely.first_deadline_ns(), self._late.first_deadline_ns())

    def before(self, job: Job) -> tuple[int, int]:
        """How many jobs, with how many rows, would be run before this one, as long as it is timely."""
        return self._timely.before(job)

    def oldest_ns(self) -> int:
        """When the job was taken that has waited longest; NEVER_NS when the lane is empty."""
        return min(self._timely.oldest_ns(), self._late.oldest_ns())

    # --- inside ---------------------------------------------------------------------------------
    def _let_pass(self, now_ns: int) -> None:
        """Who has waited too long is late from now on."""
        arrivals, self._looked_ns = self._arrivals, now_ns
        late: set[int] = set()
        while arrivals and arrivals[0].taken_ns + self._after_ns <= now_ns:
            late.add(arrivals.popleft().request_id)
        if late:
            for job in self._timely.remove(lambda job: job.request_id in late):
                self._late.push(job)

    def _add_up(self) -> None:
        self.count = self._timely.count + self._late.count
        self.rows = self._timely.rows + self._late.rows
        if len(self._arrivals) > 2 * self.count + ARRIVALS_SPARE:
            waiting = {job.request_id for job in self._timely.jobs()}
            self._arrivals = deque(job for job in self._arrivals if job.request_id in waiting)


def queue_of(slot: int, limits: Limits) -> Lane:
    """Make the queue that these limits ask for."""
    return DelayLane(slot, limits) if limits.delay_after_ns else Lane(slot, limits)
