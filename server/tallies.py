"""What a front end has counted, per version, since it was taken last.

A request costs its row three additions.  What is known of batches comes with one completion of each
(`runtime/stages.py`), and is counted then.

Called by the dispatch for every answer, and once a second for the supervisor.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

from overcommit.runtime import stages
from overcommit.runtime.front_end_messages import BATCH_UNIT, BatchCounters, ModelCounters


@dataclass(slots=True)
class _Row:
    """One version's counts."""

    success: int = 0
    failure: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    input_ns: int = 0
    output_ns: int = 0
    request_ns: int = 0
    failure_ns: int = 0
    inferences: int = 0
    executions: int = 0
    batches: int = 0
    # By rows: batches of this size, and the time they took to gather, to compute and to split.
    sizes: dict[int, list[int]] = field(default_factory=dict)


class Tallies:
    """Counts by slot, since they were taken last."""

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}

    def __bool__(self) -> bool:
        return bool(self._rows)

    def count(self, slot: int, request_ns: int, queue_ns: int) -> None:
        """Count an answer."""
        row = self._rows.get(slot)
        if row is None:
            row = self._rows[slot] = _Row()
        row.success += 1
        row.queue_ns += queue_ns
        row.request_ns += request_ns

    def count_batch(self, slot: int, compute_ns: int, batch_size: int, word: int) -> None:
        """Count a batch of `batch_size` requests by the word that one of its completions had."""
        row = self._rows.get(slot)
        if row is None:
            row = self._rows[slot] = _Row()
        rows, requests, input_ns, output_ns = stages.unpack(word)
        row.compute_ns += compute_ns * requests
        row.input_ns += input_ns * requests
        row.output_ns += output_ns * requests
        row.inferences += rows
        row.executions += 1
        row.batches += BATCH_UNIT * requests // (batch_size or 1)
        size = row.sizes.get(rows)
        if size is None:
            size = row.sizes[rows] = [0, 0, 0, 0]
        size[0] += 1
        size[1] += input_ns
        size[2] += max(0, compute_ns - input_ns - output_ns)
        size[3] += output_ns

    def count_failure(self, slot: int, began_ns: int) -> None:
        """Count a request that got no answer of its model."""
        row = self._rows.get(slot)
        if row is None:
            row = self._rows[slot] = _Row()
        took_ns = time.monotonic_ns() - began_ns
        row.failure += 1
        row.request_ns += took_ns
        row.failure_ns += took_ns

    def take(self, limit: int) -> tuple[tuple[ModelCounters, ...], tuple[BatchCounters, ...]]:
        """Return what was counted, `limit` rows of either kind at most, and forget it.

        Both empty: that was all.
        """
        models: list[ModelCounters] = []
        batches: list[BatchCounters] = []
        for slot in list(itertools.islice(self._rows, limit)):
            row = self._rows[slot]
            if batches and len(batches) + len(row.sizes) > limit:
                break
            del self._rows[slot]
            models.append(
                ModelCounters(
                    slot=slot,
                    success=row.success,
                    failure=row.failure,
                    queue_ns=row.queue_ns,
                    compute_ns=row.compute_ns,
                    input_ns=row.input_ns,
                    output_ns=row.output_ns,
                    request_ns=row.request_ns,
                    failure_ns=row.failure_ns,
                    inferences=row.inferences,
                    executions=row.executions,
                    batches=row.batches,
                )
            )
            sizes = sorted(row.sizes.items())
            for rows, (count, input_ns, infer_ns, output_ns) in sizes[:limit]:
                batches.append(
                    BatchCounters(
                        slot=slot,
                        rows=rows,
                        executions=count,
                        input_ns=input_ns,
                        infer_ns=infer_ns,
                        output_ns=output_ns,
                    )
                )
            if len(sizes) > limit:
                self._rows[slot] = _Row(sizes=dict(sizes[limit:]))
        return tuple(models), tuple(batches)
