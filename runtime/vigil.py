"""How long a worker has not moved, and when that is too long.

Pure: readings of its status page and `now_ns` go in; the fleet warns and kills.

A worker moves when its page names another batch (or bind, or warm-up), and, while it names none, with
each heartbeat: it beats once in HEARTBEAT_NS, also while it sleeps, but not in the middle of a turn.

Invariants
 1. Only time in which somebody looked counts: between two looks at most HEARTBEAT_NS passes here.  A
    supervisor that was stopped, or a whole server that was, finds nobody guilty when it goes on.
 2. A batch may take BATCH_TIMEOUT_S; outside of one a worker moves once in STILL_TIMEOUT_S.
 3. Of a batch that takes long is spoken once, and once of its end.
 4. Who moves is not occupied, and who is stuck was occupied before.

    MOVES --the page is the same for BATCH_SAID_S, in a batch [look]--> LONG, once for each batch
    MOVES --the page is another one, after LONG [look]--> GOES_ON, once
    MOVES --the page is the same for as long as invariant 2 says [look]--> STUCK

Called by the fleet, once a turn for each worker that is ready; `occupied` asks whether it is occupied.
"""

from __future__ import annotations

import enum
from typing import Final

from overcommit.runtime.config import HEARTBEAT_NS
from overcommit.runtime.vigil_limits import (
    BATCH_SAID_S,
    BATCH_TIMEOUT_S,
    OCCUPIED_BATCHES,
    OCCUPIED_BEATS,
    OCCUPIED_S,
    OCCUPIED_S_MAX,
    STILL_TIMEOUT_S,
)

_SAID_NS: Final = int(BATCH_SAID_S * 1e9)
_BATCH_NS: Final = int(BATCH_TIMEOUT_S * 1e9)
_STILL_NS: Final = int(STILL_TIMEOUT_S * 1e9)
_OCCUPIED_NS: Final = int(OCCUPIED_S * 1e9)
_OCCUPIED_NS_MAX: Final = int(OCCUPIED_S_MAX * 1e9)


class Finding(enum.Enum):
    """See the module's diagram."""

    MOVES = enum.auto()
    LONG = enum.auto()
    GOES_ON = enum.auto()
    STUCK = enum.auto()


class Vigil:
    """What was seen of one worker."""

    __slots__ = ("_is_said", "_looked_ns", "_sign", "slot", "still_ns")

    def __init__(self, now_ns: int) -> None:
        self.still_ns = 0  # for so long it has not moved
        self.slot: int | None = None  # whose batch it is in
        self._looked_ns = now_ns
        self._sign = (0, 0)
        self._is_said = False

    def look(self, heartbeat_ns: int, started_ns: int, now_ns: int, slot: int = 0) -> Finding:
        """Take a reading of its page: the last heartbeat, its batch's start (0: none) and slot."""
        self.slot = slot if started_ns else None
        passed_ns = min(now_ns - self._looked_ns, HEARTBEAT_NS)
        self._looked_ns = now_ns
        # With batches on a device its loop goes on, and only the oldest of them tells.
        sign = (started_ns, 0) if started_ns else (0, heartbeat_ns)
        if sign != self._sign:
            was_said, self._is_said = self._is_said, False
            self._sign, self.still_ns = sign, 0
            return Finding.GOES_ON if was_said else Finding.MOVES
        self.still_ns += passed_ns
        if self.still_ns > (_BATCH_NS if started_ns else _STILL_NS):
            return Finding.STUCK
        if started_ns and self.still_ns >= _SAID_NS and not self._is_said:
            self._is_said = True
            return Finding.LONG
        return Finding.MOVES

    def is_occupied(self, usual_ns: int) -> bool:
        """Whether others should get what comes here; the batches of its version take `usual_ns`."""
        if self.slot is None:
            return self.still_ns >= OCCUPIED_BEATS * HEARTBEAT_NS
        limit_ns = max(_OCCUPIED_NS, OCCUPIED_BATCHES * usual_ns)
        return self.still_ns >= min(limit_ns, _OCCUPIED_NS_MAX)
