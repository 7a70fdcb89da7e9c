"""Giving DEVICE back when a version was not used for long, where its `ttl` asks for that.

Off unless a version has a ttl: while memory is free, unloading what is idle only adds loads.

Invariants
 1. A version is let go at the earliest `ttl_ns` after its last use and its publish, and only if
    nobody runs it or waits for it; a pinned one never.
 2. Uses are counted in shared memory and nobody is told of them: so a version is looked at when its
    time is up by what was known, and put off if it was used since.  Looks cost log n, and there are
    at most 1 / ttl of them a second for each version.

Called by residency; pure.
"""

from __future__ import annotations

import heapq
from typing import Final

from overcommit.runtime.device_room import DeviceRoom
from overcommit.runtime.residents import Port, State, Totals, Version

AGAIN_NS: Final = 1_000_000_000  # until the next look at one that is in use


class IdleClock:
    """When to look at whom."""

    def __init__(self, room: DeviceRoom, totals: Totals, port: Port) -> None:
        self._room = room
        self._totals = totals
        self._port = port
        self._due: dict[int, tuple[int, Version]] = {}  # slot -> when, whom
        self._heap: list[tuple[int, int]] = []  # (when, slot); stale ones too

    def __len__(self) -> int:
        return len(self._due)

    def watch(self, version: Version, now_ns: int) -> None:
        """It came to DEVICE, or its ttl was changed."""
        self._due.pop(version.slot, None)
        if version.terms.ttl_ns and not version.pinned and version.state is State.DEVICE:
            self._put(version, now_ns + version.terms.ttl_ns)

    def next_ns(self) -> int | None:
        """Return when `expire` is due."""
        self._drop_stale()
        return self._heap[0][0] if self._heap else None

    def expire(self, now_ns: int) -> None:
        """Let go whoever was idle for its ttl."""
        self._drop_stale()
        while self._heap and self._heap[0][0] <= now_ns:
            _, slot = heapq.heappop(self._heap)
            _, version = self._due.pop(slot)
            self._look_at(version, now_ns)
            self._drop_stale()

    # --- inside ---------------------------------------------------------------------------------
    def _look_at(self, version: Version, now_ns: int) -> None:
        used_ns = max(self._port.usage(version.slot).last_used_ns, version.published_ns)
        if now_ns - used_ns < version.terms.ttl_ns:
            self._put(version, used_ns + version.terms.ttl_ns)
        elif self._room.try_expire(version, now_ns):
            self._totals.expiries += 1
        else:
            self._put(version, now_ns + AGAIN_NS)

    def _put(self, version: Version, at_ns: int) -> None:
        self._due[version.slot] = (at_ns, version)
        heapq.heappush(self._heap, (at_ns, version.slot))
        if len(self._heap) > 2 * len(self._due) + 64:
            self._heap = sorted((at_ns, slot) for slot, (at_ns, _) in self._due.items())

    def _drop_stale(self) -> None:
        while self._heap:
            at_ns, slot = self._heap[0]
            due_ns, version = self._due.get(slot, (None, None))
            if version is not None and due_ns == at_ns:
                if version.state is State.DEVICE and not version.is_leaving:
                    return
                del self._due[slot]
            heapq.heappop(self._heap)
