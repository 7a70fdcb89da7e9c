"""What a piece of work costs, learned from pieces like it.

A cost is a straight line over a size: of a batch over its rows, of a load over its bytes.  The line
is fitted by least squares with weights that fade, so it follows a machine that gets slower; neither
its start nor its slope is ever negative.

Invariants
 1. Nothing is said before FIRST_MAX + 1 pieces were seen: the first of its kind pays for what the
    others find in place (page faults, imports), and a guess would be believed.
 2. `of` does not fall when the size grows.
 3. One piece that took long (the process was not scheduled) counts as at most OUTLIER times what
    was expected of it.

Pure.  Called by the batcher and by admission.
"""

from __future__ import annotations

from typing import Final

FIRST_MAX: Final = 1
FADE: Final = 0.95  # of a piece's weight, with every piece that follows
OUTLIER: Final = 4.0


class Pace:
    """Cost in ns over size, both of anything."""

    __slots__ = ("_seen", "_w", "_x", "_xx", "_xy", "_y", "slope_ns", "start_ns")

    def __init__(self) -> None:
        self._seen = 0
        self._w = self._x = self._y = self._xx = self._xy = 0.0
        self.start_ns = 0.0
        self.slope_ns = 0.0

    def __repr__(self) -> str:
        return f"<Pace {self.start_ns:.0f} ns + {self.slope_ns:.3f} ns, {self._seen} seen>"

    @property
    def is_known(self) -> bool:
        """Whether anything can be said."""
        return self._seen > FIRST_MAX

    def note(self, size: float, cost_ns: float) -> None:
        """Take note of a piece of this size."""
        self._seen += 1
        if self._seen <= FIRST_MAX:
            return
        if self._seen > FIRST_MAX + 1:
            cost_ns = min(cost_ns, OUTLIER * (self.start_ns + self.slope_ns * size))
        self._w = self._w * FADE + 1.0
        self._x = self._x * FADE + size
        self._y = self._y * FADE + cost_ns
        self._xx = self._xx * FADE + size * size
        self._xy = self._xy * FADE + size * cost_ns
        spread = self._w * self._xx - self._x * self._x
        # Sizes that hardly differ say nothing of the slope: the cost is then the mean.
        slope = 0.0
        if spread > 1e-6 * self._w * self._xx:
            slope = (self._w * self._xy - self._x * self._y) / spread
        start = (self._y - slope * self._x) / self._w
        if slope < 0.0:
            slope, start = 0.0, self._y / self._w
        elif start < 0.0:
            slope, start = self._xy / self._xx, 0.0
        self.slope_ns, self.start_ns = slope, start

    def of(self, size: float, pieces: int = 1) -> float:
        """Return the cost of so many pieces that have this size together, 0 while unknown."""
        return pieces * self.start_ns + self.slope_ns * size
