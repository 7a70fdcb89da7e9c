"""How long an operation takes, beside what it cannot beat."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

ROUNDS: Final = 7
ROUND_NS: Final = 30_000_000


class Row(NamedTuple):
    """A line of the table: bytes that one call works through, and what is called."""

    name: str
    nbytes: int
    call: Callable[[], object]
    wait: Callable[[], object] = lambda: None  # for a device to have done it


def best_ns(call: Callable[[], object], wait: Callable[[], object] = lambda: None) -> float:
    """Return the nanoseconds of a call in the best of a few rounds."""
    call()
    wait()
    count, best = 1, float("inf")
    for _ in range(ROUNDS):
        start_ns = time.perf_counter_ns()
        for _ in range(count):
            call()
        wait()
        took_ns = time.perf_counter_ns() - start_ns
        best = min(best, took_ns / count)
        count = max(1, int(ROUND_NS / best))
    return best


def lines(rows: Iterable[Row]) -> Iterator[str]:
    """Measure each and yield the lines of a table."""
    yield f"{'':44} {'us':>10} {'GB/s':>8}"
    for row in rows:
        ns = best_ns(row.call, row.wait)
        yield f"{row.name:44} {ns / 1e3:10,.1f} {row.nbytes / ns:8.2f}"
