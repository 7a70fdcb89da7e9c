"""Which version leaves first.

A policy ranks versions; it holds no memory and evicts nothing.  Residency tells it what happens and
asks for an order; leases, pins and queues are residency's business.

Invariants
 1. Only slots that were added and not removed are ever ranked; what a policy knows of a version
    survives its eviction and ends with its removal.
 2. The order is a function of the calls so far: no clock, no randomness, no hash order.
 3. `victims` is lazy.  Use counters live in shared memory and nobody is told of a request, so what
    a policy knows of a use is old.  The caller looks at each slot it is given, and may call
    `on_use` before it asks for the next: a slot whose rank that changed is given again in its
    new place.  So the order is exact, and only the versions that come up are looked at.

Called by residency and its rooms.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from overcommit.runtime.errors import ConfigurationError


class Policy(Protocol):
    """Ranks versions by how little it would cost to lose them from DEVICE."""

    def on_add(self, slot: int, nbytes: int, priority: int) -> None:
        """A version may be loaded from now on; again with another priority: that one counts."""

    def on_use(self, slot: int, uses: int, now_ns: int) -> None:
        """It has run this many requests in all, the last one at `now_ns`."""

    def on_load(self, slot: int, load_ns: int) -> None:
        """It came to DEVICE, and that took so long."""

    def on_evict(self, slot: int) -> None:
        """It left DEVICE to make room; its host copy may stay."""

    def on_remove(self, slot: int) -> None:
        """It is served no more."""

    def victims(self, candidates: Iterable[int], now_ns: int) -> Iterator[int]:
        """Return the candidates in the order in which they should leave; see invariant 3."""
        ...


def lazily_ordered(
    candidates: Iterable[int], rank: Callable[[int], tuple[Any, ...]]
) -> Iterator[int]:
    """Yield candidates by ascending rank; one whose rank grew since comes again at its new place.

    A heap rather than a sort: the caller mostly stops after a few.
    """
    heap = [(rank(slot), slot) for slot in candidates]
    heapq.heapify(heap)
    while heap:
        ranked, slot = heapq.heappop(heap)
        if rank(slot) == ranked:
            yield slot
        if (now := rank(slot)) != ranked:
            heapq.heappush(heap, (now, slot))


@dataclass(slots=True)
class _Known:
    priority: int
    last_used_ns: int = 0
    uses: int = 0


class Lru:
    """Least recently used first, within the lowest priority."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def on_add(self, slot: int, nbytes: int, priority: int) -> None:
        """Know the version; an earlier use of the slot is kept if it was not removed since."""
        known = self._known.setdefault(slot, _Known(priority))
        known.priority = priority

    def on_use(self, slot: int, uses: int, now_ns: int) -> None:
        """Make it the most recent; time never goes back."""
        known = self._known[slot]
        known.last_used_ns = max(known.last_used_ns, now_ns)
        known.uses = uses

    def on_load(self, slot: int, load_ns: int) -> None:
        """Do nothing: recency does not care what a load costs."""

    def on_evict(self, slot: int) -> None:
        """Do nothing: the host tier is ranked by the same recency."""

    def on_remove(self, slot: int) -> None:
        """Forget the version."""
        self._known.pop(slot, None)

    def victims(self, candidates: Iterable[int], now_ns: int) -> Iterator[int]:
        """Return them by priority, then by last use; uses and slot only break ties."""
        return lazily_ordered(candidates, self._rank)

    def _rank(self, slot: int) -> tuple[int, int, int]:
        known = self._known[slot]
        return known.priority, known.last_used_ns, known.uses


POLICIES: dict[str, Callable[[], Policy]] = {"lru": Lru}


def make_policy(name: str) -> Policy:
    """Return a fresh policy; ConfigurationError if there is none of this name."""
    factory = POLICIES.get(name)
    if factory is None:
        known = ", ".join(sorted(POLICIES))
        raise ConfigurationError(f"unknown eviction policy '{name}'; choose one of: {known}")
    return factory()
