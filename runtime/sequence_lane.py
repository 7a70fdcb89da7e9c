"""A worker's queue for a version with sequences.

To the batcher it is a lane like any other; which of its jobs may run together is a matter of `sequences`.

Invariants
 1. A batch holds one request of each of its sequences, all of one shape and one group, at most as many
    as the version has slots or `max_batch_size` allows.
 2. The lane is due when a sequence with a slot has a request, or when one that is idle may lose its slot
    to one that waits.

Called by the batcher alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from overcommit.runtime.config import NEVER_NS, SEQUENCE_REFUSAL_NS, ModelConfig
from overcommit.runtime.lanes import (
    BATCH_BYTES_MAX,
    BATCH_REQUESTS_MAX,
    Job,
    Lane,
    Limits,
)
from overcommit.runtime.sequences import NO_SLOT, Run, Sequences, ask_of


class SequenceLane(Lane):
    """The jobs that wait for one version; `only` is never used."""

    __slots__ = ("_full_rows", "_is_direct", "_sequences")

    def __init__(
        self, slot: int, limits: Limits, sequences: Sequences, *, full_rows: int, is_direct: bool
    ) -> None:
        """`full_rows`: from so many requests on, none waits for more."""
        super().__init__(slot, limits)
        self._sequences = sequences
        self._full_rows = full_rows
        self._is_direct = is_direct

    def push(self, job: Job) -> None:
        """Queue a job."""
        sequences = self._sequences
        sequences.push(job)
        run = sequences.run_at(ask_of(job).key)
        if run is not None and run.slot == NO_SLOT:
            # Told before its time is over, it hears why; afterwards the front end has answered.
            left_ns = max(0, job.deadline_ns - job.taken_ns)
            job.deadline_ns -= min(SEQUENCE_REFUSAL_NS, left_ns // 4)
        self._count()

    @property
    def is_full(self) -> bool:
        """Whether there is something to run that need not wait for more."""
        sequences = self._sequences
        return sequences.ready_count > 0 and (
            not self._delay_ns or sequences.has_waiting or sequences.ready_count >= self._full_rows
        )

    def due_ns(self) -> int:
        """When there is something to run."""
        if self.is_full:
            return 0
        ready = self._sequences.ready()
        if ready:
            return ready[0].jobs[0].taken_ns + self._delay_ns
        return self._sequences.idle_at_ns()

    def take(self, now_ns: int, expired: list[Job]) -> list[Job]:
        """Take one batch; what is found expired on the way goes to `expired`.  May be empty."""
        sequences = self._sequences
        sequences.expire_idle(now_ns)
        if any(run.jobs[0].deadline_ns <= now_ns for run in sequences.ready()):
            self.expire(now_ns, expired)
        again = sequences.next_again()
        jobs = [again] if again is not None else [sequences.take(run) for run in self._choose()]
        self.taken_rows = self._rows(jobs)
        self._count()
        return jobs

    def expire(self, now_ns: int, expired: list[Job]) -> None:
        """Move every job whose time is over to `expired`."""
        expired += self._sequences.expire(now_ns)
        self._count()

    def remove(self, gone: Callable[[Job], bool]) -> list[Job]:
        """Take out every job for which `gone` is true."""
        removed = self._sequences.remove(gone)
        self._count()
        return removed

    def jobs(self) -> list[Job]:
        """All jobs that wait, in no order."""
        return list(self._sequences.jobs())

    def first_deadline_ns(self) -> int:
        """The earliest deadline; NEVER_NS when the lane is empty."""
        return min((job.deadline_ns for job in self._sequences.jobs()), default=NEVER_NS)

    def before(self, job: Job) -> tuple[int, int]:
        """How many jobs, with how many rows, would be run before this one, as far as it is known."""
        before = sum(other.deadline_ns <= job.deadline_ns for other in self._sequences.jobs())
        return before, before

    def oldest_ns(self) -> int:
        """When the job was taken that has waited longest; NEVER_NS when the lane is empty."""
        return min((job.taken_ns for job in self._sequences.jobs()), default=NEVER_NS)

    # --- inside ---------------------------------------------------------------------------------
    @property
    def _delay_ns(self) -> int:
        return self.limits.delay_ns - 1  # a lane without any is not asked when it is due

    def _choose(self) -> list[Run]:
        """Runs whose next requests may share a batch, the one that has waited longest among them."""
        chosen: list[Run] = []
        highest = widest = 0
        for run in self._sequences.ready():
            job, first = run.jobs[0], chosen[0].jobs[0] if chosen else None
            if first is not None and (
                job.alone or job.shape_key != first.shape_key or run.group != chosen[0].group
            ):
                continue
            rows = max(highest, run.slot + 1) if self._is_direct else len(chosen) + 1
            if chosen and rows * max(widest, job.row_bytes) > BATCH_BYTES_MAX:
                continue
            chosen.append(run)
            highest, widest = rows, max(widest, job.row_bytes)
            if job.alone or len(chosen) >= min(self.limits.rows_max, BATCH_REQUESTS_MAX):
                break
        return chosen

    def _rows(self, jobs: list[Job]) -> int:
        if not self._is_direct:
            return len(jobs)
        runs = [self._sequences.run_of(job) for job in jobs]
        return max([1, *(run.slot + 1 for run in runs if run is not None)])

    def _count(self) -> None:
        self.count = self.rows = self._sequences.count


def lane_of(slot: int, limits: Limits, config: ModelConfig, sequences: Sequences) -> SequenceLane:
    """Make the lane of a version with sequences."""
    sequence = config.sequence
    assert sequence is not None, "a version with sequences"
    is_direct = sequence.strategy == "direct"
    full_rows = max(1, math.ceil(sequence.utilization * sequences.slots))
    return SequenceLane(
        *(slot, limits, sequences),
        full_rows=full_rows if is_direct else limits.rows_due,
        is_direct=is_direct,
    )
