"""What a front end has counted, per version, since it was taken last.

A request costs one call.  What is known of batches comes with one completion of each
(`runtime/stages.py`), and is counted then.  The table itself is in C (`_counts.c`): with hundreds of
versions in turn the cost of a count is the memory that it touches.

Called by the dispatch for every answer, and once a second for the supervisor.
"""

from __future__ import annotations

import time

from overcommit.runtime.config import VERSIONS_MAX
from overcommit.runtime.front_end_messages import BATCH_UNIT, BatchCounters, ModelCounters
from overcommit.server._counts import Counts


class Tallies:
    """Counts by slot, since they were taken last."""

    def __init__(self) -> None:
        self._counts = Counts(VERSIONS_MAX, BATCH_UNIT)
        # The hot path calls these; `word` 0: another completion speaks for the batch.
        self.count = self._counts.answer
        self.count_batch = self._counts.batch
        # Taken out of the table and not told yet: a message was full.
        self._left: list[tuple[ModelCounters | None, list[BatchCounters]]] = []

    def __bool__(self) -> bool:
        return bool(self._left) or len(self._counts) > 0

    def count_failure(self, slot: int, began_ns: int) -> None:
        """Count a request that got no answer of its model."""
        self._counts.failure(slot, time.monotonic_ns() - began_ns)

    def take(self, limit: int) -> tuple[tuple[ModelCounters, ...], tuple[BatchCounters, ...]]:
        """Return what was counted, `limit` rows of either kind at most, and forget it.

        Both empty: that was all.
        """
        models: list[ModelCounters] = []
        batches: list[BatchCounters] = []
        while len(models) < limit and (row := self._next()) is not None:
            model, sizes = row
            room = limit - len(batches)
            if model is not None:
                models.append(model)
            batches += sizes[:room]
            if len(sizes) > room:
                self._left.append((None, sizes[room:]))
                break
        return tuple(models), tuple(batches)

    def _next(self) -> tuple[ModelCounters | None, list[BatchCounters]] | None:
        if self._left:
            return self._left.pop()
        taken = self._counts.take()
        if taken is None:
            return None
        slot, numbers, sizes = taken
        names = ModelCounters.__struct_fields__[1:]
        model = ModelCounters(slot=slot, **dict(zip(names, numbers, strict=True)))
        return model, [
            BatchCounters(
                slot=slot,
                rows=rows,
                executions=executions,
                input_ns=input_ns,
                infer_ns=infer_ns,
                output_ns=output_ns,
            )
            for rows, executions, input_ns, infer_ns, output_ns in sorted(sizes)
        ]
