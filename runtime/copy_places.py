"""Places for what is in flight to the GPU: few, and prefetches never take the last ones.

    FREE --[take]--> TAKEN --[give]--> FREE

Invariants
 1. Prefetches have PREFETCH_COPIES_IN_FLIGHT places at most, and get none while a foreground copy
    waits for one.

Used by the CUDA copiers, from the mover's threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Generic, TypeVar

from overcommit.runtime.mover_messages import Urgency
from overcommit.runtime.prefetch_limits import PREFETCH_COPIES_IN_FLIGHT

Place = TypeVar("Place")


class CopyPlaces(Generic[Place]):
    """Hands out these places."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._free = list(places)
        self._changed = threading.Condition()
        self._prefetching = 0  # places that prefetches have
        self._waiting = 0  # foreground copies that wait for a place

    def take(self, urgency: Urgency, *, may_wait: bool) -> Place | None:
        """Take a place; None: there is none now, and the caller will not wait."""
        with self._changed:
            while not self._is_free(urgency):
                if not may_wait:
                    return None
                is_foreground = urgency == "foreground"
                self._waiting += is_foreground
                self._changed.wait()
                self._waiting -= is_foreground
            self._prefetching += urgency == "prefetch"
            return self._free.pop()

    def give(self, place: Place, urgency: Urgency) -> None:
        """Give a place back."""
        with self._changed:
            self._free.append(place)
            self._prefetching -= urgency == "prefetch"
            self._changed.notify_all()

    def _is_free(self, urgency: Urgency) -> bool:
        if urgency == "foreground":
            return bool(self._free)
        is_under = self._prefetching < PREFETCH_COPIES_IN_FLIGHT
        return bool(self._free) and is_under and not self._waiting
