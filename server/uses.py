"""Which versions a front end still has requests for, whatever their routes say by now.

Invariants
 1. A version is used from the moment at which a request may need it until its last block is back: while it
    is received, held, in a ring, run, or sent again; one that an ensemble will come to, from the start.

Asked by the supervisor before it lets go of a version (`runtime/departures.py`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from overcommit.runtime.front_end_messages import AskUsed, Used
from overcommit.server.parcels import Pending


class Uses:
    """`pending` are all requests of the dispatch."""

    def __init__(self, pending: Mapping[int, Pending]) -> None:
        self._pending = pending
        self._kept: Counter[int] = Counter()

    @contextlib.contextmanager
    def keep(self, slots: Collection[int]) -> Iterator[None]:
        """Use these versions while the block runs."""
        self._kept.update(slots)
        try:
            yield
        finally:
            self._kept.subtract(slots)
            for slot in slots:
                if not self._kept[slot]:
                    del self._kept[slot]

    def answer(self, asked: AskUsed) -> Used:
        """Say which of these are used."""
        used = {pending.route.slot for pending in self._pending.values()} | self._kept.keys()
        return Used(id=asked.id, slots=tuple(slot for slot in asked.slots if slot in used))
