"""A worker's queue for one version: jobs by shape, earliest deadline first.

Owns the jobs that wait for one version.  Jobs of equal `shape_key` can share a batch; each key has
its own heap, ordered by deadline and then by arrival, so that with one time-out for all a lane is a
plain queue.  A job that comes into an empty lane lies beside the heaps: with many models most lanes
never hold more than one.

Invariants
 1. `count` is the number of jobs in the heaps and beside them, `rows` the sum of their rows.
    While a job lies beside the heaps they are empty.
 2. A batch holds jobs of one shape key, at least one, at most BATCH_REQUESTS_MAX; unless it is a
    single job it has at most `rows_max` rows and BATCH_BYTES_MAX padded bytes.
 3. Within a shape key, no job is taken before one with an earlier deadline.
 4. No job whose deadline is over is taken into a batch.

Pure.  Called by the batcher alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Final

from overcommit.runtime.config import MIB, NEVER_NS, QUEUE_SIZE_MAX, ModelConfig
from overcommit.runtime.signature import Form

# Padding multiplies bytes: one long request among 31 short ones must not become gigabytes.
BATCH_BYTES_MAX: Final = 256 * MIB
# As many as the status page can name: if the worker dies, every request that ran must be known.
BATCH_REQUESTS_MAX: Final = 64

# Bits of a submission's `flags`.
LEVEL_SHIFT: Final = 8  # how urgent it is, from this bit on
RUN_ALONE: Final = 1  # it was in the batch of a worker that died: it must not take others with it


@dataclass(slots=True, frozen=True)
class Limits:
    """What a version's config says about its lane."""

    rows_max: int = 1
    rows_due: int = 0  # so many do not wait for the delay; 0: rows_max
    delay_ns: int = 0
    wait_ns: int = 0  # a job that waits longer has expired; 0: its deadline counts
    delay_after_ns: int = 0  # one that waits longer lets the others pass; 0: none does
    jobs_max: int = QUEUE_SIZE_MAX
    weight: int = 1
    priority: int = 0


LIMITS_MAX: Final = 256  # different ones that are remembered
_known: dict[Limits, Limits] = {}


def limits_of(config: ModelConfig) -> Limits:
    """Read a lane's limits from its version's config; a version that does not batch has one row."""
    batching = config.batching
    rows_max = max(1, batching.max_batch_size)
    delay_ns = batching.max_queue_delay_us * 1000 if batching.max_batch_size > 1 else 0
    if config.sequence is not None:
        delay_ns += 1  # such a lane says itself when it is due
    wait_ns = batching.queue_timeout_us * 1000
    delays = batching.timeout_action == "delay"
    limits = Limits(
        rows_max=rows_max,
        rows_due=min((rows_max, *batching.preferred_sizes)),
        wait_ns=0 if delays else wait_ns,
        delay_after_ns=wait_ns if delays else 0,
        delay_ns=delay_ns,
        jobs_max=batching.max_queue_size,
        weight=max(1, config.weight),
        priority=config.priority,
    )
    # Thousands of fine-tunes have the same: one of them stays in the cache.
    if len(_known) >= LIMITS_MAX:
        _known.clear()
    return _known.setdefault(limits, limits)


@dataclass(slots=True, eq=False)
class Job:
    """One request in a worker.  `link` names the incarnation of the front end it came from."""

    request_id: int
    slot: int
    link: int
    deadline_ns: int
    taken_ns: int
    in_offset: int = 0
    in_length: int = 0
    out_offset: int = 0
    out_capacity: int = 0
    alone: bool = False
    level: int = 0  # how urgent; 0: it does not say
    order: int = 0  # of arrival in its lane; kept when its batch is put back
    # Filled in when the version is known.
    rows: int = 1
    row_bytes: int = 0
    shape_key: Hashable = None
    form: Form | None = None


Heap = list[tuple[int, int, Job]]  # (deadline_ns, order of arrival, job)


def _first(heap: Heap) -> tuple[int, int]:
    return heap[0][0], heap[0][1]


@dataclass(slots=True, frozen=True)
class Batch:
    """Jobs of one form that run together: of one version, or of some versions of one family."""

    slot: int  # of the lane whose turn it was
    jobs: list[Job]
    others: tuple[tuple[int, list[Job]], ...] = ()  # further slots with their jobs


class Lane:
    """The jobs that wait for one version."""

    __slots__ = ("_arrived", "_shapes", "count", "limits", "only", "rows", "slot", "taken_rows")

    def __init__(self, slot: int, limits: Limits) -> None:
        self.slot = slot
        self.limits = limits
        self.count = 0
        self.rows = 0
        self.taken_rows = 0  # by the last `take` that found jobs
        self.only: Job | None = None  # the one job that waits, while it is in no heap
        self._shapes: dict[Hashable, Heap] = {}
        self._arrived = 0

    def takes(self, job: Job) -> bool:
        """Whether a job may wait here; asked where `limits.wait_ns` says that jobs have a time to wait."""
        job.deadline_ns = min(job.deadline_ns, job.taken_ns + self.limits.wait_ns)
        return True

    def push(self, job: Job) -> None:
        """Queue a job."""
        if not job.order:
            self._arrived += 1
            job.order = self._arrived
        if not self.count:
            self.only = job
            self.count = 1
            self.rows = job.rows
            return
        if self.only is not None:
            self._heaps()
        self._to_heap(job)
        self.count += 1
        self.rows += job.rows

    @property
    def is_full(self) -> bool:
        """Whether enough rows wait for a batch that need not wait for more."""
        return self.rows >= (self.limits.rows_due or self.limits.rows_max)

    def take(self, now_ns: int, expired: list[Job]) -> list[Job]:
        """Take one batch; what is found expired on the way goes to `expired`.  May be empty."""
        only = self.only
        if only is not None:
            jobs = self.take_only(only)
            if only.deadline_ns > now_ns:
                return jobs
            expired += jobs
            return []
        shapes = self._shapes
        while shapes:
            if len(shapes) == 1:
                (key,) = shapes
            else:
                key = min(shapes, key=lambda each: _first(shapes[each]))
                if shapes[key][0][0] <= now_ns:
                    # What is behind one that has expired may be less urgent than another shape's.
                    expired.append(self._pop(shapes[key]))
                    if not shapes[key]:
                        del shapes[key]
                    continue
            jobs = self._take_from(shapes[key], now_ns, expired)
            if not shapes[key]:
                del shapes[key]
            if jobs:
                return jobs
        return []

    def take_like(self, jobs: list[Job], now_ns: int, expired: list[Job]) -> list[Job]:
        """Take what may share a batch with these jobs of another queue, as long as it fits."""
        self._heaps()
        heap = self._shapes.get(jobs[0].shape_key)
        if heap is None:
            return []
        more = self._take_from(heap, now_ns, expired, jobs)
        if not heap:
            del self._shapes[jobs[0].shape_key]
        return more

    def take_only(self, only: Job) -> list[Job]:
        """Take the job that lies beside the heaps."""
        self.only = None
        self.count = self.rows = 0
        self.taken_rows = only.rows
        return [only]

    def expire(self, now_ns: int, expired: list[Job]) -> None:
        """Move every job whose deadline is over to `expired`."""
        for heap in self._heaps():
            while heap and heap[0][0] <= now_ns:
                expired.append(self._pop(heap))
        self._drop_empty()

    def remove(self, gone: Callable[[Job], bool]) -> list[Job]:
        """Take out every job for which `gone` is true.  Linear: cancels and lost links are rare."""
        removed: list[Job] = []
        for heap in self._heaps():
            out = [entry[2] for entry in heap if gone(entry[2])]
            if out:
                heap[:] = [entry for entry in heap if not gone(entry[2])]
                heapq.heapify(heap)
                removed += out
        self.count -= len(removed)
        self.rows -= sum(job.rows for job in removed)
        self._drop_empty()
        return removed

    def jobs(self) -> list[Job]:
        """All jobs that wait, in no order."""
        return [entry[2] for heap in self._heaps() for entry in heap]

    def first_deadline_ns(self) -> int:
        """The earliest deadline; NEVER_NS when the lane is empty."""
        return min((heap[0][0] for heap in self._heaps()), default=NEVER_NS)

    def before(self, job: Job) -> tuple[int, int]:
        """How many jobs, with how many rows, would be run before this one."""
        until_ns = job.deadline_ns
        rows = [e[2].rows for heap in self._heaps() for e in heap if e[0] <= until_ns]
        return len(rows), sum(rows)

    def oldest_ns(self) -> int:
        """When the job was taken that has waited longest; NEVER_NS when the lane is empty."""
        taken = (entry[2].taken_ns for heap in self._heaps() for entry in heap)
        return min(taken, default=NEVER_NS)

    def due_ns(self) -> int:
        """When its queue delay is over: at once when it is full."""
        if self.is_full:
            return 0
        return self.oldest_ns() + self.limits.delay_ns

    def _heaps(self) -> Collection[Heap]:
        """All heaps, with the job that was beside them."""
        if self.only is not None:
            self._to_heap(self.only)
            self.only = None
        return self._shapes.values()

    def _to_heap(self, job: Job) -> None:
        key = ("alone", job.request_id) if job.alone else job.shape_key
        heap = self._shapes.get(key)
        if heap is None:
            heap = self._shapes[key] = []
        heapq.heappush(heap, (job.deadline_ns, job.order, job))

    def _take_from(
        self, heap: Heap, now_ns: int, expired: list[Job], others: Sequence[Job] = ()
    ) -> list[Job]:
        """Take what fits of a heap into one batch; `others` are in it already."""
        jobs: list[Job] = []
        rows = sum([job.rows for job in others])
        widest = max([job.row_bytes for job in others], default=0)
        while heap and len(jobs) + len(others) < BATCH_REQUESTS_MAX:
            job = heap[0][2]
            if job.deadline_ns <= now_ns:
                expired.append(self._pop(heap))
                continue
            grown = rows + job.rows
            widest = max(widest, job.row_bytes)
            if (jobs or others) and (
                grown > self.limits.rows_max or grown * widest > BATCH_BYTES_MAX
            ):
                break
            jobs.append(self._pop(heap))
            rows = grown
        if jobs:
            self.taken_rows = rows
        return jobs

    def _pop(self, heap: Heap) -> Job:
        job = heapq.heappop(heap)[2]
        self.count -= 1
        self.rows -= job.rows
        return job

    def _drop_empty(self) -> None:
        self._shapes = {key: heap for key, heap in self._shapes.items() if heap}
