"""What a load generator counted; the sum over connections and processes."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from overcommit.bench.histogram import Histogram

EXAMPLES_MAX: Final = 12
LOST: Final = "connection lost"
WRONG: Final = "WRONG"
_SUMMED: Final = (
    *("sent", "right", "wrong", "errors", "broken", "unanswered", "unexpected"),
    *("connects", "connect_errors", "intended", "unsent", "cpu_ns"),
)
_NUMBER: Final = re.compile(r"\d+")


class Tally(msgspec.Struct, kw_only=True):
    """Counts of one run.

    Invariant: once the run is over, `sent` is the sum of `right`, `wrong`, `errors`, `broken` and
    `unanswered`: every request has exactly one fate.  `unexpected` counts answers to no request.
    In an open loop `intended` is the sum of `sent` and `unsent`: what came due while every
    connection was busy waits its turn, in a queue with a bound, and what never got out is counted.
    """

    sent: int = 0
    right: int = 0
    wrong: int = 0
    errors: int = 0  # answers with another status than 200
    broken: int = 0  # the connection died while the request waited for its answer
    unanswered: int = 0  # no answer within the plan's timeout
    unexpected: int = 0
    connects: int = 0
    connect_errors: int = 0
    statuses: dict[str, int] = {}
    targets: dict[str, int] = {}
    examples: list[str] = []
    histogram: dict[str, list[int]] = {}  # since the start, in an open loop the intended one
    services: dict[str, list[int]] = {}  # since the sending; open loops only
    intended: int = 0  # requests that came due; open loops only, like the next three
    unsent: int = (
        0  # of these, how many were not sent before the run's end, or found the queue full
    )
    queue_peak: int = 0
    late_ns: int = 0  # the longest from an intended start to its sending
    cpu_ns: int = 0  # of the load generator itself
    started_ns: int = 0
    ended_ns: int = 0
    silence_ns: int = 0  # the longest time without any answer, over all connections

    def note(self, example: str) -> None:
        """Keep the first few explanations that differ in more than their numbers, and wrong ones."""
        if len(self.examples) >= EXAMPLES_MAX:
            return
        kinds = {_NUMBER.sub("#", known) for known in self.examples}
        if example.startswith(WRONG) or _NUMBER.sub("#", example) not in kinds:
            self.examples.append(example)

    @property
    def seconds(self) -> float:
        """How long the run was."""
        return (self.ended_ns - self.started_ns) / 1e9

    @property
    def rate(self) -> float:
        """Right answers a second."""
        return self.right / self.seconds if self.seconds > 0 else 0.0

    @property
    def cpu_us_per_request(self) -> float:
        """What a request costs the load generator."""
        return self.cpu_ns / 1e3 / self.sent if self.sent else 0.0

    @property
    def accounted(self) -> int:
        """Requests whose fate is known."""
        return self.right + self.wrong + self.errors + self.broken + self.unanswered

    def times(self) -> Histogram:
        """The times of right answers."""
        return Histogram.from_wire(self.histogram) if self.histogram else Histogram()

    def service_times(self) -> Histogram:
        """The same since they were sent: what a client that waits for its turn would have seen."""
        return Histogram.from_wire(self.services) if self.services else self.times()


def merge(tallies: list[Tally]) -> Tally:
    """Add up what several processes counted at the same time."""
    total = Tally()
    times, services = Histogram(), Histogram()
    for tally in tallies:
        for name in _SUMMED:
            setattr(total, name, getattr(total, name) + getattr(tally, name))
        total.queue_peak = max(total.queue_peak, tally.queue_peak)
        total.late_ns = max(total.late_ns, tally.late_ns)
        for ours, theirs in ((total.statuses, tally.statuses), (total.targets, tally.targets)):
            for key, count in theirs.items():
                ours[key] = ours.get(key, 0) + count
        for example in tally.examples:
            total.note(example)
        times.merge(tally.times())
        if tally.services:
            services.merge(tally.service_times())
    total.histogram = times.to_wire()
    if services.count:
        total.services = services.to_wire()
    total.started_ns = min((tally.started_ns for tally in tallies), default=0)
    total.ended_ns = max((tally.ended_ns for tally in tallies), default=0)
    # Silence of all together is at most that of the least silent.
    total.silence_ns = min((tally.silence_ns for tally in tallies), default=0)
    return total
