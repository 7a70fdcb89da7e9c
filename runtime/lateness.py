"""How much longer than its least time something takes, so that most of it is over by then.

What is told to clients as the time to come back has to hold for most of them: a mean holds for half.
So a quantile of the ratios (of the time that it took to the least that was foreseen) is followed: up by
a step with each ratio above it, down by a smaller one with each below, in the proportion of the shares.

Invariants
 1. `factor` is from 1 to FACTOR_MAX.
 2. Of ratios that come from one law, about QUANTILE are below it once it has settled.

Source: stochastic approximation of a quantile (Robbins, Monro 1951), with steps that are factors.
Pure.  Owned by the queue of wishes.
"""

from __future__ import annotations

from typing import Final

QUANTILE: Final = 0.85
STEP: Final = 0.1
FACTOR_MAX: Final = 4.0
_UP: Final = 1.0 + STEP * QUANTILE
_DOWN: Final = 1.0 + STEP * (1.0 - QUANTILE)


class Lateness:
    """See the module."""

    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0

    def note(self, ratio: float) -> None:
        """It took so many times its least time."""
        factor = self.factor * _UP if ratio > self.factor else self.factor / _DOWN
        self.factor = min(FACTOR_MAX, max(1.0, factor))
