"""Which versions to bring to a better tier before they are asked for, and whom that may cost its place.

Owns what is known of every version's demand (`demand`).  A version in a tier is worth the seconds of
load that it is expected to save within HORIZON_S, for each of its bytes: its chance of being asked for in
that time x what its load would take / its size.  Whoever is worth most and is not there is wished for.

Invariants
 1. Nothing is wished for on a guess: the model's gaps are known, and its chance is CHANCE_MIN.
 2. Who is displaced was idle for PREFETCH_IDLE_S and is worth less, by MARGIN.  That comes on top of the
    eviction policy, which says in which order victims are offered, and of what protects them there.
 3. Memory is bounded: MODELS_MAX models, of which the longest idle one is forgotten.

Pure: times are parameters, local wall-clock seconds.  Called by `prefetching`, and by the simulator of
the benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from overcommit.runtime.demand import Demand
from overcommit.runtime.gaps import Pool
from overcommit.runtime.prefetch_limits import (
    PREFETCH_IDLE_S,
    PREFETCH_MODELS_MAX,
    PREFETCH_WISHES_MAX,
)
from overcommit.runtime.views import Tier

HORIZON_S: Final = 300.0
CHANCE_MIN: Final = 0.1
MARGIN: Final = 2.0


@dataclass(slots=True, frozen=True)
class Candidate:
    """A version, a tier, and the seconds that a request would not wait if it were there."""

    slot: int
    tier: Tier
    nbytes: int
    saves_s: float


@dataclass(slots=True, frozen=True)
class PrefetchWish:
    """A candidate that is worth it, in expected seconds for each byte."""

    candidate: Candidate
    worth: float


class Prefetcher:
    """See the module."""

    def __init__(self) -> None:
        self.pool = Pool()
        self._demands: dict[int, Demand] = {}  # by slot, the longest idle first

    def __len__(self) -> int:
        return len(self._demands)

    # --- learning -------------------------------------------------------------------------------
    def use(self, slot: int, at_s: float) -> None:
        """The version was used."""
        demand = self._demands.pop(slot, None)
        if demand is None:
            demand = Demand(at_s, self.pool)
            if len(self._demands) >= PREFETCH_MODELS_MAX:
                del self._demands[next(iter(self._demands))]
        self._demands[slot] = demand
        demand.use(at_s)

    def forget(self, slot: int) -> Demand | None:
        """The version is served no more; return what was known of it."""
        return self._demands.pop(slot, None)

    def adopt(self, slot: int, demand: Demand) -> None:
        """Begin with what was known of the model, unless the version has a past of its own."""
        if len(self._demands) < PREFETCH_MODELS_MAX:
            demand.pool = self.pool
            self._demands.setdefault(slot, demand)

    def demand(self, slot: int) -> Demand | None:
        """Return what is known of a version."""
        return self._demands.get(slot)

    def slots(self) -> tuple[int, ...]:
        """Return every slot of which something is known."""
        return tuple(self._demands)

    # --- choosing -------------------------------------------------------------------------------
    def chance(self, slot: int, now_s: float) -> float:
        """Return the probability that the version is asked for within the horizon."""
        demand = self._demands.get(slot)
        return 0.0 if demand is None else demand.chance(now_s, now_s + HORIZON_S)

    def wishes(self, candidates: Iterable[Candidate], now_s: float) -> list[PrefetchWish]:
        """Return the best of them, the best first."""
        found: list[PrefetchWish] = []
        for candidate in candidates:
            demand = self._demands.get(candidate.slot)
            if demand is None or not demand.is_known or candidate.saves_s <= 0:
                continue
            chance = demand.chance(now_s, now_s + HORIZON_S)
            if chance >= CHANCE_MIN:
                worth = chance * candidate.saves_s / max(1, candidate.nbytes)
                found.append(PrefetchWish(candidate, worth))
        found.sort(key=lambda wish: (-wish.worth, wish.candidate.slot))
        return found[:PREFETCH_WISHES_MAX]

    def may_displace(
        self, wish: PrefetchWish, victim: Candidate, idle_s: float, now_s: float
    ) -> bool:
        """Whether this holder, idle for so long, may leave for the wish."""
        if idle_s < PREFETCH_IDLE_S:
            return False
        worth = self.chance(victim.slot, now_s) * victim.saves_s / max(1, victim.nbytes)
        return worth * MARGIN < wish.worth
