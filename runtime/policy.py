"""Which version leaves first.

A policy ranks the versions of one tier; it holds no memory and evicts nothing.  Residency tells it
what happens; leases, pins and queues are residency's business.  An order keeps a tier's holders.

Invariants
 1. Only slots that were added and not removed are ever ranked; what a policy knows of a version
    survives its eviction and ends with its removal.
 2. A rank is a function of the calls so far: no clock, no randomness, no hash order.  A slot's rank
    changes only by a call for that slot, and grows unless it is added anew, with a lower priority.
 3. Use counters live in shared memory and nobody is told of a request, so what a policy knows of a
    use is old.  Whoever takes a slot from an order looks at the counters and may call `on_use`: a
    slot whose rank grew comes again in its new place.  So the order is exact, and only the versions
    that come up are looked at: log n for a victim, with 20,000 versions in the tier.

Called by residency and its rooms.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from overcommit.runtime.config import HALF_LIFE_S
from overcommit.runtime.errors import ConfigurationError
from overcommit.runtime.greedy_dual import CostAware, Gdsf, LfuDa, Source
from overcommit.runtime.s3_fifo import Queues, S3Fifo

Rank = tuple[float, ...]


class Policy(Protocol):
    """Ranks versions by how little it would cost to lose them from a tier."""

    def on_add(self, slot: int, nbytes: int, priority: int) -> None:
        """A version may be loaded from now on; again with another priority: that one counts."""

    def on_use(self, slot: int, uses: int, now_ns: int) -> None:
        """It has run this many requests in all, the last one at `now_ns`."""

    def on_load(self, slot: int, load_ns: int, source: Source) -> None:
        """It came to this tier from there, and that took so long."""

    def on_copy(self, slot: int, is_there: bool) -> None:
        """HOST has, or has no more, what the version needs to come back to DEVICE."""

    def on_evict(self, slot: int, now_ns: int) -> None:
        """It left the tier to make room."""

    def on_remove(self, slot: int) -> None:
        """It is served no more."""

    def rank(self, slot: int) -> Rank:
        """Return its place: the lowest leaves first."""
        ...


class Victims(Protocol):
    """Some slots of a tier, and who of them leaves first."""

    def __len__(self) -> int: ...

    def add(self, slot: int) -> None:
        """Take a slot in, or take notice that its rank has shrunk."""

    def discard(self, slot: int) -> None:
        """Leave a slot out from now on."""

    def victims(self) -> Generator[int, None, None]:
        """Yield the slots, the first to leave first; see invariant 3."""
        ...


class Order:
    """Some slots by ascending rank: a heap whose entries are brought up to date as they come up."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[tuple[Rank, int]] = []
        self._members: set[int] = set()

    def __len__(self) -> int:
        return len(self._members)

    def add(self, slot: int) -> None:
        """Take a slot in, or take notice that its rank has shrunk."""
        self._members.add(slot)
        heapq.heappush(self._heap, (self._policy.rank(slot), slot))

    def discard(self, slot: int) -> None:
        """Leave a slot out from now on."""
        self._members.discard(slot)
        if len(self._heap) > 2 * len(self._members) + 64:
            self._heap = [(self._policy.rank(member), member) for member in self._members]
            heapq.heapify(self._heap)

    def victims(self) -> Generator[int, None, None]:
        """Yield the slots by rank, see invariant 3; close it before the next one is begun.

        Slots may be discarded meanwhile, and none added.
        """
        # The heap is taken away while it is walked, so that `discard` does not rebuild it.
        heap, self._heap = self._heap, []
        kept: list[tuple[Rank, int]] = []
        seen: set[int] = set()
        try:
            while heap:
                entry = rank, slot = heapq.heappop(heap)
                if slot not in self._members or slot in seen:
                    continue  # it has left, or was entered twice
                if self._policy.rank(slot) == rank:
                    kept.append(entry)
                    yield slot
                    if slot not in self._members or self._policy.rank(slot) == rank:
                        seen.add(slot)
                        continue
                    kept.pop()
                heapq.heappush(heap, (self._policy.rank(slot), slot))
        finally:
            for entry in (*kept, *self._heap):
                heapq.heappush(heap, entry)
            self._heap = heap


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

    def on_load(self, slot: int, load_ns: int, source: Source) -> None:
        """Do nothing: recency does not care what a load costs."""

    def on_copy(self, slot: int, is_there: bool) -> None:
        """Do nothing, likewise."""

    def on_evict(self, slot: int, now_ns: int) -> None:
        """Do nothing: who is gone leaves nothing behind."""

    def on_remove(self, slot: int) -> None:
        """Forget the version."""
        self._known.pop(slot, None)

    def rank(self, slot: int) -> Rank:
        """By priority, then by last use; uses only break ties."""
        known = self._known[slot]
        return known.priority, known.last_used_ns, known.uses


POLICIES: dict[str, Callable[[], Policy]] = {
    "cost_aware": CostAware,
    "lru": Lru,
    "lfu_da": LfuDa,
    "gdsf": Gdsf,
    "s3_fifo": S3Fifo,
}


def make_policy(name: str, half_life_s: float = HALF_LIFE_S) -> Policy:
    """Return a fresh policy, for one tier; ConfigurationError if there is none of this name.

    `half_life_s` is how fast `cost_aware` forgets uses; the others have none.
    """
    if name == "cost_aware":
        return CostAware(half_life_s)
    factory = POLICIES.get(name)
    if factory is None:
        known = ", ".join(sorted(POLICIES))
        raise ConfigurationError(f"unknown eviction policy '{name}'; choose one of: {known}")
    return factory()


def make_order(policy: Policy) -> Victims:
    """Return an empty order of one tier's slots by this policy."""
    return Queues(policy) if isinstance(policy, S3Fifo) else Order(policy)
