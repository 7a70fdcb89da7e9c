"""Which model the next request asks for: a seeded Zipf law.

The model of rank r (from 1) is asked for with probability proportional to `r ** -exponent`.  Which
model has which rank is drawn too, by the same `order_seed` in every process of a run, so that the
names' order means nothing; what each process then draws depends on its own `seed`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_BLOCK: Final = 8192  # draws made at once


class Zipf:
    """An endless sequence of model numbers in `range(count)`."""

    def __init__(self, count: int, exponent: float, *, seed: int, order_seed: int = 0) -> None:
        weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
        self.by_rank: NDArray[np.int64] = np.random.default_rng(order_seed).permutation(count)
        self.probabilities: NDArray[np.float64] = weights / weights.sum()
        self._random = np.random.default_rng(seed)
        self._block: list[int] = []

    def draw(self) -> int:
        """Return the next model number."""
        if not self._block:
            ranks = self._random.choice(len(self.by_rank), size=_BLOCK, p=self.probabilities)
            self._block = self.by_rank[ranks].tolist()
        return self._block.pop()
