"""Slots: the small numbers that name versions in shared memory and on the rings.

Invariants
 1. A slot that was taken is given to nobody else before it is given back.
 2. A freed slot is used again last, and never at once, so that late messages do not meet another
    version.

Pure.  Called by the registry.
"""

from __future__ import annotations

import collections
from typing import Final

# Slots that always lie idle, so that even a full registry never uses a freed slot at once.
IDLE_SLOTS: Final = 64


class Slots:
    """The numbers below `slots_max`, each free or taken."""

    def __init__(self, slots_max: int) -> None:
        self._slots_max = slots_max
        self._fresh = 0
        self._free: collections.deque[int] = collections.deque()

    @property
    def versions_max(self) -> int:
        """How many can be taken at the same time, whatever was freed before."""
        return self._slots_max - IDLE_SLOTS

    def take(self) -> int | None:
        """Return a slot that is free; None: the limit is reached."""
        if self._fresh < self._slots_max:
            self._fresh += 1
            return self._fresh - 1
        return self._free.popleft() if len(self._free) > IDLE_SLOTS else None

    def give_back(self, slot: int) -> None:
        """Nobody uses the slot any more."""
        self._free.append(slot)
