"""The server's own books at one instant, and what happened between two of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from overcommit.bench.errors import BenchError
from overcommit.bench.histogram import Histogram
from overcommit.bench.limits import Limits
from overcommit.bench.processes import wait_for
from overcommit.bench.report import Figure
from overcommit.bench.server import Server

SETTLE_LIMIT_S: Final = 20.0
ACTIVATIONS_KEPT: Final = 4096  # the server's own limit


@dataclass(slots=True, frozen=True)
class Snapshot:
    """What `/v2/overcommit/status` and `/v2/overcommit/models` said."""

    status: dict[str, Any]
    models: dict[str, Any]

    def total(self, name: str) -> int:
        """Return one of the totals."""
        try:
            return int(self.status["totals"][name])
        except KeyError as error:
            raise BenchError(f"the server's status has no total '{name}'") from error

    @property
    def reloads_from_disk(self) -> int:
        """Loads from disk of models that had been loaded from disk before."""
        return sum(max(0, row["loads_from_disk"] - 1) for row in self.models.values())

    @property
    def requests(self) -> int:
        """Requests that the server has answered."""
        return int(self.status["requests"]["requests"])

    def unquiet(self) -> str:
        """Say what is still going on; empty when nothing is."""
        busy = []
        for row in self.status["front_ends"]:
            if row["in_flight"] or row["blocks_used"]:
                busy.append(
                    f"front end {row['seat']}: {row['in_flight']} in flight, "
                    f"{row['blocks_used']} blocks"
                )
        for row in self.status["processes"]:
            if row["state"] != "LIVE":
                busy.append(f"{row['kind']} {row['seat']} is {row['state']}")
        busy += [f"{name} is loading" for name, row in self.models.items() if row["loading"]]
        return "; ".join(busy)


def take(server: Server) -> Snapshot:
    """Take a snapshot."""
    return Snapshot(server.status(), server.models())


def settle(
    server: Server,
    limit_s: float = SETTLE_LIMIT_S,
    also: Callable[[Snapshot], bool] = lambda snapshot: True,
) -> Snapshot:
    """Wait until nothing is in flight and everybody lives; return the last snapshot in any case."""
    last: list[Snapshot] = []

    def is_quiet() -> bool:
        last[:] = [take(server)]
        return not last[0].unquiet() and also(last[0])

    wait_for(is_quiet, limit_s)
    return last[0]


def tier_figures(before: Snapshot, after: Snapshot, requests: int) -> list[Figure]:
    """Where the weights were that requests needed, between two snapshots."""

    def grown(name: str) -> int:
        return after.total(name) - before.total(name)

    disk, host = grown("loads_from_disk"), grown("loads_from_host")
    hits = max(0, requests - disk - host)
    share = hits / requests if requests else 0.0
    return [
        Figure("requests served without a load", hits, note=f"{share:.1%} of {requests:,}"),
        Figure("loads HOST -> DEVICE", host),
        Figure("loads DISK -> DEVICE", disk),
        Figure("evictions from DEVICE", grown("evictions_device")),
        Figure("evictions from HOST", grown("evictions_host")),
        Figure("attaches by workers", grown("attaches")),
        Figure("read from disk", grown("bytes_read") / 1e9, "GB"),
        Figure("copied to DEVICE", grown("bytes_copied") / 1e9, "GB"),
    ]


def new_activations(before: Snapshot, after: Snapshot) -> list[dict[str, Any]]:
    """Return the activation records that were added between two snapshots."""
    old, now = before.status["activations"], after.status["activations"]
    return list(now[len(old) :] if len(now) < ACTIVATIONS_KEPT else now)


def activation_figures(records: list[dict[str, Any]], source: str, limits: Limits) -> list[Figure]:
    """How long the activations from one tier took, and how close to the hardware they came."""
    chosen = [record for record in records if record["source"] == source]
    if not chosen:
        return []
    times = Histogram()
    for record in chosen:
        times.record(record["total_ns"])
    figures = [
        Figure(f"{source} p50", times.quantile(0.5) / 1e6, "ms", note=f"{len(chosen)} activations"),
        Figure(f"{source} p99", times.quantile(0.99) / 1e6, "ms", note="from the decision on"),
    ]
    for stage, limit, what in (
        ("read_ns", limits.read, "O_DIRECT read"),
        ("copy_ns", limits.copy, "memory copy"),
    ):
        rates = sorted(r["nbytes"] / r[stage] for r in chosen if r[stage])
        if rates:
            note = f"{what}; best {rates[-1]:.2f} GB/s"
            middle = rates[len(rates) // 2]
            figures.append(Figure(f"{source} {stage[:-3]}", middle, "GB/s", limit / 1e9, note))
    return figures
