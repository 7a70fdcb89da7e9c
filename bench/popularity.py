"""Which model the next request asks for: Zipf, uniform, in turn, or as a trace says.

Under Zipf's law the model of rank r (from 1) is asked for with probability proportional to
`r ** -exponent`.  Which model has which rank is drawn too, by the same `order_seed` in every process
of a run, so that the names' order means nothing; what each process then draws depends on its own
`seed`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from overcommit.bench.traces import read_column

_BLOCK: Final = 1024  # draws made at once; more would be a pause that latencies show


class ByZipf(msgspec.Struct, frozen=True, kw_only=True, tag="zipf"):
    """A few models get most of the requests."""

    exponent: float = 1.1
    order_seed: int = 0


class ByUniform(msgspec.Struct, frozen=True, tag="uniform"):
    """Every model is as likely as the others."""


class InTurn(msgspec.Struct, frozen=True, tag="in_turn"):
    """Round robin: the worst for a cache that is too small."""


class ByTrace(msgspec.Struct, frozen=True, kw_only=True, tag="trace"):
    """A column of a CSV file, from the top again at its end.

    Equal cells are one model; models are numbered by their first appearance, and those over the
    workload's count start at 0 again.
    """

    path: str
    column: str = ""


Popularity = ByZipf | ByUniform | InTurn | ByTrace


class Draws(Protocol):
    """An endless sequence of model numbers in `range(count)`."""

    def draw(self) -> int:
        """Return the next model number."""
        ...


class Zipf:
    """See `ByZipf`; with exponent 0, uniform."""

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


class Turns:
    """The numbers of a list, in order, for ever."""

    def __init__(self, numbers: list[int], start: int = 0, step: int = 1) -> None:
        self._numbers = numbers
        self._at = start % len(numbers)
        self._step = step

    def draw(self) -> int:
        """Return the next model number."""
        number = self._numbers[self._at]
        self._at = (self._at + self._step) % len(self._numbers)
        return number


def make_draws(plan: Popularity, count: int, seed: int, part: int = 0, parts: int = 1) -> Draws:
    """Build what a plan names; `part` of `parts` is this process's place in the load."""
    if isinstance(plan, ByZipf):
        return Zipf(count, plan.exponent, seed=seed, order_seed=plan.order_seed)
    if isinstance(plan, ByUniform):
        return Zipf(count, 0.0, seed=seed)
    if isinstance(plan, InTurn):
        return Turns(list(range(count)), start=part * count // parts)
    seen: dict[str, int] = {}
    cells = read_column(Path(plan.path), plan.column)
    numbers = [seen.setdefault(cell, len(seen)) % count for cell in cells]
    return Turns(numbers, start=part, step=parts)
