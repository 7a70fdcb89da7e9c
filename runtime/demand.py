"""When one model will be asked for next.

A visit is a row of uses with no pause over VISIT_S; what is predicted is the beginning of the next
one.  Four experts say how likely that is at every instant: one that forgets (a constant rate), the
histogram of gaps, and either of these bent by the calendar.  The next visit's time tells how well
each of them had put it (the logarithm of the density, fading), and they are listened to by that.
So a model without habits is taken for one: the histogram of a memoryless model fits its own noise
and scores less than the constant rate, and a calendar without structure costs its owner points.

This stands where "Serverless in the Wild" (ATC 2020) tests the coefficient of variation and falls
back to ARIMA: see `gaps`.

Invariants
 1. An expert is judged only by what it said before the visit was known.
 2. Time goes forwards: a use that is not younger than the last one changes nothing; but if the clock
    was set back by a day and more, all that was known is of another time and is dropped.
 3. `chance` is in [0, 1]; until GAPS_MIN gaps are known it is a guess, and `is_known` is False.

Times are local wall-clock seconds since the epoch.  Pure.  Called by `prefetch`.
"""

from __future__ import annotations

import math
from array import array
from typing import Final

from overcommit.runtime import gaps
from overcommit.runtime.weekly import HOUR_S, Weekly

VISIT_S: Final = gaps.SHORTEST_S
GAPS_MIN: Final = 2
EXPERTS: Final = range(4)
CONSTANT, HISTOGRAM, CONSTANT_CALENDAR, HISTOGRAM_CALENDAR = EXPERTS
_SET_BACK_S: Final = 86_400.0
_MEAN_GAPS: Final = 24  # memory of the constant rate
_YOUNG_VISITS: Final = 6  # up to here a model's gaps say what young models do
_FADE: Final = 0.9  # of a score, with each visit
_TRUST: Final = 0.7  # how much a point of the score counts
_HEARD_MIN: Final = 0.003  # an expert of less weight than that is not asked


class Demand:
    """One model's past, in about 1 KB, and what follows from it."""

    __slots__ = ("bins", "last_s", "mean_s", "pool", "scores", "visits", "week")

    def __init__(self, at_s: float, pool: gaps.Pool) -> None:
        self.pool = pool
        self.bins = bytearray(gaps.BINS)
        self.week = Weekly(int(at_s // HOUR_S))
        self.last_s = at_s
        self.mean_s = 0.0
        self.visits = 0  # begun
        self.scores = array("d", [0.0] * len(EXPERTS))

    @property
    def is_known(self) -> bool:
        """Whether enough has been seen to act on it."""
        return self.visits > GAPS_MIN

    # --- learning -------------------------------------------------------------------------------
    def use(self, at_s: float) -> None:
        """The model was used."""
        gap_s = at_s - self.last_s
        if gap_s < -_SET_BACK_S:
            self.__init__(at_s, self.pool)  # type: ignore[misc]
        elif self.visits and gap_s <= 0:
            return
        if not self.visits:
            self.visits = 1
        elif gap_s > VISIT_S:
            self._judge(gap_s)
            gaps.count(self.bins, gap_s)
            if self.visits <= _YOUNG_VISITS:
                self.pool.count(gap_s)
            self.mean_s += (gap_s - self.mean_s) / min(self.visits, _MEAN_GAPS)
            self.visits += 1
        self.last_s = at_s
        self.week.use(int(at_s // HOUR_S))

    def _judge(self, gap_s: float) -> None:
        if not self.is_known:
            return
        at_s = self.last_s + gap_s
        self.week.pass_to(int(at_s // HOUR_S))
        lift = math.log(self.week.lift(self.week.hour))
        for expert in EXPERTS:
            said = -self._cumulated(expert, self.last_s + VISIT_S, at_s)
            if expert & HISTOGRAM:
                likely = gaps.density(self.bins, gap_s, self.pool)
                said += math.log(likely / gaps.survival(self.bins, gap_s, self.pool))
            else:
                said -= math.log(self._mean_s(gap_s))
            if expert & CONSTANT_CALENDAR and at_s >= self._bent_from(expert):
                said += lift
            self.scores[expert] = self.scores[expert] * _FADE + said

    # --- predicting -----------------------------------------------------------------------------
    def chance(self, from_s: float, to_s: float) -> float:
        """Return the probability that the next visit begins in this time, if none did before."""
        self.week.pass_to(int(from_s // HOUR_S))
        if not self.is_known:
            return -math.expm1(-self._cumulated(HISTOGRAM, from_s, to_s))
        # Where no gap was ever that long the histogram has nothing to say.
        step = 1 if gaps.has_longer(self.bins, from_s - self.last_s) else HISTOGRAM + 1
        scores = self.scores[::step]
        best = max(scores)
        found = heard = 0.0
        for expert, score in zip(EXPERTS[::step], scores, strict=True):
            weight = math.exp((score - best) * _TRUST)
            if weight > _HEARD_MIN:
                heard += weight
                found += weight * self._cumulated(expert, from_s, to_s)
        return -math.expm1(-found / heard)

    def _mean_s(self, idle_s: float) -> float:
        # One that has been idle for much longer than ever has probably ended.
        return max(self.mean_s, VISIT_S, idle_s / 3)

    def _cumulated(self, expert: int, from_s: float, to_s: float) -> float:
        """Integrate an expert's rate over this time."""
        if not expert & CONSTANT_CALENDAR:
            return self._plain(expert, from_s, to_s)
        found = 0.0
        if (bent_s := self._bent_from(expert)) > from_s:
            found = self._plain(expert, from_s, min(bent_s, to_s))
            from_s = bent_s
        while from_s < to_s:
            hour = int(from_s // HOUR_S)
            end_s = min(to_s, (hour + 1) * HOUR_S)
            found += self.week.lift(hour) * self._plain(expert, from_s, end_s)
            from_s = end_s
        return found

    def _bent_from(self, expert: int) -> float:
        # Short gaps say themselves that it is a model's hour; bent as well they would count twice.
        return self.last_s + (HOUR_S if expert == HISTOGRAM_CALENDAR else 0)

    def _plain(self, expert: int, from_s: float, to_s: float) -> float:
        from_s, to_s = max(0.0, from_s - self.last_s), to_s - self.last_s
        if to_s <= from_s:
            return 0.0
        if expert & HISTOGRAM:
            before = gaps.survival(self.bins, from_s, self.pool)
            return math.log(before / gaps.survival(self.bins, to_s, self.pool))
        return (to_s - from_s) / self._mean_s(from_s)
