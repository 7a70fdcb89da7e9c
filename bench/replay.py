"""Scenario `replay`: eviction policies over a trace, with the server's own classes, beside bounds.

The policies of the server are driven through a trace (`simulate`), for several laws of sizes
(`assignments`) and sizes of the cache, beside Belady and PFOO-L (`bounds`).  What counts is the time
that requests would have waited for loads, relative to LRU's.

Without a trace there are two generated ones: `stationary` is like one that was measured
(`catalogue_trace`), `drifting` has days, nights, weekends and models that come and go (`week_trace`).
`replay_ahead` adds prefetching, over traces of its own.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from overcommit.bench import (
    catalogue_trace,
    plots,
    replay_ahead,
    screen,
    trace_file,
    week_trace,
)
from overcommit.bench.assignments import ASSIGNMENTS, TITLES
from overcommit.bench.bounds import belady, pfoo_l
from overcommit.bench.catalogue_trace import Request
from overcommit.bench.errors import BenchError
from overcommit.bench.prepare import Options, ReplayPlan
from overcommit.bench.report import Figure, Report
from overcommit.bench.simulate import BYTES_PER_S, FIXED_S, simulate
from overcommit.runtime.errors import ConfigurationError
from overcommit.runtime.policy import POLICIES, Policy, make_policy
from overcommit.server.settings import parse_size

CACHES: Final = ("6%", "13%", "25%")
CURVE: Final = (0.02, 0.04, 0.06, 0.09, 0.13, 0.18, 0.25, 0.35, 0.5)
BASE: Final = "lru"
BEST: Final = "cost_aware"
RATIO_MAX: Final = 0.90  # in the median
FIT_MAX: Final = 0.03
SEEDS: Final = 3
QUICK_REQUESTS: Final = 8000
QUICK_DAYS: Final = 8
FROM_TRACE: Final = "trace"
STATIONARY: Final = "stationary"
BOUNDS: Final = ("Belady", "PFOO-L")

Sizes = list[int]
Rows = dict[tuple[str, str, str], list[dict[str, float]]]  # trace, sizes, cache -> a row a seed


@dataclass(slots=True, frozen=True)
class Work:
    """A trace, and the number of its models."""

    name: str
    seed: int
    trace: Sequence[Request]
    names: Sequence[str]
    sizes: Sizes | None = None  # as the trace says


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    plan = options.replay
    policies = _policies(plan)
    works = _works(options)
    laws = plan.sizes or ((FROM_TRACE,) if works[0].sizes else tuple(ASSIGNMENTS))
    caches = plan.caches or CACHES
    report.settings = {
        "requests": len(works[0].trace),
        "models": len(works[0].names),
        "seeds": len({work.seed for work in works}),
        "caches": ", ".join(caches),
        "a load": f"{FIXED_S * 1e3:.0f} ms + {BYTES_PER_S / 1e9:.0f} GB/s",
    }
    cells = [(work, law, cache) for law in laws for cache in caches for work in works]
    rows: Rows = {}
    with screen.bar(report.console, "replaying") as advance:
        for done, (work, law, cache) in enumerate(cells):
            advance(done, len(cells))
            sizes = _sizes(work, law)
            row = _replay(work.trace, sizes, _capacity(cache, sizes), policies)
            rows.setdefault((work.name, law, cache), []).append(row)
    _tell(report, rows)
    if plan.trace is None:
        _check(report, options, rows)
        replay_ahead.run(options, report)
    report.plots["ratios"] = functools.partial(
        plots.ratios, "load time relative to LRU's", _by_trace(rows)
    )
    for work in {work.name: work for work in works}.values():
        report.plots[f"misses-{work.name}"] = _miss_curve(work, _sizes(work, laws[0]), policies)


# --- what to replay -----------------------------------------------------------------------------
def _policies(plan: ReplayPlan) -> tuple[str, ...]:
    chosen = plan.policies or tuple(POLICIES)
    for name in chosen:
        _make(name)
    return tuple(name for name in chosen if name != BASE)


def _make(name: str) -> Policy:
    """Return a policy; `cost_aware:24` has a half-life of 24 hours."""
    base, _, hours = name.partition(":")
    try:
        return make_policy(base, float(hours) * 3600) if hours else make_policy(base)
    except ValueError as error:
        raise BenchError(f"the half-life of '{name}' is no number of hours") from error
    except ConfigurationError as error:
        raise BenchError(error.message) from error


def _works(options: Options) -> list[Work]:
    if options.replay.trace is not None:
        loaded = trace_file.read(options.replay.trace, options.seed)
        name = options.replay.trace.stem
        return [Work(name, options.seed, loaded.trace, loaded.names, loaded.sizes)]
    works = []
    for seed in range(options.seed, options.seed + (1 if options.quick else SEEDS)):
        requests, days = catalogue_trace.REQUESTS, week_trace.DAYS
        if options.quick:
            requests, days = QUICK_REQUESTS, QUICK_DAYS
        stationary = catalogue_trace.make_trace(seed, requests)
        works.append(Work(STATIONARY, seed, stationary, _numbers(catalogue_trace.MODELS)))
        drifting = week_trace.make_trace(seed, requests, days)
        works.append(Work("drifting", seed, drifting, _numbers(week_trace.MODELS)))
    return works


def _numbers(count: int) -> list[str]:
    return [f"model-{number}" for number in range(count)]


def _sizes(work: Work, law: str) -> Sizes:
    if law == FROM_TRACE:
        if work.sizes is None:
            raise BenchError(f"the trace '{work.name}' has no bytes; choose other --sizes")
        return work.sizes
    if law in ASSIGNMENTS:
        return ASSIGNMENTS[law](np.random.default_rng(work.seed), len(work.names))
    if not Path(law).exists():
        known = ", ".join((FROM_TRACE, *ASSIGNMENTS))
        raise BenchError(f"--sizes: '{law}' is neither a file nor one of {known}")
    by_name = trace_file.read_sizes(Path(law))
    missing = [name for name in work.names if name not in by_name]
    if missing:
        raise BenchError(f"the sizes {law} have no model '{missing[0]}'")
    return [by_name[name] for name in work.names]


def _capacity(cache: str, sizes: Sizes) -> int:
    """Bytes of a cache; one that is given as a share holds the largest model at least."""
    try:
        if cache.endswith("%"):
            return max(int(float(cache[:-1]) / 100 * sum(sizes)), max(sizes))
        return parse_size(cache)
    except ValueError as error:
        raise BenchError(f"--caches: '{cache}' is no share, as 6%, and no size: {error}") from error


# --- replaying ----------------------------------------------------------------------------------
def _replay(
    trace: Sequence[Request], sizes: Sizes, capacity: int, policies: Sequence[str]
) -> dict[str, float]:
    """Return load times relative to LRU's."""
    base = simulate(BASE, trace, sizes, capacity).load_s
    row = {name: simulate(_make(name), trace, sizes, capacity).load_s / base for name in policies}
    row["Belady"] = belady(trace, sizes, capacity).load_s / base
    row["PFOO-L"] = pfoo_l(trace, sizes, capacity) / base
    return row


def _miss_curve(work: Work, sizes: Sizes, policies: Sequence[str]) -> Callable[[Path], None]:
    def draw(path: Path) -> None:
        lines: dict[str, list[float]] = {}
        for share in CURVE:
            capacity = int(share * sum(sizes))
            outcomes = {
                n: simulate(_make(n), work.trace, sizes, capacity) for n in (BASE, *policies)
            }
            outcomes["Belady"] = belady(work.trace, sizes, capacity)
            for name, outcome in outcomes.items():
                lines.setdefault(name, []).append(outcome.misses / len(work.trace))
        plots.curves(f"misses: {work.name}", CURVE, lines, "share of requests that miss", path)

    return draw


# --- telling ------------------------------------------------------------------------------------
def _tell(report: Report, rows: Rows) -> None:
    for (trace, law, cache), found in rows.items():
        title = f"load time / LRU's: {trace}, {TITLES.get(law, law)}, cache {cache}"
        for name in found[0]:
            values = [row[name] for row in found]
            note = f"{min(values):.2f}..{max(values):.2f}" if len(values) > 1 else ""
            report.add(title, Figure(name, round(statistics.median(values), 3), "x", note=note))
    for trace, by_name in _by_trace(rows).items():
        for name, values in by_name.items():
            note = f"{min(values):.2f}..{max(values):.3f}"
            median = round(statistics.median(values), 3)
            report.add(f"all cells: {trace}, median", Figure(name, median, "x", note=note))


def _by_trace(rows: Rows) -> dict[str, dict[str, list[float]]]:
    by_trace: dict[str, dict[str, list[float]]] = {}
    for (trace, _, _), found in rows.items():
        for row in found:
            for name, value in row.items():
                by_trace.setdefault(trace, {}).setdefault(name, []).append(value)
    return by_trace


def _check(report: Report, options: Options, rows: Rows) -> None:
    _check_trace(report, catalogue_trace.make_trace(options.seed))
    best = {name: found[BEST] for name, found in _by_trace(rows).items() if BEST in found}
    for name, values in best.items():
        text = f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.3f})"
        report.headlines.append((f"{name}: load time of {BEST} / LRU's", text, ""))
        report.expect(
            f"{name}: {BEST} is never above LRU", max(values) <= 1.0, f"at most {max(values):.3f}"
        )
    if STATIONARY in best:
        median = statistics.median(best[STATIONARY])
        what = f"{STATIONARY}: {BEST} is at most {RATIO_MAX} in the median"
        report.expect(what, median <= RATIO_MAX, f"{median:.3f}")


def _check_trace(report: Report, trace: Sequence[Request]) -> None:
    """The stationary trace is like the one that was measured."""
    pairs = [
        (f"an LRU of {room} misses", catalogue_trace.lru_misses(trace, room), wanted)
        for room, wanted in catalogue_trace.TABLE.items()
    ]
    pairs += [
        (f"the first {count} have", catalogue_trace.top_share(trace, count), wanted)
        for count, wanted in catalogue_trace.TOPS.items()
    ]
    report.add("the trace, and what was measured", *(Figure(n, v, "share", w) for n, v, w in pairs))
    away = max(abs(value - wanted) for _, value, wanted in pairs)
    report.expect("the trace is like the measured one", away <= FIT_MAX, f"off by {away:.3f}")
