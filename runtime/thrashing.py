"""Whether models push each other out of DEVICE faster than they are used, and for how long to stay.

Looked at once a second, over a window of WINDOW seconds.  Three things come together when a server
thrashes: the models in use need more bytes than DEVICE has; some load is in flight most of the time;
and a load is worth few requests before its model is pushed out again.  Any one alone is harmless: a
start loads all the time, a long tail of rare models is larger than any memory, a load may be for one
request.

    CALM -> THRASHING    [take: all three hold, BEGIN times in a row]
    THRASHING -> CALM    [take: one of them has clearly ended, END times in a row]

While it thrashes, what was loaded should stay for a while: a few times as long as a load takes, so that
loading is not all that is done; but never so long that more than half of DEVICE would be held.

Invariants
 1. The state changes at most once in BEGIN looks; the bounds to begin and to end are apart.
 2. `stay_ns` is 0 while calm, and at most STAY_NS_MAX.

Pure.  Called by pressure.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

WINDOW: Final = 5
BEGIN: Final = 2
END: Final = 3
LOADS_MIN: Final = 10  # in the window; fewer are an incident
BUSY_BEGIN: Final = 0.5
BUSY_END: Final = 0.25
USES_BEGIN: Final = 8.0  # requests for each load of a model
USES_END: Final = 16.0
FITS: Final = 0.9  # of DEVICE: a working set below it has room
STAY_LOADS: Final = 4.0  # a version stays as long as so many loads take
STAY_NS_MAX: Final = 500_000_000
HELD_MAX: Final = 0.5  # of DEVICE that may be held by versions that stay


@dataclass(slots=True, frozen=True)
class Load:
    """A version came to DEVICE."""

    slot: int
    nbytes: int
    load_ns: int


@dataclass(slots=True, frozen=True)
class Look:
    """What was seen at one instant; `busy_ns` and `uses` count from the start."""

    at_ns: int
    busy_ns: int  # with a load in flight
    loads: tuple[Load, ...]  # since the look before
    uses: dict[int, int]  # requests run, by slot: of what is on DEVICE or was loaded


@dataclass(slots=True, frozen=True)
class Reading:
    """What the window says."""

    is_thrashing: bool = False
    since_ns: int = 0
    working_set_bytes: int = 0
    memory_bytes: int = 0
    loads_per_s: float = 0.0
    busy_share: float = 0.0
    uses_per_load: float = 0.0
    stay_ns: int = 0


class Thrashing:
    """See the module."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._looks: collections.deque[Look] = collections.deque(maxlen=WINDOW + 1)
        self._in_a_row = 0  # looks that speak against the present state
        self.reading = Reading(memory_bytes=memory_bytes)

    def take(self, look: Look, unique_bytes: Callable[[Collection[int]], int]) -> Reading:
        """Take one look and judge; `unique_bytes` says what versions weigh together."""
        self._looks.append(look)
        first = self._looks[0]
        span_ns = look.at_ns - first.at_ns
        if span_ns <= 0:
            return self.reading
        loads = [load for each in list(self._looks)[1:] for load in each.loads]
        used = {slot: now - self._before(slot, now) for slot, now in look.uses.items()}
        loaded = {load.slot for load in loads}
        wanted = loaded | {slot for slot, uses in used.items() if uses > 0}
        working_set = unique_bytes(wanted)
        busy = (look.busy_ns - first.busy_ns) / span_ns
        each = sum(max(0, used.get(slot, 0)) for slot in loaded) / len(loads) if loads else 0.0
        is_over = working_set > self._memory_bytes
        if self.reading.is_thrashing:
            calms = working_set <= FITS * self._memory_bytes or busy < BUSY_END or each > USES_END
            self._in_a_row = self._in_a_row + 1 if calms else 0
            turns = self._in_a_row >= END
        else:
            stirs = is_over and busy >= BUSY_BEGIN and each < USES_BEGIN and len(loads) >= LOADS_MIN
            self._in_a_row = self._in_a_row + 1 if stirs else 0
            turns = self._in_a_row >= BEGIN
        is_thrashing = self.reading.is_thrashing != turns
        if turns:
            self._in_a_row = 0
        self.reading = Reading(
            is_thrashing=is_thrashing,
            since_ns=look.at_ns if turns else self.reading.since_ns,
            working_set_bytes=working_set,
            memory_bytes=self._memory_bytes,
            loads_per_s=len(loads) * 1e9 / span_ns,
            busy_share=busy,
            uses_per_load=each,
            stay_ns=self._stay_ns(loads, span_ns) if is_thrashing else 0,
        )
        return self.reading

    def _before(self, slot: int, now: int) -> int:
        """What the slot had run at the window's start, or when it was first seen."""
        for look in self._looks:
            if slot in look.uses:
                return min(now, look.uses[slot])
        return now

    def _stay_ns(self, loads: list[Load], span_ns: int) -> int:
        if not loads:
            return 0
        wished = STAY_LOADS * sum(load.load_ns for load in loads) / len(loads)
        per_ns = sum(load.nbytes for load in loads) / span_ns
        bearable = HELD_MAX * self._memory_bytes / per_ns if per_ns else wished
        return int(min(wished, bearable, STAY_NS_MAX))
