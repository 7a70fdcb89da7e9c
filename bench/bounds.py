"""What an eviction policy can be compared with: figures that know the future.

`belady` evicts what is needed last, by bytes x time until then for each second of load it saves: a
good heuristic with sizes, and optimal where sizes and costs are equal.  `pfoo_l` is a load time that
no policy can go below (Berger, Beckmann, Harchol-Balter, "Practical Bounds on Optimal Caching with
Variable Object Sizes", SIGMETRICS 2018): it spends the cache's bytes x time on the intervals between
uses that save most for it, without asking whether they fit together.

Pure; called by the scenario `replay`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from overcommit.bench.catalogue_trace import Request
from overcommit.bench.simulate import Outcome, cost_s


def next_uses(trace: Sequence[Request]) -> list[int]:
    """For each request, the position of the next one to its model; the trace's length if none."""
    following = [len(trace)] * len(trace)
    last: dict[int, int] = {}
    for position in range(len(trace) - 1, -1, -1):
        model = trace[position].model
        following[position] = last.get(model, len(trace))
        last[model] = position
    return following


def belady(
    trace: Sequence[Request],
    sizes: Sequence[int],
    capacity: int,
    cost: Callable[[int], float] = cost_s,
) -> Outcome:
    """Evict what is needed last; what would go next is not taken in."""
    following = next_uses(trace)
    held: dict[int, int] = {}  # model -> its next use
    used = misses = 0
    load_s = 0.0
    worth = [nbytes / cost(nbytes) for nbytes in sizes]
    for position, request in enumerate(trace):
        model = request.model
        if model not in held:
            misses += 1
            load_s += cost(sizes[model])
            if sizes[model] > capacity:
                continue
            used += sizes[model]
        held[model] = following[position]
        while used > capacity:
            worst = max(held, key=lambda m: (held[m] - position) * worth[m])
            used -= sizes[worst]
            del held[worst]
    return Outcome(misses, load_s)


def pfoo_l(
    trace: Sequence[Request],
    sizes: Sequence[int],
    capacity: int,
    cost: Callable[[int], float] = cost_s,
) -> float:
    """Return a load time that no policy can go below."""
    following = next_uses(trace)
    total = sum(cost(sizes[request.model]) for request in trace)
    intervals: list[tuple[float, int, float]] = []
    for position, request in enumerate(trace):
        if following[position] < len(trace) and sizes[request.model] <= capacity:
            spent = (following[position] - position) * sizes[request.model]
            saved = cost(sizes[request.model])
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
