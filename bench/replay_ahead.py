"""The part of the scenario `replay` that is about prefetching: with habits and without.

The default policy with and without the server's prefetching (`foresight`), over traces with habits and
without any (`habit_traces`, `catalogue_trace`, `week_trace`).  How much of the gap between LRU and
Belady with sizes it closes is (LRU - it) / (LRU - Belady); the gap of the policy alone is beside it.
Belady loads on demand only, so it is no bound for whoever loads ahead: more than the whole gap can be
closed.

A prefetch takes the load path for as long as a load takes; a request that comes meanwhile waits for the
rest.  The days in which habits are learnt count.

Called by `replay`.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Final

import numpy as np

from overcommit.bench import catalogue_trace, habit_traces, screen, week_trace
from overcommit.bench.assignments import ASSIGNMENTS
from overcommit.bench.bounds import belady
from overcommit.bench.catalogue_trace import Request
from overcommit.bench.foresight import Foresight
from overcommit.bench.prepare import Options
from overcommit.bench.report import Figure, Report
from overcommit.bench.simulate import Outcome, simulate

BASE: Final = "lru"
POLICY: Final = "cost_aware"
SHARES: Final = (0.06, 0.13, 0.25)
QUICK_SHARES: Final = (0.13,)
LAW: Final = "lognormal"
WITH_HABITS: Final = ("hours", "jobs", "sets")
SOME_HABITS: Final = ("office", "drifting")
WITHOUT: Final = ("poisson", "stationary")
CLOSED_MIN: Final = 0.5  # of the gap, in the median of a trace's caches
LOST_MAX: Final = 1.01
QUICK_LOST_MAX: Final = 1.02  # a short trace has as much to learn as a long one
QUICK_DAYS: Final = 14
QUICK_REQUESTS: Final = 8000


@dataclass(slots=True, frozen=True)
class Cell:
    """One trace and cache; load times in seconds."""

    lru_s: float
    alone_s: float
    ahead_s: float
    belady_s: float
    outcome: Outcome

    @property
    def ratio(self) -> float:
        """Load time with prefetching, relative to the policy alone."""
        return self.ahead_s / self.alone_s

    @property
    def closed(self) -> float:
        """The share of the gap between LRU and Belady that is closed with prefetching."""
        return (self.lru_s - self.ahead_s) / (self.lru_s - self.belady_s)

    @property
    def closed_alone(self) -> float:
        """The same without."""
        return (self.lru_s - self.alone_s) / (self.lru_s - self.belady_s)


def run(options: Options, report: Report) -> None:
    """Run it and add rows and conditions."""
    names = (*WITH_HABITS, *SOME_HABITS, *WITHOUT)
    shares = QUICK_SHARES if options.quick else SHARES
    cells: dict[str, list[Cell]] = {name: [] for name in names}
    with screen.bar(report.console, "replaying with prefetch") as advance:
        for done, (name, share) in enumerate((n, s) for n in names for s in shares):
            advance(done, len(names) * len(shares))
            trace, models = _trace(name, options)
            cell = replay(trace, models, share, options.seed)
            cells[name].append(cell)
            _tell(report, f"{name}, cache {share:.0%}", cell)
    for name in WITH_HABITS:
        closed = [cell.closed for cell in cells[name]]
        report.expect(
            f"{name}: prefetch closes half of the gap between LRU and Belady, in the median",
            statistics.median(closed) >= CLOSED_MIN,
            ", ".join(f"{value:.2f}" for value in closed),
        )
    for name in (*SOME_HABITS, *WITHOUT):
        lost_max = QUICK_LOST_MAX if options.quick else LOST_MAX
        ratios = [cell.ratio for cell in cells[name]]
        report.expect(
            f"{name}: prefetch loses nothing, in the median",
            statistics.median(ratios) <= lost_max,
            ", ".join(f"{ratio:.3f}" for ratio in ratios),
        )
    everything = [cell.closed for name in WITH_HABITS for cell in cells[name]]
    report.headlines.append(
        (
            "gap between LRU and Belady closed with prefetch, where there are habits",
            f"{statistics.median(everything):.2f} ({min(everything):.2f}..{max(everything):.2f})",
            "",
        )
    )


def replay(trace: list[Request], models: int, share: float, seed: int) -> Cell:
    """Replay one trace through a cache that has this share of all bytes."""
    sizes = ASSIGNMENTS[LAW](np.random.default_rng(seed), models)
    capacity = max(int(share * sum(sizes)), max(sizes))
    ahead = simulate(POLICY, trace, sizes, capacity, Foresight(trace[0].time_s))
    return Cell(
        lru_s=simulate(BASE, trace, sizes, capacity).load_s,
        alone_s=simulate(POLICY, trace, sizes, capacity).load_s,
        ahead_s=ahead.load_s,
        belady_s=belady(trace, sizes, capacity).load_s,
        outcome=ahead,
    )


def _trace(name: str, options: Options) -> tuple[list[Request], int]:
    requests = QUICK_REQUESTS if options.quick else catalogue_trace.REQUESTS
    days = QUICK_DAYS if options.quick else habit_traces.DAYS
    if name == "stationary":
        return catalogue_trace.make_trace(options.seed, requests), catalogue_trace.MODELS
    if name == "drifting":
        return week_trace.make_trace(options.seed, requests, days), week_trace.MODELS
    return habit_traces.make_trace(name, options.seed, days), habit_traces.MODELS


def _tell(report: Report, title: str, cell: Cell) -> None:
    outcome = cell.outcome
    used = outcome.prefetches_used / max(1, outcome.prefetches)
    report.add(
        f"prefetch: {title}",
        Figure("load time / LRU's: policy alone", round(cell.alone_s / cell.lru_s, 3), "x"),
        Figure("load time / LRU's: with prefetch", round(cell.ahead_s / cell.lru_s, 3), "x"),
        Figure("load time / LRU's: Belady", round(cell.belady_s / cell.lru_s, 3), "x"),
        Figure("of the gap to Belady closed: policy alone", round(cell.closed_alone, 2), "share"),
        Figure("of the gap to Belady closed: with prefetch", round(cell.closed, 2), "share"),
        Figure("prefetches that were used", round(used, 2), "share"),
        Figure("prefetches", outcome.prefetches, ""),
    )
