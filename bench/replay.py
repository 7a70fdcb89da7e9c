"""Scenario `replay`: eviction policies over a trace, with the server's own classes, beside bounds.

The policies of the server are driven through a trace (`simulate`), for several laws of sizes
(`assignments`) and sizes of the cache, beside Belady and PFOO-L (`bounds`).  What counts is the time
that requests would have waited for loads, relative to LRU's.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

import numpy as np

from overcommit.bench import catalogue_trace, screen
from overcommit.bench.assignments import ASSIGNMENTS, TITLES
from overcommit.bench.bounds import belady, pfoo_l
from overcommit.bench.catalogue_trace import Request, make_trace
from overcommit.bench.prepare import Options
from overcommit.bench.report import Figure, Report
from overcommit.bench.simulate import BYTES_PER_S, FIXED_S, simulate
from overcommit.runtime.policy import POLICIES

SHARES: Final = (0.06, 0.13, 0.25)  # of all bytes, that a cache has
BASE: Final = "lru"
BEST: Final = "cost_aware"
RATIO_MAX: Final = 0.90  # in the median
FIT_MAX: Final = 0.03
SEEDS: Final = 3
QUICK_REQUESTS: Final = 8000


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    requests = QUICK_REQUESTS if options.quick else catalogue_trace.REQUESTS
    seeds = range(options.seed, options.seed + (1 if options.quick else SEEDS))
    report.settings = {
        "requests": requests,
        "models": catalogue_trace.MODELS,
        "seeds": len(seeds),
        "cache, of all bytes": ", ".join(f"{share:.0%}" for share in SHARES),
        "a load": f"{FIXED_S * 1e3:.0f} ms + {BYTES_PER_S / 1e9:.0f} GB/s",
    }
    _check_trace(report, make_trace(options.seed))
    ratios: dict[str, list[float]] = {name: [] for name in POLICIES}
    cells = [(a, s, seed) for a in ASSIGNMENTS for s in SHARES for seed in seeds]
    rows: dict[tuple[str, float], list[dict[str, float]]] = {}
    with screen.bar(report.console, "replaying") as advance:
        for done, (assignment, share, seed) in enumerate(cells):
            advance(done, len(cells))
            trace = make_trace(seed, requests)
            sizes = ASSIGNMENTS[assignment](np.random.default_rng(seed), catalogue_trace.MODELS)
            capacity = max(int(share * sum(sizes)), max(sizes))
            base = simulate(BASE, trace, sizes, capacity).load_s
            row = {
                name: simulate(name, trace, sizes, capacity).load_s / base
                for name in POLICIES
                if name != BASE
            }
            for name, ratio in row.items():
                ratios[name].append(ratio)
            row["Belady"] = belady(trace, sizes, capacity).load_s / base
            row["PFOO-L"] = pfoo_l(trace, sizes, capacity) / base
            rows.setdefault((assignment, share), []).append(row)
    for (assignment, share), found in rows.items():
        title = f"load time / LRU's: {TITLES[assignment]}, cache {share:.0%}"
        for name in found[0]:
            values = [row[name] for row in found]
            note = f"{min(values):.2f}..{max(values):.2f}"
            report.add(title, Figure(name, round(statistics.median(values), 3), "x", note=note))
    best = ratios[BEST]
    median = statistics.median(best)
    report.headlines.append(
        (f"load time of {BEST} / LRU's", f"{median:.2f} ({min(best):.2f}..{max(best):.2f})", "")
    )
    report.expect(f"{BEST} is never above LRU", max(best) <= 1.0, f"at most {max(best):.3f}")
    report.expect(
        f"{BEST} is at most {RATIO_MAX} in the median", median <= RATIO_MAX, f"{median:.3f}"
    )


def _check_trace(report: Report, trace: Sequence[Request]) -> None:
    """The trace is like the one that was measured."""
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
