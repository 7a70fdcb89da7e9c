"""What a front end has counted, per version, since it began.

Called by the dispatch for every answer, and once a second for the supervisor.
"""

from __future__ import annotations

import itertools
import time

from overcommit.runtime.messages import BATCH_UNIT, ModelCounters


class Tallies:
    """Counts by slot, since they were taken last."""

    def __init__(self) -> None:
        # success, failure, queue, compute, request (ns), batches (1 / BATCH_UNIT)
        self._rows: dict[int, list[int]] = {}

    def count(self, slot: int, request_ns: int, queue_ns: int, compute_ns: int, batch: int) -> None:
        """Count an answer."""
        row = self._rows.get(slot)
        if row is None:
            row = self._rows[slot] = [0] * 6
        row[0] += 1
        row[2] += queue_ns
        row[3] += compute_ns
        row[4] += request_ns
        row[5] += BATCH_UNIT // (batch or 1)

    def count_failure(self, slot: int, began_ns: int) -> None:
        """Count a request that got no answer of its model."""
        row = self._rows.setdefault(slot, [0] * 6)
        row[1] += 1
        row[4] += time.monotonic_ns() - began_ns

    def take(self, limit: int) -> tuple[ModelCounters, ...]:
        """Return what was counted for some versions, and forget it; empty: that was all."""
        slots = list(itertools.islice(self._rows, limit))
        rows = [(slot, self._rows.pop(slot)) for slot in slots]
        return tuple(
            ModelCounters(
                slot=slot,
                success=row[0],
                failure=row[1],
                queue_ns=row[2],
                compute_ns=row[3],
                request_ns=row[4],
                batches=row[5],
            )
            for slot, row in rows
        )
