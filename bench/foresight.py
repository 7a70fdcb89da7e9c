"""The server's prefetching in the simulator: its predictor and its books, around a simulated cache.

There is one tier, and time is the trace's.  A look is taken every LOOK_S, and the best wishes are begun one
after the other; the supervisor looks every second at some of its models, and begins one.

Called by the scenario `replay`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from overcommit.bench.simulate import Cache
from overcommit.runtime.config import PREFETCH_SHARE
from overcommit.runtime.prefetch import Candidate, Prefetcher, PrefetchWish
from overcommit.runtime.prefetch_books import PrefetchBooks
from overcommit.runtime.views import Tier

LOOK_S: Final = 120.0
BYTES_PER_S: Final = 5e9  # a tenth of what loads get


class Foresight:
    """A `simulate.Prefetcher`."""

    def __init__(self, begin_s: float) -> None:
        self.prefetcher = Prefetcher()
        self.books = PrefetchBooks(BYTES_PER_S, PREFETCH_SHARE)
        self._next_s = begin_s
        self._wish: PrefetchWish | None = None
        self._loads_s: list[float] = []
        self._is_open = True

    def on_request(self, model: int, time_s: float, was_held: bool) -> None:
        """See `Prefetcher`."""
        if was_held:
            self.books.use(model)
        elif self._loads_s:
            self.books.miss(model, self._loads_s[model])
        self.prefetcher.use(model, time_s)

    def next_s(self) -> float | None:
        """See `Prefetcher`."""
        return self._next_s

    def wishes(self, time_s: float, cache: Cache) -> Iterator[int]:
        """See `Prefetcher`."""
        self._next_s = time_s + LOOK_S
        if not self._loads_s:
            self._loads_s = [cache.cost(nbytes) for nbytes in cache.sizes]
        for model in [m for m in self.books.outstanding if m not in cache]:
            self.books.lose(model)
        self.books.expire(time_s)
        self._is_open = self.books.may_displace
        candidates = [self._candidate(m, cache) for m in self.prefetcher.slots() if m not in cache]
        for wish in self.prefetcher.wishes(candidates, time_s):
            nbytes = wish.candidate.nbytes
            if not self._is_open and nbytes > cache.free:
                self._bet_on_paper(wish, time_s, cache)
                continue
            if self.books.may_spend(Tier.DEVICE, nbytes, cache.capacity, time_s):
                self._wish = wish
                yield wish.candidate.slot

    def _bet_on_paper(self, wish: PrefetchWish, time_s: float, cache: Cache) -> None:
        model = wish.candidate.slot
        self._wish = wish
        victims = cache.victims_for(
            model, lambda victim: self.may_displace(model, victim, time_s, cache)
        )
        if victims:
            costs = [(victim, self._loads_s[victim]) for victim in victims]
            self.books.bet_on_paper(model, wish.candidate.saves_s, costs, time_s)

    def may_displace(self, model: int, victim: int, time_s: float, cache: Cache) -> bool:
        """See `Prefetcher`."""
        assert self._wish is not None
        idle_s = cache.idle_s(victim, time_s)
        holder = self._candidate(victim, cache)
        return self.prefetcher.may_displace(self._wish, holder, idle_s, time_s)

    def on_loaded(self, model: int, victims: Sequence[int], time_s: float) -> None:
        """See `Prefetcher`."""
        assert self._wish is not None
        wanted = self._wish.candidate
        self.books.start(model, wanted.tier, wanted.nbytes, wanted.saves_s, time_s, victims)

    def _candidate(self, model: int, cache: Cache) -> Candidate:
        return Candidate(model, Tier.DEVICE, cache.sizes[model], self._loads_s[model])
