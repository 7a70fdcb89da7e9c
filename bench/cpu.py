"""CPU time of a tree of processes, from /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from overcommit.bench.processes import Row

TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def seconds_of(rows: list[Row]) -> float:
    """Return what these processes have used, and their children that were waited for.

    A process that dies without being waited for by one of them takes its time with it.
    """
    ticks = 0
    for row in rows:
        try:
            text = Path(f"/proc/{row.pid}/stat").read_text()
        except OSError:
            continue
        fields = text.rpartition(")")[2].split()
        ticks += sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime
    return ticks / TICKS_PER_S


def idle_share(family: Callable[[], list[Row]], seconds: float) -> float:
    """Return how many cores a server uses while nobody asks it anything."""
    before, started = seconds_of(family()), time.monotonic()
    time.sleep(seconds)
    return max(0.0, seconds_of(family()) - before) / (time.monotonic() - started)
