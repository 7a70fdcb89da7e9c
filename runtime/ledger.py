"""What was counted for each version, summed over all front ends, and which of them metrics show.

Front ends send increments, so a message holds what was asked for in the last second, however many
versions there are.  Metrics show the versions with the most requests, each as series of its own; what is
counted for a version while it is not shown goes into one aggregate, the rest.

Invariants
 1. Every increment is counted once: in its version's series if it is shown, else in the rest.  So the
    sum of all rates is right, whoever is shown.
 2. The rest never shrinks, and neither does a version's own count while it is shown or hidden; a
    version that becomes shown starts with all that it ever counted.
 3. Nothing is kept of a version that was never asked for.

Pure.  Called by administration and metrics.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Final

from overcommit.runtime.front_end_messages import BatchCounters, ModelCounters

FIELDS: Final = ModelCounters.__struct_fields__[1:]
_SUCCESS: Final = FIELDS.index("success")
_COMPUTE: Final = FIELDS.index("compute_ns")
# Of the batches of one size: how many, and the time in which they were gathered, computed and split.
BatchRow = tuple[int, int, int, int]


class Ledger:
    """Rows of counts in the order of FIELDS; at most `shown_max` versions are shown."""

    def __init__(self, shown_max: int) -> None:
        self._shown_max = shown_max
        self._rows: dict[int, list[int]] = {}
        self._batches: dict[int, dict[int, BatchRow]] = {}  # by slot, then by rows
        self._shown: set[int] = set()
        self._rest = [0] * len(FIELDS)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, increments: Iterable[ModelCounters]) -> None:
        """Count what a front end has counted since it said so last."""
        for more in increments:
            row = self._rows.get(more.slot)
            if row is None:
                row = self._rows[more.slot] = [0] * len(FIELDS)
                if len(self._shown) < self._shown_max:
                    self._shown.add(more.slot)
            is_hidden = more.slot not in self._shown
            for at, name in enumerate(FIELDS):
                value = getattr(more, name)
                row[at] += value
                if is_hidden:
                    self._rest[at] += value

    def add_batches(self, increments: Iterable[BatchCounters]) -> None:
        """Count batches by their size."""
        for more in increments:
            sizes = self._batches.setdefault(more.slot, {})
            old = sizes.get(more.rows, (0, 0, 0, 0))
            new = (more.executions, more.input_ns, more.infer_ns, more.output_ns)
            sizes[more.rows] = (old[0] + new[0], old[1] + new[1], old[2] + new[2], old[3] + new[3])

    def forget(self, slot: int) -> None:
        """The version is gone, and the slot is for another one."""
        self._rows.pop(slot, None)
        self._batches.pop(slot, None)
        self._shown.discard(slot)

    def get(self, slot: int) -> tuple[int, ...]:
        """Return a version's counts."""
        return tuple(self._rows.get(slot, (0,) * len(FIELDS)))

    def batches(self, slot: int) -> dict[int, BatchRow]:
        """Return a version's batches by their rows, the smallest first."""
        return dict(sorted(self._batches.get(slot, {}).items()))

    def requests(self, slot: int) -> int:
        """How many requests for a version were answered, errors included."""
        row = self._rows.get(slot)
        return row[0] + row[1] if row is not None else 0

    def usual_ns(self, slot: int) -> int:
        """How long the batches of a version take that answer its requests, by their mean; 0: unknown."""
        row = self._rows.get(slot)
        return row[_COMPUTE] // row[_SUCCESS] if row is not None and row[_SUCCESS] else 0

    def shown(self) -> list[int]:
        """Choose the versions with the most requests anew; return their slots, most asked first."""
        best = heapq.nlargest(self._shown_max, self._rows, key=self.requests)
        self._shown = set(best)
        return best

    def rest(self) -> tuple[int, ...]:
        """What was counted for versions while they were not shown."""
        return tuple(self._rest)
