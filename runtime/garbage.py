"""When a worker looks for garbage, and at how much of it.

CPython's collector would run in the middle of a batch, and look at every object there is: with 500
bound models that takes 75 ms.  So it is off in a worker, and is asked here, between batches: as a rule
for young objects alone, which are few since the last look.  Cycles that were old when they died, such
as a released model's, wait for a look at everything.

Invariants
 1. It is looked at least every BUSY_NS, idle or not.
 2. Everything is looked at once RELEASED_MAX models were let go of, or after ALL_NS when idle.

Called by the worker's loop.
"""

from __future__ import annotations

import gc
from typing import Final

IDLE_NS: Final = 1_000_000_000  # between looks, when idle
BUSY_NS: Final = 10_000_000_000  # when never idle
ALL_NS: Final = 600_000_000_000
RELEASED_MAX: Final = 256
_YOUNG: Final = 1  # what survives is old


class Garbage:
    """The collector of this process, if its automatic runs are off."""

    def __init__(self, now_ns: int) -> None:
        self._looked_ns = 0
        self._looked_at_all_ns = now_ns
        self._released = 0  # models let go of, ever, as of the last look at everything

    def take_over(self) -> None:
        """Keep what is there for good, and collect only when asked."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def look_if_due(self, now_ns: int, released: int, *, is_idle: bool) -> bool:
        """Collect, if it is time; `released` is how many models were let go of, ever."""
        if now_ns - self._looked_ns < (IDLE_NS if is_idle else BUSY_NS) or not gc.get_count()[0]:
            return False
        self._looked_ns = now_ns
        if gc.isenabled():
            return False
        is_old = is_idle and now_ns - self._looked_at_all_ns >= ALL_NS
        if is_old or released - self._released >= RELEASED_MAX:
            self._looked_at_all_ns, self._released = now_ns, released
            gc.collect()
        else:
            gc.collect(_YOUNG)
        return True
