"""A worker's queue for a version whose requests have levels: what is urgent goes first.

    level 1 before level 2 before ...; a request without a level, or with one that there is not, has the
    version's default.  Within a level: earliest deadline first, as in any lane.

A batch begins with the first request of the most urgent level that waits, and is filled up with requests
of its shape, level by level.

Invariants
 1. No request is taken while one of its shape and of a more urgent level waits.
 2. Each level has a limit and a time of its own: those of `[[batching.levels]]`, or else the version's.

Pure.  Called by the batcher alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from overcommit.runtime.config import NEVER_NS, Batching
from overcommit.runtime.delay_lane import queue_of
from overcommit.runtime.lanes import BATCH_REQUESTS_MAX, Job, Lane, Limits


class PriorityLane(Lane):
    """The jobs that wait for one version; `only` is never used."""

    __slots__ = ("_default", "_each", "_highest", "_policies", "_queues")

    def __init__(self, slot: int, limits: Limits, batching: Batching) -> None:
        # A lane whose jobs have a time to wait is asked for each, whether it takes it.
        super().__init__(
            slot, replace(limits, jobs_max=batching.waiting_max, wait_ns=limits.wait_ns or NEVER_NS)
        )
        self._each = limits
        self._highest = batching.priority_levels
        self._default = batching.default_priority or batching.priority_levels
        self._policies = {each.level: each for each in batching.levels}
        self._queues: dict[int, Lane] = {}  # in the order of their levels; empty ones stay

    def takes(self, job: Job) -> bool:
        """Whether its level has room; what is too late for its level's time has an earlier deadline."""
        level = self._level(job)
        policy = self._policies.get(level)
        jobs_max, wait_ns = self._each.jobs_max, self._each.wait_ns
        if policy is not None:
            jobs_max, wait_ns = policy.max_queue_size, 0
            if policy.timeout_action == "reject":
                wait_ns = policy.queue_timeout_us * 1000
        queue = self._queues.get(level)
        if queue is not None and queue.count >= jobs_max:
            return False
        if wait_ns:
            job.deadline_ns = min(job.deadline_ns, job.taken_ns + wait_ns)
        return True

    def push(self, job: Job) -> None:
        """Queue a job."""
        level = self._level(job)
        queue = self._queues.get(level)
        if queue is None:
            self._queues[level] = queue = queue_of(self.slot, self._limits_of(level))
            self._queues = dict(sorted(self._queues.items()))
        queue.push(job)
        self.count += 1
        self.rows += job.rows

    def take(self, now_ns: int, expired: list[Job]) -> list[Job]:
        """Take one batch; what is found expired on the way goes to `expired`.  May be empty."""
        jobs: list[Job] = []
        for queue in self._queues.values():
            if not queue.count:
                continue
            if not jobs:
                jobs = queue.take(now_ns, expired)
            elif not jobs[0].alone and len(jobs) < BATCH_REQUESTS_MAX:
                jobs += queue.take_like(jobs, now_ns, expired)
        self.taken_rows = sum(job.rows for job in jobs)
        self._add_up()
        return jobs

    def expire(self, now_ns: int, expired: list[Job]) -> None:
        """Move every job whose deadline is over to `expired`."""
        for queue in self._queues.values():
            queue.expire(now_ns, expired)
        self._add_up()

    def remove(self, gone: Callable[[Job], bool]) -> list[Job]:
        """Take out every job for which `gone` is true."""
        removed = [job for queue in self._queues.values() for job in queue.remove(gone)]
        self._add_up()
        return removed

    def jobs(self) -> list[Job]:
        """All jobs that wait, in no order."""
        return [job for queue in self._queues.values() for job in queue.jobs()]

    def first_deadline_ns(self) -> int:
        """The earliest deadline; NEVER_NS when the lane is empty."""
        deadlines = (queue.first_deadline_ns() for queue in self._queues.values())
        return min(deadlines, default=NEVER_NS)

    def before(self, job: Job) -> tuple[int, int]:
        """How many jobs, with how many rows, would be run before this one."""
        level = self._level(job)
        jobs = rows = 0
        for other, queue in self._queues.items():
            if other < level:
                jobs, rows = jobs + queue.count, rows + queue.rows
            elif other == level:
                mine = queue.before(job)
                jobs, rows = jobs + mine[0], rows + mine[1]
        return jobs, rows

    def oldest_ns(self) -> int:
        """When the job was taken that has waited longest; NEVER_NS when the lane is empty."""
        return min((queue.oldest_ns() for queue in self._queues.values()), default=NEVER_NS)

    def _limits_of(self, level: int) -> Limits:
        """What holds for the queue of a level."""
        policy = self._policies.get(level)
        if policy is None:
            return self._each
        delays = policy.timeout_action == "delay"
        return replace(self._each, delay_after_ns=policy.queue_timeout_us * 1000 if delays else 0)

    def _level(self, job: Job) -> int:
        return job.level if 0 < job.level <= self._highest else self._default

    def _add_up(self) -> None:
        self.count = sum(queue.count for queue in self._queues.values())
        self.rows = sum(queue.rows for queue in self._queues.values())
