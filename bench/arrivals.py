"""When requests are meant to start.

In a closed loop a connection sends its next request when it has its answer: a slow server is asked
less.  In an open loop requests start at times that do not depend on the server, as users do, and a
request's time is counted from its intended start: what waits behind a stall shows.

Invariants
 1. A schedule's times do not decrease, and depend on the plan, the seed and the part alone.
 2. The schedules of all parts together have the plan's rate; of a trace, each row is in one part.

Pure but for the reading of a trace.  Called by `pacer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from overcommit.bench.errors import BenchError
from overcommit.bench.traces import read_seconds

_BLOCK: Final = 1024
QUEUE_MAX: Final = 100_000


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """The next request when the answer is there."""


class Poisson(msgspec.Struct, frozen=True, kw_only=True, tag="poisson"):
    """Independent users: exponential gaps."""

    rate: float  # requests a second, over all processes


class Uniform(msgspec.Struct, frozen=True, kw_only=True, tag="uniform"):
    """Equal gaps."""

    rate: float


class Burst(msgspec.Struct, frozen=True, kw_only=True, tag="burst"):
    """Poisson, of one rate for `on_s` seconds and of another for `off_s`, in turn."""

    rate: float
    on_s: float = 1.0
    off_s: float = 1.0
    off_rate: float = 0.0


class Trace(msgspec.Struct, frozen=True, kw_only=True, tag="trace"):
    """A CSV column of seconds or ISO timestamps; ends with the file."""

    path: str
    column: str = ""
    speed: float = 1.0  # 2: twice as fast


Arrivals = Closed | Poisson | Uniform | Burst | Trace


class Schedule:
    """The starts of one process's requests, in nanoseconds since the run's start."""

    def __init__(self, plan: Arrivals, seed: int, part: int = 0, parts: int = 1) -> None:
        self._blocks = _blocks(plan, seed, part, parts)
        self._block: list[int] = []
        self._at = 0

    def next_ns(self) -> int | None:
        """Return the next start without taking it; None at the end of a trace."""
        while self._at == len(self._block):
            block = next(self._blocks, None)
            if block is None:
                return None
            self._block, self._at = (block * 1e9).astype(np.int64).tolist(), 0
        return self._block[self._at]

    def take(self, until_ns: int) -> list[int]:
        """Take every start up to then."""
        taken: list[int] = []
        while (start_ns := self.next_ns()) is not None and start_ns <= until_ns:
            taken.append(start_ns)
            self._at += 1
        return taken


def _blocks(plan: Arrivals, seed: int, part: int, parts: int) -> Iterator[NDArray[np.float64]]:
    """Yield starts in seconds."""
    if isinstance(plan, Closed):
        raise BenchError("a closed loop has no schedule")
    if isinstance(plan, Trace):
        _check(plan.speed > 0, "the speed of a trace must be over 0")
        return iter([read_seconds(Path(plan.path), plan.column)[part::parts] / plan.speed])
    _check(plan.rate > 0, "the rate of an open loop must be over 0")
    if isinstance(plan, Uniform):
        return _uniform(plan.rate, part, parts)
    if isinstance(plan, Poisson):
        return _units(seed, plan.rate / parts)
    _check(plan.on_s > 0 and plan.off_s >= 0 <= plan.off_rate, "a burst cannot be so long")
    return _bursts(plan, seed, parts)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise BenchError(message)


def _uniform(rate: float, part: int, parts: int) -> Iterator[NDArray[np.float64]]:
    number = 0
    while True:
        yield (np.arange(number, number + _BLOCK) * parts + part) / rate
        number += _BLOCK


def _units(seed: int, rate: float) -> Iterator[NDArray[np.float64]]:
    """Yield the points of a Poisson process."""
    random = np.random.default_rng((seed, 2))
    last = 0.0
    while True:
        points = last + np.cumsum(random.exponential(1 / rate, _BLOCK))
        last = float(points[-1])
        yield points


def _bursts(plan: Burst, seed: int, parts: int) -> Iterator[NDArray[np.float64]]:
    """Yield a process of unit rate, mapped through the inverse of the expected count."""
    on, off = plan.rate * plan.on_s / parts, plan.off_rate * plan.off_s / parts
    period_s = plan.on_s + plan.off_s
    for points in _units(seed, 1.0):
        periods, rest = np.divmod(points, on + off)
        in_burst = rest * parts / plan.rate
        after = plan.on_s + (rest - on) * parts / (plan.off_rate or 1.0)
        yield periods * period_s + np.where(rest < on, in_burst, after)
