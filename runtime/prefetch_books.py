"""What prefetching may spend, what it has brought, and what it has cost.

Owns the budget (bytes a second, and bytes of a tier that wait for their first use), the prefetches that
nobody has used yet, and the running totals that are shown as gain and waste.

A prefetch that displaced somebody is a bet: won when its version is used while it is there, lost when
the displaced one is asked for and has to be loaded again.  Wins and losses are weighed by the seconds
of load that they are worth, and fade.  Until there are wins, and while there are too many losses, nobody
is displaced: prefetches only take what is free, and bets are made on paper, with those who would have
left.  So demand without structure, of which predictions are wrong, costs next to nothing.

Invariants
 1. What is begun was within the budget: bytes in a window of PREFETCH_WINDOW_S are at most
    its bytes a second x (the time that has passed + the window), or it was the first to spend after
    the budget was full; what waits in a tier for its first use is at most the tier's share.
 2. A version has at most one outstanding prefetch; it ends once: used, lost, expired, cancelled or
    failed, or in a prefetch of the same version to a better tier.
 3. Totals never shrink.

Pure.  Called by `prefetching`, and by the simulator of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from overcommit.runtime.prefetch_limits import (
    PREFETCH_DISPLACED_MAX,
    PREFETCH_EXPIRY_S,
    PREFETCH_WINDOW_S,
)
from overcommit.runtime.views import Tier

_FADE: Final = 0.98  # of both sides, with each bet that is settled
_LOSSES_MAX: Final = 0.5  # in gains; a bet must not be fair, it must pay


@dataclass(slots=True)
class PrefetchTotals:
    """Running totals since the start; they never shrink."""

    started_host: int = 0
    started_device: int = 0
    bytes_started: int = 0
    used: int = 0  # a request came and found it there
    used_bytes: int = 0
    saved_s: float = 0.0  # seconds of load that those requests did not wait for
    promoted: int = 0  # a request came while it was under way
    cancelled: int = 0  # it was in the way of a request
    failed: int = 0
    lost: int = 0  # evicted before its first use ...
    lost_bytes: int = 0
    expired: int = 0  # ... or still there, and not used for PREFETCH_EXPIRY_S
    expired_bytes: int = 0
    displaced: int = 0  # versions that left for a prefetch ...
    regretted: int = 0  # ... and were asked for before long
    regretted_s: float = 0.0


@dataclass(slots=True, frozen=True)
class Outstanding:
    """A prefetch that nobody has used yet."""

    slot: int
    tier: Tier
    nbytes: int
    saves_s: float
    at_s: float
    is_bet: bool  # somebody was displaced for it


class PrefetchBooks:
    """See the module."""

    def __init__(self, bytes_per_s: float, share: float) -> None:
        self.totals = PrefetchTotals()
        self.outstanding: dict[int, Outstanding] = {}
        self._displaced: dict[int, float] = {}  # slot -> when, the oldest first
        self._share = share
        self._bytes_per_s = bytes_per_s
        self._burst = bytes_per_s * PREFETCH_WINDOW_S
        self._left = self._burst
        self._filled_s: float | None = None
        self._waiting = dict.fromkeys(Tier, 0)
        self._paper: dict[int, tuple[float, float]] = {}  # wished for: what it saves, when
        self._paper_victims: dict[int, tuple[float, float]] = {}  # what their loss costs, when
        self._won = self._lost = 0.0

    # --- the budget -----------------------------------------------------------------------------
    def may_spend(self, tier: Tier, nbytes: int, capacity: int, now_s: float) -> bool:
        """Whether a prefetch of so many bytes into a tier of this capacity may begin now."""
        if self._filled_s is not None and now_s > self._filled_s:
            grown = (now_s - self._filled_s) * self._bytes_per_s
            self._left = min(self._burst, self._left + grown)
        self._filled_s = now_s if self._filled_s is None else max(self._filled_s, now_s)
        if self._waiting[tier] + nbytes > capacity * self._share:
            return False
        return nbytes <= self._left or self._left == self._burst

    @property
    def may_displace(self) -> bool:
        """Whether bets pay."""
        return self._won > 0 and self._lost <= self._won * _LOSSES_MAX

    def bet_on_paper(
        self, slot: int, saves_s: float, victims: Iterable[tuple[int, float]], now_s: float
    ) -> None:
        """This version would have come, and these, with what their loss costs, would have left."""
        if slot in self._paper or len(self._paper) >= PREFETCH_DISPLACED_MAX:
            return
        self._paper[slot] = saves_s, now_s
        for victim, costs_s in victims:
            self._paper_victims.setdefault(victim, (costs_s, now_s))

    # --- what happens ---------------------------------------------------------------------------
    def start(
        self,
        slot: int,
        tier: Tier,
        nbytes: int,
        saves_s: float,
        now_s: float,
        displaced: Iterable[int] = (),
    ) -> None:
        """A prefetch begins; these had to leave for it."""
        self.end(slot)
        is_bet = self.displace(displaced, now_s)
        self._displaced.pop(slot, None)
        self.outstanding[slot] = Outstanding(slot, tier, nbytes, saves_s, now_s, is_bet)
        self._waiting[tier] += nbytes
        self._left -= nbytes
        self.totals.bytes_started += nbytes
        if tier is Tier.DEVICE:
            self.totals.started_device += 1
        else:
            self.totals.started_host += 1

    def displace(self, victims: Iterable[int], now_s: float) -> bool:
        """These had to leave for a prefetch; whether there were any."""
        before = self.totals.displaced
        for victim in victims:
            self.lose(victim)
            self.totals.displaced += 1
            self._displaced.pop(victim, None)
            self._displaced[victim] = now_s
            while len(self._displaced) > PREFETCH_DISPLACED_MAX:
                del self._displaced[next(iter(self._displaced))]
        return self.totals.displaced > before

    def forget(self, slot: int) -> None:
        """The slot is free for another version."""
        self.lose(slot)
        self._displaced.pop(slot, None)
        self._paper.pop(slot, None)
        self._paper_victims.pop(slot, None)

    def end(self, slot: int) -> Outstanding | None:
        """A prefetch is outstanding no more, for whatever reason."""
        ahead = self.outstanding.pop(slot, None)
        if ahead is not None:
            self._waiting[ahead.tier] -= ahead.nbytes
        return ahead

    def use(self, slot: int, waited_s: float = 0.0) -> bool:
        """The version was used, after a wait for the rest of its load; whether that is a gain."""
        self._displaced.pop(slot, None)
        self._paper.pop(slot, None)
        costs_s, _ = self._paper_victims.pop(slot, (0.0, 0.0))
        if costs_s:
            self._settle(0.0, costs_s)  # it is there, and would not have been
        ahead = self.end(slot)
        if ahead is None:
            return False
        saved_s = max(0.0, ahead.saves_s - waited_s)
        self.totals.used += 1
        self.totals.used_bytes += ahead.nbytes
        self.totals.saved_s += saved_s
        if ahead.is_bet:
            self._settle(saved_s, 0.0)
        return True

    def lose(self, slot: int) -> None:
        """The version was evicted; waste if nobody had used it."""
        ahead = self.end(slot)
        if ahead is not None:
            self.totals.lost += 1
            self.totals.lost_bytes += ahead.nbytes

    def miss(self, slot: int, load_s: float) -> None:
        """A request has to wait for this load; regret it, if the version was displaced lately."""
        self._paper_victims.pop(slot, None)
        saves_s, _ = self._paper.pop(slot, (0.0, 0.0))
        if saves_s:
            self._settle(saves_s, 0.0)  # it is not there, and would have been
        if self._displaced.pop(slot, None) is not None:
            self.totals.regretted += 1
            self.totals.regretted_s += load_s
            self._settle(0.0, load_s)

    def expire(self, now_s: float) -> list[int]:
        """Give up what was not used for long; what is in the tier stays until it must leave."""
        old = [
            slot
            for slot, ahead in self.outstanding.items()
            if now_s - ahead.at_s > PREFETCH_EXPIRY_S
        ]
        for slot in old:
            ahead = self.end(slot)
            assert ahead is not None
            self.totals.expired += 1
            self.totals.expired_bytes += ahead.nbytes
        for bets in (self._paper, self._paper_victims):
            for slot in [s for s, bet in bets.items() if now_s - bet[1] > PREFETCH_EXPIRY_S]:
                del bets[slot]
        for slot in [s for s, at_s in self._displaced.items() if now_s - at_s > PREFETCH_EXPIRY_S]:
            del self._displaced[slot]
        return old

    def waiting_bytes(self, tier: Tier) -> int:
        """Bytes of a tier that were prefetched and not used yet."""
        return self._waiting[tier]

    def _settle(self, won: float, lost: float) -> None:
        self._won = self._won * _FADE + won
        self._lost = self._lost * _FADE + lost
