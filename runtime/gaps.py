"""How long one model is left alone between two visits: a histogram on a logarithmic scale.

The hybrid histogram policy of Shahrad et al., "Serverless in the Wild", ATC 2020, keeps 240 bins of a
minute for each application and has ARIMA for what lies beyond four hours.  Here the bins grow with
the gap, a quarter of an octave each, so that 64 bytes reach from a minute to 45 days.

Invariants
 1. A row is BINS bytes and never overflows: what is counted fades by half when the row is full, so
    it remembers about GAPS_REMEMBERED gaps.
 2. `survival` falls with the gap and is never 0: a gap that was never seen remains possible.

Pure.  Called by `demand`.
"""

from __future__ import annotations

import math
from typing import Final

BINS: Final = 64
SHORTEST_S: Final = 60.0  # where the first bin begins
BINS_PER_OCTAVE: Final = 4
GAPS_REMEMBERED: Final = 48
_GAP: Final = 4  # what one gap counts, spread over three bins
_FULL: Final = GAPS_REMEMBERED * _GAP
_PRIOR: Final = 4.0  # one gap, of which is known what the pool says
_POOLED: Final = 0.5  # of the prior; the rest is spread evenly, for what no model has done yet
_DENSITY: Final = BINS_PER_OCTAVE / math.log(2)
_LEAST: Final = 1e-9


def place(gap_s: float) -> float:
    """Return where a gap lies on the scale, from 0 to BINS."""
    if gap_s <= SHORTEST_S:
        return 0.0
    return min(BINS - 1e-6, math.log2(gap_s / SHORTEST_S) * BINS_PER_OCTAVE)


def count(bins: bytearray, gap_s: float) -> None:
    """Take note of a gap; its neighbours get a quarter each, for no period is exact."""
    if sum(bins) >= _FULL:
        for index, value in enumerate(bins):
            bins[index] = value >> 1
    index = int(place(gap_s))
    bins[index] += 2
    bins[max(0, index - 1)] += 1
    bins[min(BINS - 1, index + 1)] += 1


class Pool:
    """What all models do after their first visits: what is expected of one that is not known yet."""

    def __init__(self) -> None:
        self._bins = bytearray(BINS)
        self.share = [1 / BINS] * BINS
        self.tail = [1 - index / BINS for index in range(BINS + 1)]  # what lies beyond each bin

    def count(self, gap_s: float) -> None:
        """Take note of a young model's gap."""
        count(self._bins, gap_s)
        seen = sum(self._bins)
        left = 1.0
        for index, value in enumerate(self._bins):
            self.share[index] = _POOLED * value / seen + (1 - _POOLED) / BINS
            self.tail[index] = left
            left -= self.share[index]
        self.tail[BINS] = 0.0


def survival(bins: bytearray, gap_s: float, pool: Pool) -> float:
    """Return the weight of the gaps that are longer than this; only ratios of it mean anything."""
    at = place(gap_s)
    index = int(at)
    left = index + 1 - at
    prior = pool.tail[index + 1] + pool.share[index] * left
    return sum(bins[index + 1 :]) + bins[index] * left + _PRIOR * max(prior, _LEAST)


def has_longer(bins: bytearray, gap_s: float) -> bool:
    """Whether a gap of this length, or a longer one, is remembered."""
    return any(bins[int(place(gap_s)) :])


def density(bins: bytearray, gap_s: float, pool: Pool) -> float:
    """Return the weight of the gaps of just this length, per second."""
    index = int(place(gap_s))
    return (bins[index] + _PRIOR * pool.share[index]) * _DENSITY / max(gap_s, SHORTEST_S)
