"""A cache of bytes driven through a trace, with the server's own policies, without a server.

What counts is the time that requests would have waited for loads: `cost_s` says what a load takes,
so ratios say what a policy decides, not what a disk did.  A prefetcher, if there is one, is asked
between requests what to bring in before it is asked for; its loads take as long, and a request that
comes meanwhile waits for the rest.

Invariants
 1. `used` is the sum of the sizes of what is held, and at most `capacity` after every event.
 2. Policies hear of loads and evictions as from residency, and of uses as late as from residency:
    when a model comes up as a victim and its counter has grown meanwhile.
 3. A model larger than the cache is loaded for each request and never kept.

Called by the scenario `replay`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from overcommit.bench.catalogue_trace import Request
from overcommit.runtime.policy import Policy, make_order, make_policy

FIXED_S: Final = 0.03
BYTES_PER_S: Final = 50e9


def cost_s(nbytes: int) -> float:
    """Seconds that a load takes."""
    return FIXED_S + nbytes / BYTES_PER_S


@dataclass(slots=True, frozen=True)
class Outcome:
    """What became of a trace.  `load_s` is what requests waited for; prefetches cost none of it."""

    misses: int
    load_s: float
    prefetches: int = 0
    prefetches_used: int = 0  # a request came before they were evicted
    prefetch_s: float = 0.0  # seconds of loading that nobody had asked for yet


class Cache:
    """One tier: what it holds and who must leave.  Prefetchers may look, and ask."""

    def __init__(
        self,
        policy: Policy,
        sizes: Sequence[int],
        capacity: int,
        cost: Callable[[int], float] = cost_s,
    ) -> None:
        self.policy = policy
        self.sizes = sizes
        self.capacity = capacity
        self.cost = cost
        self.used = 0
        self.held: set[int] = set()
        self._uses = [0] * len(sizes)  # the counters of the workers
        self._last_ns = [0] * len(sizes)
        self._told = [0] * len(sizes)  # the uses that the policy has heard of
        self._order = make_order(policy)
        for model, nbytes in enumerate(sizes):
            policy.on_add(model, nbytes, 0)

    def __contains__(self, model: int) -> bool:
        return model in self.held

    @property
    def free(self) -> int:
        """Bytes that nothing is evicted for."""
        return self.capacity - self.used

    def victims_for(self, model: int, may_leave: Callable[[int], bool] | None = None) -> list[int]:
        """Return who would leave if this model came now; nobody is evicted by asking."""
        return self._choose(self.used + self.sizes[model] - self.capacity, may_leave) or []

    def use(self, model: int, now_ns: int) -> None:
        """A request runs.  Nobody is told, as in the server: workers only count."""
        self._uses[model] += 1
        self._last_ns[model] = now_ns

    def idle_s(self, model: int, now_s: float) -> float:
        """Return for how long nobody has used it."""
        return now_s - self._last_ns[model] / 1e9

    def load(
        self, model: int, now_ns: int, may_leave: Callable[[int], bool] | None = None
    ) -> list[int] | None:
        """Bring a model in and return whom that has evicted; one that is too large is not kept.

        None: of those who may leave there were not enough, and nothing has changed.
        """
        assert model not in self.held
        if self.sizes[model] > self.capacity:
            return []
        victims = self._choose(self.used + self.sizes[model] - self.capacity, may_leave)
        if victims is None:
            return None
        for victim in victims:
            self._order.discard(victim)
            self.held.discard(victim)
            self.used -= self.sizes[victim]
            self.policy.on_evict(victim, now_ns)
        self.used += self.sizes[model]
        self.held.add(model)
        self.policy.on_load(model, int(self.cost(self.sizes[model]) * 1e9), "disk")
        self.policy.on_use(model, self._told[model], now_ns)
        self._order.add(model)
        return victims

    def _offers(self) -> Generator[int, None, None]:
        with contextlib.closing(self._order.victims()) as models:
            for model in models:
                if self._told[model] != self._uses[model]:
                    former = self.policy.rank(model)
                    self._told[model] = self._uses[model]
                    self.policy.on_use(model, self._uses[model], self._last_ns[model])
                    if self.policy.rank(model) != former:
                        continue  # it comes again in its right place
                yield model

    def _choose(
        self, missing: int, may_leave: Callable[[int], bool] | None = None
    ) -> list[int] | None:
        if missing <= 0:
            return []
        chosen: list[int] = []
        freed = 0
        with contextlib.closing(self._offers()) as offers:
            while freed < missing and (model := next(offers, None)) is not None:
                if may_leave is None or may_leave(model):
                    chosen.append(model)
                    freed += self.sizes[model]
        if freed < missing:
            return None
        kept: list[int] = []
        for model in reversed(chosen):  # the precious first: they stay if they can
            if freed - self.sizes[model] >= missing:
                freed -= self.sizes[model]
            else:
                kept.append(model)
        return kept[::-1]


class Prefetcher(Protocol):
    """What a predictor is to the simulator.  Times are seconds of the trace."""

    def on_request(self, model: int, time_s: float, was_held: bool) -> None:
        """A request has come, and its model is there now."""

    def next_s(self) -> float | None:
        """When it wants to be asked next; None: not before the next request."""
        ...

    def wishes(self, time_s: float, cache: Cache) -> Iterable[int]:
        """Return the models to bring in now, in order; it may look at the cache.

        Called when `next_s` is reached, which must then be later than `time_s`, or None.
        """
        ...

    def may_displace(self, model: int, victim: int, time_s: float, cache: Cache) -> bool:
        """Whether this one may leave for what is wished for."""
        ...

    def on_loaded(self, model: int, victims: Sequence[int], time_s: float) -> None:
        """What was wished for is on its way, and these have left for it."""


def simulate(
    policy: str | Policy,
    trace: Sequence[Request],
    sizes: Sequence[int],
    capacity: int,
    prefetcher: Prefetcher | None = None,
) -> Outcome:
    """Run a policy, by name or as it is, over a trace in order of time."""
    cache = Cache(make_policy(policy) if isinstance(policy, str) else policy, sizes, capacity)
    ahead = _Ahead(cache)
    misses = 0
    load_s = 0.0
    for request in trace:
        model, now_s = request.model, request.time_s
        now_ns = int(now_s * 1e9)
        if prefetcher is not None:
            ahead.run(prefetcher, now_s)
        was_held = model in cache
        if not was_held:
            misses += 1
            load_s += cache.cost(sizes[model])
            cache.load(model, now_ns)
        load_s += ahead.on_request(model, now_s, was_held)
        cache.use(model, now_ns)
        if prefetcher is not None:
            prefetcher.on_request(model, now_s, was_held)
    return Outcome(misses, load_s, ahead.count, ahead.used, ahead.seconds)


class _Ahead:
    """The loads that nobody has asked for yet: one after the other, as one mover makes them."""

    def __init__(self, cache: Cache) -> None:
        self.count = self.used = 0
        self.seconds = 0.0
        self._cache = cache
        self._ready_s: dict[int, float] = {}  # prefetched and not asked for since
        self._busy_s = 0.0

    def run(self, prefetcher: Prefetcher, until_s: float) -> None:
        """Carry out what the prefetcher wants before a request comes."""
        while (at_s := prefetcher.next_s()) is not None and at_s <= until_s:
            for model in prefetcher.wishes(at_s, self._cache):
                if model not in self._cache and self._cache.sizes[model] <= self._cache.capacity:
                    self._load(prefetcher, model, at_s)
            following = prefetcher.next_s()
            assert following is None or following > at_s, "time does not stand still"

    def _load(self, prefetcher: Prefetcher, model: int, at_s: float) -> None:
        victims = self._cache.load(
            model,
            int(at_s * 1e9),
            lambda victim: prefetcher.may_displace(model, victim, at_s, self._cache),
        )
        if victims is None:
            return
        prefetcher.on_loaded(model, victims, at_s)
        takes_s = self._cache.cost(self._cache.sizes[model])
        self._busy_s = max(self._busy_s, at_s) + takes_s
        self._ready_s[model] = self._busy_s
        self.count += 1
        self.seconds += takes_s

    def on_request(self, model: int, now_s: float, was_held: bool) -> float:
        """Return the seconds that a request waits for a prefetch that is under way."""
        ready_s = self._ready_s.pop(model, 0.0)
        if not was_held or not ready_s:
            return 0.0
        self.used += 1
        # Never longer than a load of its own: what is asked for goes before what is not.
        return min(max(0.0, ready_s - now_s), self._cache.cost(self._cache.sizes[model]))
