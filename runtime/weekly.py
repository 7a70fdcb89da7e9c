"""In which hours of the week one model is asked for.

A cell for each of the 168 hours: the share of the weeks in which the model was used in that hour, in
1/255, the last weeks counting most.  Weeks are few and habits are simpler than 168 numbers, so an
hour's chance is drawn from three places: this very hour of the week, the same hour on days of the
same kind (from Monday to Friday, or the weekend), and the average of all hours, the less the more is known.

`lift` is an hour's chance against the average hour's: it says how a rate is to be bent.

Invariants
 1. Hours are counted from the epoch, in local time, and only forwards; an hour is folded into its
    cell once, when it is over.
 2. The work for a model that was left alone for long is bounded (FOLD_HOURS_MAX).
 3. A lift is in [LIFT_MIN, LIFT_MAX].

Pure.  Called by `demand`.
"""

from __future__ import annotations

from typing import Final

HOURS: Final = 168
FOLD_HOURS_MAX: Final = 4 * HOURS  # after so many idle hours nothing is left of what was known
HOUR_S: Final = 3600
LIFT_MIN: Final = 0.02
LIFT_MAX: Final = 50.0
_WEEKS_MAX: Final = 4  # a cell's memory
_KIND_WEIGHT: Final = 1.0  # of the days of this kind, in weeks of the cell itself
_MEAN_WEIGHT: Final = 0.3  # of the average hour, in days of this kind
_WORKDAYS: Final = range(5)
_WEEKEND: Final = range(5, 7)


def cell_of(hour: int) -> int:
    """Return the hour of the week, Monday's first is 0; the epoch was a Thursday."""
    return (hour + 3 * 24) % HOURS


class Weekly:
    """One model's week."""

    __slots__ = ("_lifts", "born", "cells", "hour", "is_used")

    def __init__(self, hour: int) -> None:
        self.cells = bytearray(HOURS)
        self.born = hour  # the first hour that was watched
        self.hour = hour  # the one that is not over yet
        self.is_used = False
        self._lifts: tuple[float, float] | None = None  # of this hour and the next

    def use(self, hour: int) -> None:
        """The model was used in this hour."""
        self.pass_to(hour)
        if hour == self.hour:
            self.is_used = True

    def pass_to(self, hour: int) -> None:
        """Fold every hour before this one into its cell."""
        if hour <= self.hour:
            return
        self._lifts = None
        if hour - self.hour > FOLD_HOURS_MAX:
            self.__init__(hour)  # type: ignore[misc]
            return
        cells, is_used = self.cells, self.is_used
        for past in range(self.hour, hour):
            weeks = (past - self.born) // HOURS + 1  # this one included
            cell = (past + 72) % HOURS
            old = cells[cell]
            if is_used or old:
                step = 1 / min(weeks, _WEEKS_MAX)
                cells[cell] = round(old + ((255 if is_used else 0) - old) * step)
            is_used = False
        self.hour, self.is_used = hour, False

    def lift(self, hour: int) -> float:
        """Return how much likelier a use in this hour is than in an average one."""
        # This hour and the next are asked for again and again.
        ahead = hour - self.hour
        if ahead not in (0, 1):
            return self._lift(hour)
        if self._lifts is None:
            self._lifts = self._lift(self.hour), self._lift(self.hour + 1)
        return self._lifts[ahead]

    def _lift(self, hour: int) -> float:
        seen = min(self.hour - self.born, HOURS)
        mean = sum(self.cells) / seen if seen else 0.0
        if not mean:
            return 1.0
        cell = cell_of(hour)
        day, time = divmod(cell, 24)
        now = cell_of(self.hour)
        kind = _WEEKEND if day >= 5 else _WORKDAYS
        found = days = 0
        for other in kind:
            index = other * 24 + time
            if (now - index - 1) % HOURS < seen:
                days += 1
                found += self.cells[index]
        chance = (found + _MEAN_WEIGHT * mean) / (days + _MEAN_WEIGHT)
        if (now - cell - 1) % HOURS < seen:
            weeks = min((self.hour - self.born - (now - cell) % HOURS) // HOURS + 1, _WEEKS_MAX)
            chance = (self.cells[cell] * weeks + chance * _KIND_WEIGHT) / (weeks + _KIND_WEIGHT)
        return min(LIFT_MAX, max(LIFT_MIN, chance / mean))
