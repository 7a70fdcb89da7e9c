"""Scenario `micro`: what one step of the data path costs, in nanoseconds.

Each operation is measured in rounds, and the rounds of all operations alternate, so that a neighbour
who takes the machine for a while spoils a round of each rather than all rounds of one.  What counts
is the median of the rounds.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from overcommit.bench import micro_links, micro_steps
from overcommit.bench.prepare import Options
from overcommit.bench.report import Figure, Report
from overcommit.bench.screen import bar

ROUNDS: Final = 15
QUICK_ROUNDS: Final = 5
ROUND_NS: Final = 20_000_000
COUNT_MAX: Final = 1 << 22
# What the README's table shows.
HEADLINES: Final = (
    "ring push and pop",
    "link round trip, two processes",
    "decode and check a request, JSON [1,16]",
    "encode an answer, JSON [1,16]",
    "batcher, a job in and out, batches of 16",
    "residency, evict one of 200 and load one",
)


@dataclass(slots=True, frozen=True)
class Operation:
    """`run(count)` does it that many times."""

    name: str
    run: Callable[[int], None]
    section: str = "steps"
    limit: str = ""  # the name of the operation that this one cannot beat


def operations(stack: ExitStack) -> list[Operation]:
    """Return all there are; `stack` holds the processes that some need."""
    steps = [Operation(name, run) for name, run in micro_steps.steps()]
    bells = Operation(
        "doorbell round trip, two processes", stack.enter_context(micro_links.bells())
    )
    link = Operation(
        "link round trip, two processes", stack.enter_context(micro_links.link()), limit=bells.name
    )
    return [*steps, bells, link]


def _round(operation: Operation, count: int) -> float:
    start_ns = time.perf_counter_ns()
    operation.run(count)
    return (time.perf_counter_ns() - start_ns) / count


def _calibrate(operation: Operation, round_ns: int) -> int:
    """Return how often it can be done in a round."""
    count = 1
    while count < COUNT_MAX and _round(operation, count) * count < round_ns / 2:
        count *= 2
    return count


def measure(
    chosen: Sequence[Operation],
    rounds: int = ROUNDS,
    round_ns: int = ROUND_NS,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Return each operation's nanoseconds, a value a round, sorted."""
    counts = [_calibrate(operation, round_ns) for operation in chosen]
    found: dict[str, list[float]] = {operation.name: [] for operation in chosen}
    for number in range(rounds):
        # Every other round backwards: whoever comes first finds other caches.
        pairs = list(zip(chosen, counts, strict=True))
        for operation, count in pairs if number % 2 else reversed(pairs):
            found[operation.name].append(_round(operation, count))
        on_progress(number + 1, rounds)
    return {name: sorted(values) for name, values in found.items()}


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    report.settings = {"rounds": rounds, "round": f"{ROUND_NS / 1e6:.0f} ms"}
    with ExitStack() as stack:
        chosen = operations(stack)
        with bar(report.console, "measuring") as advance:
            found = measure(chosen, rounds, on_progress=advance)
    medians = {name: statistics.median(values) for name, values in found.items()}
    for section, group in itertools.groupby(chosen, key=lambda operation: operation.section):
        for operation in group:
            values = found[operation.name]
            report.add(
                section,
                Figure(
                    operation.name,
                    medians[operation.name],
                    "ns",
                    medians.get(operation.limit),
                    f"{values[0]:,.0f} to {values[-1]:,.0f}",
                ),
            )
    for name in HEADLINES:
        values = found[name]
        limit = next(operation.limit for operation in chosen if operation.name == name)
        beside = f"{limit}: {medians[limit]:,.0f} ns" if limit else ""
        spread = f"{values[0]:,.0f} to {values[-1]:,.0f}"
        report.headlines.append((name, f"{medians[name]:,.0f} ns ({spread})", beside))
