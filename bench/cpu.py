"""CPU time of a tree of processes, of ourselves, and of the whole machine, from /proc."""

from __future__ import annotations

import os
import resource
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


def machine_seconds() -> float:
    """Return what all processes and the kernel have used, and what the host took from us."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields)
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def own_seconds() -> float:
    """Return what this process has used, and its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def idle_share(family: Callable[[], list[Row]], seconds: float) -> float:
    """Return how many cores a server uses while nobody asks it anything."""
    before, started = seconds_of(family()), time.monotonic()
    time.sleep(seconds)
    return max(0.0, seconds_of(family()) - before) / (time.monotonic() - started)
