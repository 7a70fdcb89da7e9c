"""Eviction by value: how often a version is asked for, what its load costs, what it takes.

GreedyDual (Young 1994; with sizes: Cao and Irani, "Cost-Aware WWW Proxy Caching Algorithms", USITS
1997): each version has a priority H = L + value, set when it is used; who leaves raises the clock L
to its own H, so that what is not used again is overtaken in time, however valuable it was.  The
policies differ in the value:

    lfu_da      frequency                    (Arlitt et al., "Evaluating Content Management
    gdsf        frequency / size              Techniques for Web Proxy Caches", 1999)
    cost_aware  sqrt(frequency) x cost / size
                                             (Fuerst and Sharma, "FaasCache", ASPLOS 2021, without
                the root), with a frequency that fades with a half-life and is kept across evictions

`cost_aware` is the default: it minimises the time that requests wait for loads, not their number.
The root is for demand that moves: without it a version that was asked for a thousand times keeps
those away that are asked for now.  In replays of a trace with days, nights and new models LRU was up
to 5 % better in small caches without the root, and never with it; where popularity stands still it
costs 0.03 (`bench/LOG.md` has both, and what else was tried).

What a load costs is a line through the load times measured lately, of all versions, one for loads
from disk and one for those from HOST: one version's own times are few, and how busy the disk was
then says nothing of the next time.  A tier has a policy of its own: losing DEVICE costs a copy where
HOST has one and a read of the disk where it has not; losing HOST always costs the disk.

Invariants
 1. A version's priority is set by calls for it alone, and only grows until it is added anew.
 2. L never falls.  Frequencies and clocks are finite: a value is at most FREQUENCY_MAX x cost / size.
 3. A use counts by the L of its own time, though the policy hears of it later: what L was is kept.
    With the L of the time of hearing, every use since the last look was as good as one of now.

Pure.  Made by `policy.make_policy`.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Final, Literal

from overcommit.runtime.config import HALF_LIFE_S

FREQUENCY_MAX: Final = 1e9
FORGET: Final = 0.998  # of a load time's weight, with every load that follows
COST_MIN_S: Final = 1e-4
CLOCKS_KEPT: Final = 4096  # an older use counts by the oldest

Rank = tuple[float, ...]
Source = Literal["disk", "host"]


class LoadCost:
    """Seconds that a load takes, as a straight line over bytes (least squares, weights fading)."""

    def __init__(self, fixed_s: float, bytes_per_s: float) -> None:
        # Two loads that nobody measured, until some are.
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self.add(0, fixed_s)
        self.add(5_000_000_000, fixed_s + 5e9 / bytes_per_s)

    def add(self, nbytes: int, seconds: float) -> None:
        """Take note of a load."""
        x = nbytes / 1e9
        self._weight = self._weight * FORGET + 1.0
        self._x = self._x * FORGET + x
        self._y = self._y * FORGET + seconds
        self._xx = self._xx * FORGET + x * x
        self._xy = self._xy * FORGET + x * seconds

    def of(self, nbytes: int) -> float:
        """Return the seconds that a load of so many bytes is expected to take."""
        spread = self._weight * self._xx - self._x * self._x
        slope = 0.0
        if spread > 1e-12:
            slope = max(0.0, (self._weight * self._xy - self._x * self._y) / spread)
        start = max(0.0, (self._y - slope * self._x) / self._weight)
        return max(COST_MIN_S, start + slope * nbytes / 1e9)


@dataclass(slots=True)
class _Known:
    nbytes: int
    priority: int
    frequency: float = 0.0
    uses: int = 0
    credit: int = 0  # uses that were counted when the load was asked for
    last_ns: int = 0
    value: float = 0.0  # H
    has_copy: bool = False  # in HOST, so that the next load reads no disk


class GreedyDual:
    """The common part; subclasses say what a version is worth."""

    def __init__(self, half_life_s: float | None = None) -> None:
        self._half_life_s = half_life_s
        self._known: dict[int, _Known] = {}
        self._clocks = [0.0]  # L, and its former values ...
        self._since_ns = [0]  # ... with the time from which each was so
        self._costs: dict[Source, LoadCost] = {
            "disk": LoadCost(0.03, 5e9),
            "host": LoadCost(0.01, 10e9),
        }

    def on_add(self, slot: int, nbytes: int, priority: int) -> None:
        """Know the version; what is known of its use is kept if it was not removed since."""
        known = self._known.setdefault(slot, _Known(nbytes, priority))
        known.nbytes, known.priority = max(1, nbytes), priority

    def on_use(self, slot: int, uses: int, now_ns: int) -> None:
        """Count what is new and set its priority by the clock of the last use."""
        known = self._known[slot]
        new = max(0, uses - known.uses)  # counters of a worker that died are lost
        known.uses = uses
        paid = min(new, known.credit)
        known.credit -= paid
        self._count(known, new - paid, now_ns)

    def on_load(self, slot: int, load_ns: int, source: Source) -> None:
        """Learn what a load takes; somebody has asked for it, though no request has run yet."""
        known = self._known[slot]
        self._costs[source].add(known.nbytes, load_ns / 1e9)
        if not known.credit:
            known.credit = 1
            self._count(known, 1, known.last_ns)

    def on_copy(self, slot: int, is_there: bool) -> None:
        """The next load will, or will not, come from HOST; without a copy it is worth more."""
        known = self._known[slot]
        if known.has_copy != is_there:
            known.has_copy = is_there
            self._count(known, 0, known.last_ns)

    def on_evict(self, slot: int, now_ns: int) -> None:
        """The clock comes to where the victim stood."""
        value = self._known[slot].value
        if value > self._clocks[-1]:
            self._clocks.append(value)
            self._since_ns.append(max(now_ns, self._since_ns[-1]))
            if len(self._clocks) > 2 * CLOCKS_KEPT:
                del self._clocks[:-CLOCKS_KEPT], self._since_ns[:-CLOCKS_KEPT]

    def on_remove(self, slot: int) -> None:
        """Forget the version."""
        self._known.pop(slot, None)

    def rank(self, slot: int) -> Rank:
        """By priority, then by H; what was used longer ago first among equals."""
        known = self._known[slot]
        return known.priority, known.value, known.last_ns

    # --- inside ---------------------------------------------------------------------------------
    def _count(self, known: _Known, new: int, now_ns: int) -> None:
        now_ns = max(now_ns, known.last_ns)
        faded = known.frequency
        if self._half_life_s is not None:
            faded *= 0.5 ** ((now_ns - known.last_ns) / 1e9 / self._half_life_s)
        known.frequency = min(FREQUENCY_MAX, faded + new)
        known.last_ns = now_ns
        clock = self._clocks[max(0, bisect.bisect(self._since_ns, now_ns) - 1)]
        known.value = max(known.value, clock + self._worth(known))

    def _worth(self, known: _Known) -> float:
        raise NotImplementedError


class LfuDa(GreedyDual):
    """Least frequently used, with dynamic aging."""

    def _worth(self, known: _Known) -> float:
        return known.frequency


class Gdsf(GreedyDual):
    """GreedyDual-Size with frequency: fewest misses, whatever they cost."""

    def _worth(self, known: _Known) -> float:
        return known.frequency / known.nbytes


class CostAware(GreedyDual):
    """Least load time; see the module."""

    def __init__(self, half_life_s: float = HALF_LIFE_S) -> None:
        super().__init__(half_life_s)

    def _worth(self, known: _Known) -> float:
        cost = self._costs["host" if known.has_copy else "disk"].of(known.nbytes)
        return math.sqrt(known.frequency) * cost / known.nbytes
