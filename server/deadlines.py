"""Deadlines of many requests, swept coarsely.

A request lives for milliseconds and its deadline lies a minute ahead, so nearly every deadline is
taken back.  A heap of requests would keep 10^6 dead entries at 20,000 requests/s; here a bucket is a
set of requests that end in the same 50 ms, an entry leaves its set when it is done, and the heap
holds buckets only.

Invariants
 1. What was added is either removed or expired, once.
 2. Nothing expires before its deadline; it expires at most one sweep plus one bucket later.

Pure; called by the front end's loop.
"""

from __future__ import annotations

import heapq
from typing import Final, Protocol

from overcommit.server.limits import SWEEP_S

BUCKET_NS: Final = int(SWEEP_S * 1e9)


class Timed(Protocol):
    """Something with a deadline; hashed by identity."""

    deadline_ns: int


class Deadlines:
    """A set of timed things, ordered by bucket."""

    def __init__(self) -> None:
        self._buckets: dict[int, set[Timed]] = {}
        self._keys: list[int] = []

    def add(self, item: Timed) -> None:
        """Watch this item."""
        key = item.deadline_ns // BUCKET_NS
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = set()
            heapq.heappush(self._keys, key)
        bucket.add(item)

    def remove(self, item: Timed) -> None:
        """Watch it no more; nothing happens if it was not watched."""
        bucket = self._buckets.get(item.deadline_ns // BUCKET_NS)
        if bucket is not None:
            bucket.discard(item)

    def expire(self, now_ns: int) -> list[Timed]:
        """Take everything whose time is over."""
        expired: list[Timed] = []
        while self._keys and (self._keys[0] + 1) * BUCKET_NS <= now_ns:
            expired.extend(self._buckets.pop(heapq.heappop(self._keys)))
        return expired

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self._buckets.values())
