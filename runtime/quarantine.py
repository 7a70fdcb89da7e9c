"""Versions that kill workers, kept away from them for a while.

Pure: time comes in as `now_ns`.  One death proves nothing (the out-of-memory killer, an operator),
so a version is blocked only when several workers died while they ran it.

Invariants
 1. A version is blocked after QUARANTINE_DEATHS deaths within RESTART_WINDOW_S, for QUARANTINE_S;
    each further time for twice as long, at most QUARANTINE_S_MAX.
 2. A version that neither was blocked nor killed a worker for RESTART_WINDOW_S has a clean record.
 3. Deaths of one version never count for another: a slot is forgotten before it is used again.

Called by the supervisor's activations: `on_worker_died`, `blocked`, `forget`.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Final

from overcommit.runtime.config import (
    QUARANTINE_DEATHS,
    QUARANTINE_S,
    RESTART_WINDOW_S,
    SUSPECTS_KEPT,
)

QUARANTINE_S_MAX: Final = 600.0
_WINDOW_NS: Final = int(RESTART_WINDOW_S * 1e9)


@dataclass(slots=True)
class _Record:
    deaths_ns: list[int] = field(default_factory=list)  # since it was last blocked, in the window
    times_blocked: int = 0
    until_ns: int = 0  # blocked before this
    last_ns: int = 0  # latest death


class Quarantine:
    """Who is blocked, and for how long."""

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}
        # Requests that were running when a worker died, of late.
        self.suspects: collections.deque[int] = collections.deque(maxlen=SUSPECTS_KEPT)

    def on_worker_died(self, slot: int, now_ns: int) -> None:
        """A worker died while it ran this version."""
        self._expire(slot, now_ns)
        record = self._records.setdefault(slot, _Record())
        record.last_ns = now_ns
        record.deaths_ns = [at for at in record.deaths_ns if now_ns - at <= _WINDOW_NS]
        record.deaths_ns.append(now_ns)
        if len(record.deaths_ns) >= QUARANTINE_DEATHS:
            seconds = min(QUARANTINE_S * 2**record.times_blocked, QUARANTINE_S_MAX)
            record.until_ns = max(record.until_ns, now_ns + int(seconds * 1e9))
            record.times_blocked += 1
            record.deaths_ns.clear()

    def blocked(self, slot: int, now_ns: int) -> float | None:
        """Return the seconds for which the version is still blocked, None if it may run."""
        record = self._records.get(slot)
        if record is None:
            return None
        if now_ns < record.until_ns:
            return (record.until_ns - now_ns) / 1e9
        self._expire(slot, now_ns)
        return None

    def forget(self, slot: int) -> None:
        """The version is gone, and another may get its slot."""
        self._records.pop(slot, None)

    def _expire(self, slot: int, now_ns: int) -> None:
        record = self._records.get(slot)
        if record is not None and now_ns - max(record.until_ns, record.last_ns) > _WINDOW_NS:
            del self._records[slot]
