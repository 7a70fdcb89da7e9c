"""Scenario `replay`: eviction policies over a trace, with the server's own classes, beside bounds.

A cache of bytes is driven through the trace by a policy and the `Order` that the server's rooms use.
What counts is the time that requests would have waited for loads.  Beside it stand two offline
figures: Belady's rule with sizes (evict what is needed last; a good heuristic, not optimal, where
sizes differ) and PFOO-L, which no policy can reach (Berger, Beckmann, Harchol-Balter, "Practical
Bounds on Optimal Caching with Variable Object Sizes", SIGMETRICS 2018): it spends the cache's bytes
x time on the intervals between uses that save most for it, without asking whether they fit together.

What a load costs is known here: so the ratios say what a policy decides, not what a disk did.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from overcommit.bench import catalogue_trace, screen
from overcommit.bench.catalogue_trace import Request, make_trace
from overcommit.bench.prepare import Options
from overcommit.bench.report import Figure, Report
from overcommit.runtime.policy import POLICIES, Order, Policy, make_policy

GB: Final = 10**9
MODEL_SIZES_GB: Final = (2.1, 6.9, 13.0, 23.8)
SHARES: Final = (0.06, 0.13, 0.25)  # of all bytes, that a cache has
FIXED_S: Final = 0.03
BYTES_PER_S: Final = 50e9
BASE: Final = "lru"
BEST: Final = "cost_aware"
RATIO_MAX: Final = 0.90  # in the median
FIT_MAX: Final = 0.03
SEEDS: Final = 3
QUICK_REQUESTS: Final = 8000


@dataclass(slots=True, frozen=True)
class Outcome:
    """What a policy did with a trace."""

    misses: int
    load_s: float


def cost_s(nbytes: int) -> float:
    """Seconds that a load takes."""
    return FIXED_S + nbytes / BYTES_PER_S


def simulate(name: str, trace: Sequence[Request], sizes: Sequence[int], capacity: int) -> Outcome:
    """Run a policy; a model larger than the cache is loaded and not kept."""
    policy = make_policy(name)
    for model, nbytes in enumerate(sizes):
        policy.on_add(model, nbytes, 0)
    order = Order(policy)
    held: set[int] = set()
    uses = [0] * len(sizes)
    used = misses = 0
    load_s = 0.0
    for request in trace:
        model, now_ns = request.model, int(request.time_s * 1e9)
        if model not in held:
            misses += 1
            load_s += cost_s(sizes[model])
            if sizes[model] <= capacity:
                used -= _make_room(policy, order, held, sizes, used + sizes[model] - capacity)
                used += sizes[model]
                held.add(model)
                policy.on_load(model, int(cost_s(sizes[model]) * 1e9))
                order.add(model)
        uses[model] += 1
        policy.on_use(model, uses[model], now_ns)
    return Outcome(misses, load_s)


def _make_room(
    policy: Policy, order: Order, held: set[int], sizes: Sequence[int], missing: int
) -> int:
    """Evict until so many bytes are free; of what was chosen, the most precious that may stay do."""
    if missing <= 0:
        return 0
    chosen: list[int] = []
    freed = 0
    victims = order.victims()
    for model in victims:
        chosen.append(model)
        freed += sizes[model]
        if freed >= missing:
            break
    victims.close()
    for model in reversed(chosen):
        if freed - sizes[model] >= missing:
            freed -= sizes[model]
            chosen.remove(model)
    for model in chosen:
        order.discard(model)
        held.discard(model)
        policy.on_evict(model)
    return freed


def next_uses(trace: Sequence[Request]) -> list[int]:
    """For each request, the position of the next one to its model; the trace's length if none."""
    following = [len(trace)] * len(trace)
    last: dict[int, int] = {}
    for position in range(len(trace) - 1, -1, -1):
        model = trace[position].model
        following[position] = last.get(model, len(trace))
        last[model] = position
    return following


def belady(trace: Sequence[Request], sizes: Sequence[int], capacity: int) -> Outcome:
    """Evict what is needed last, by bytes x time until then; what would go next is not taken in."""
    following = next_uses(trace)
    held: dict[int, int] = {}  # model -> its next use
    used = misses = 0
    load_s = 0.0
    for position, request in enumerate(trace):
        model = request.model
        if model not in held:
            misses += 1
            load_s += cost_s(sizes[model])
            if sizes[model] > capacity:
                continue
            used += sizes[model]
        held[model] = following[position]
        while used > capacity:
            worst = max(held, key=lambda m: (held[m] - position) * sizes[m] / cost_s(sizes[m]))
            used -= sizes[worst]
            del held[worst]
    return Outcome(misses, load_s)


def pfoo_l(trace: Sequence[Request], sizes: Sequence[int], capacity: int) -> float:
    """Return a load time that no policy can go below."""
    following = next_uses(trace)
    total = sum(cost_s(sizes[request.model]) for request in trace)
    intervals: list[tuple[float, int, float]] = []
    for position, request in enumerate(trace):
        if following[position] < len(trace) and sizes[request.model] <= capacity:
            spent = (following[position] - position) * sizes[request.model]
            saved = cost_s(sizes[request.model])
            intervals.append((spent / saved, spent, saved))
    heapq.heapify(intervals)
    left = capacity * len(trace)
    while intervals:
        _, spent, saved = heapq.heappop(intervals)
        if spent > left:
            return total - saved * left / spent
        left -= spent
        total -= saved
    return total


# --- sizes --------------------------------------------------------------------------------------
def _uniform(random: np.random.Generator, count: int) -> list[int]:
    return [8 * GB] * count


def _drawn(random: np.random.Generator, count: int) -> list[int]:
    return [int(size * GB) for size in random.choice(MODEL_SIZES_GB, size=count)]


def _popular_large(random: np.random.Generator, count: int) -> list[int]:
    return [int(24 * GB / (1 + 11 * rank / count)) for rank in range(count)]


def _popular_small(random: np.random.Generator, count: int) -> list[int]:
    return list(reversed(_popular_large(random, count)))


def _lognormal(random: np.random.Generator, count: int) -> list[int]:
    sizes = np.exp(random.normal(1.5, 1.0, size=count)).clip(0.05, 60)
    return [int(size * GB) for size in sizes]


ASSIGNMENTS: Final[dict[str, Callable[[np.random.Generator, int], list[int]]]] = {
    "equal sizes": _uniform,
    "2.1 to 23.8 GB at random": _drawn,
    "lognormal": _lognormal,
    "the popular are large": _popular_large,
    "the popular are small": _popular_small,
}


# --- the scenario -------------------------------------------------------------------------------
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
        title = f"load time / LRU's: {assignment}, cache {share:.0%}"
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
