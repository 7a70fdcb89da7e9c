"""Requests that are held back, because no worker can take them at the moment.

A worker's lanes are where requests wait: batches form there, and the most urgent go first.  But what is
lent to a worker takes a place in its ring, and what one model has there others lack.  So a version may
have as many requests at a worker as places are free there: one that is flooded leaves half of them to
others, two leave a third.  What is beyond that waits here, and is handed over as places come free.

A queue holds what is for one version, of a model with state what is for one seat's worker.

Invariants
 1. Of a queue, the most urgent level goes first; within a level, whoever came first.
 2. Queues have turns: each gives one request, then the others do.
 3. A version has at most so many requests, here and at workers, as its `max_queue_size` says, and all
    of them HELD_REQUESTS_MAX here.

Called by the dispatch, which asks for nothing here while all requests find a place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from overcommit.runtime.errors import Overloaded
from overcommit.runtime.lanes import LEVEL_SHIFT
from overcommit.server import failures
from overcommit.server.limits import HELD_REQUESTS_MAX

if TYPE_CHECKING:
    from overcommit.server.parcels import Pending

Where = tuple[int, int]  # slot, and the seat of a sequence's worker; -1: any worker's


@dataclass(slots=True)
class _Queue:
    since_ns: int
    requests: dict[int, Pending] = field(default_factory=dict)
    given: int = 0  # since then

    def first(self) -> Pending:
        """The one that goes next."""
        levels = next(iter(self.requests.values())).route.priority_levels
        if not levels:
            return next(iter(self.requests.values()))
        return min(self.requests.values(), key=lambda each: each.flags >> LEVEL_SHIFT or levels)


class Held:
    """All requests that are held by one front end."""

    def __init__(self) -> None:
        self._queues: dict[Where, _Queue] = {}  # whose turn it is comes first
        self._where: dict[int, Where] = {}  # by request
        self._counts: dict[int, int] = {}  # by slot

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, where: Where) -> bool:
        return where in self._queues

    def add(self, where: Where, pending: Pending, lent: int) -> Overloaded | None:
        """Hold a request, of whose version so many are at workers; or say why it cannot wait."""
        route, slot = pending.route, where[0]
        count = self._counts.get(slot, 0)
        queue = self._queues.get(where)
        is_full = lent + count >= route.max_queue_size
        if is_full or len(self._where) >= HELD_REQUESTS_MAX:
            limit = route.max_queue_size if is_full else HELD_REQUESTS_MAX
            room_s = 0.0
            if queue is not None:
                room_s = (time.monotonic_ns() - queue.since_ns) / 1e9 / max(1, queue.given)
            return failures.queue_full(route.name, limit, room_s, is_own=is_full)
        if queue is None:
            queue = self._queues[where] = _Queue(time.monotonic_ns())
        queue.requests[pending.request_id] = pending
        self._where[pending.request_id] = where
        self._counts[slot] = count + 1
        return None

    def discard(self, request_id: int) -> None:
        """Hold this request no longer, if it is held."""
        where = self._where.pop(request_id, None)
        if where is None:
            return
        queue, slot = self._queues[where], where[0]
        del queue.requests[request_id]
        if not queue.requests:
            del self._queues[where]
        self._counts[slot] -= 1
        if not self._counts[slot]:
            del self._counts[slot]

    def take(self, find: Callable[[Pending], int | None]) -> tuple[Pending, int] | None:
        """Take the next request for which `find` has a worker, and that; None: there is none."""
        for where, queue in self._queues.items():
            pending = queue.first()
            worker = find(pending)
            if worker is not None:
                queue.given += 1
                self.discard(pending.request_id)
                if queue.requests:
                    self._queues[where] = self._queues.pop(where)
                return pending, worker
        return None

    def take_all(self) -> list[Pending]:
        """Take every request, in order."""
        held = [each for queue in self._queues.values() for each in queue.requests.values()]
        self._queues.clear()
        self._where.clear()
        self._counts.clear()
        return held
