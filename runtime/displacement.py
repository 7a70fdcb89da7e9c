"""Whether a version may push out again what is worth more than it.

Bytes are given by value per byte (`policy.py`), so the least precious leave first.  But a giant needs
many of them at once: a model of 1 GB that one client asks for would empty DEVICE of fifty small ones
that are asked all the time, and they it, in turn.  So a model of GIANT_SHARE of DEVICE and more, which
would evict MANY or more versions, is weighed against them: what they would cost, in seconds of loading
a second, if they had to come back for every request; against the same of its own.  Where they are
worth TIMES its own and more it comes no oftener than once in SHARE times as long as the loads take, its
own and theirs, or in PATIENCE_S.  So it takes a small part of the time, and it does come: at once, if
it was not here lately.

Invariants
 1. A version that is no giant, or of which fewer than MANY would have to leave, is never held up, nor
    one that came to DEVICE longer than PATIENCE_S ago, or never.
 2. Nobody is held up whose victims' demand is not known.

Source: the admission test of GreedyDual caches (Einziger, Friedman, Manes, "TinyLFU", ACM ToS 2017) with
time in place of frequency, so that a giant waits instead of being refused.  Pure; called by residency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from overcommit.runtime.admission import Forecast
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.residents import Version
from overcommit.runtime.wish_queue import WishQueue

HELD_NS: Final = 100_000_000  # between two tries of a wish that is held up
MANY: Final = 4
GIANT_SHARE: Final = 0.5  # of DEVICE; smaller ones have their turns by `wish_queue`
TIMES: Final = 2.0
SHARE: Final = 64.0  # others were disturbed for ten times what the loads take at least
PATIENCE_S: Final = 10.0
FADE: Final = 0.5  # of a rate, with every look
RATE_MIN: Final = 0.1  # requests/s of a version that somebody waits for
RATE_KEPT_MIN: Final = RATE_MIN / 2  # below that a version that is not there is forgotten


class Demand:
    """Requests a second, by version, as they were lately."""

    def __init__(self) -> None:
        self._rates: dict[int, float] = {}
        self._uses: Mapping[int, int] = {}
        self._new: set[int] = set()  # whom the last look saw first: their rates are not known yet
        self._at_ns = 0

    def look(self, uses: Mapping[int, int], now_ns: int) -> None:
        """Take the running totals of the versions that matter; others are forgotten."""
        span_s = (now_ns - self._at_ns) / 1e9
        if self._at_ns and span_s > 0:
            rates = {}
            for slot, total in uses.items():
                former = self._uses.get(slot)
                new = 0.0 if former is None else max(0, total - former) / span_s
                rates[slot] = FADE * self._rates.get(slot, new) + (1 - FADE) * new
            self._rates = rates
        self._new = uses.keys() - self._uses.keys()
        self._uses, self._at_ns = uses, now_ns

    def known(self) -> list[int]:
        """Return who was asked for lately, or may be: who was evicted is asked for all the same."""
        return [
            slot for slot in self._uses if slot in self._new or self.rate(slot) >= RATE_KEPT_MIN
        ]

    def rate(self, slot: int) -> float:
        """Return the requests a second for this version, 0 if that is not known."""
        return self._rates.get(slot, 0.0)


Cost = Callable[[int], float]  # slot -> seconds that a load of it takes


def patience_s(slot: int, victims: Sequence[int], demand: Demand, cost: Cost) -> float:
    """Return how long after it came to DEVICE a version may push these out; 0: at any time."""
    if len(victims) < MANY:
        return 0.0
    own_s = cost(slot)
    costs = [(victim, cost(victim)) for victim in victims]
    displaced = sum(demand.rate(victim) * seconds for victim, seconds in costs)
    if displaced < TIMES * max(RATE_MIN, demand.rate(slot)) * own_s:
        return 0.0
    return min(PATIENCE_S, SHARE * (own_s + sum(seconds for _, seconds in costs)))


class Displacement:
    """Holds wishes up whose loads would push out what is worth more."""

    def __init__(
        self, device: ChunkAllocator, queue: WishQueue, forecast: Forecast, demand: Demand
    ) -> None:
        self._device = device
        self._queue = queue
        self._forecast = forecast
        self._demand = demand

    def objects(self, version: Version, victims: list[Version], now_ns: int) -> bool:
        """Whether the version has to wait before it pushes these out; its wish says how long."""
        wish = self._queue.get(version.slot)
        came_ns = version.published_ns
        if wish is None or not came_ns or len(victims) < MANY:
            return False
        if version.nbytes < GIANT_SHARE * self._device.capacity_bytes:
            return False
        costs = {each.slot: self._cost_s(each) for each in (version, *victims)}
        slots = [victim.slot for victim in victims]
        wait_s = patience_s(version.slot, slots, self._demand, costs.__getitem__)
        until_ns = came_ns + int(wait_s * 1e9)
        if now_ns >= until_ns:
            return False
        # It is looked at again soon: those that are in its way may be asked less.
        wish.not_before_ns = min(until_ns, now_ns + HELD_NS)
        wish.held_until_ns = until_ns
        return True

    def _cost_s(self, version: Version) -> float:
        cost_ns = self._forecast.cost_ns([("host" if version.host else "disk", version.nbytes)])
        return 0.0 if cost_ns is None else cost_ns / 1e9
