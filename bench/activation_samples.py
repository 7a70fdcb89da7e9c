"""What the server says of its activations, joined and cut into stages.

Called by the scenario `activation`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

# Name of a stage, where it begins, where it ends; see `runtime.timings`.
STAGES: Final = (
    ("worker's message", "asked_ns", "decided_ns"),
    ("supervisor to mover", "decided_ns", "received_ns"),
    ("until the first byte moves", "received_ns", "began_ns"),
    ("bytes", "began_ns", "ended_ns"),
    ("mover to worker", "ended_ns", "placed_ns"),
    ("map", "placed_ns", "mapped_ns"),
)


@dataclass(slots=True, frozen=True)
class Sample:
    """One version that a worker asked for and got; instants in ns."""

    nbytes: int
    source: str  # "disk", "host", or "device" where it was there already
    instants: dict[str, int]
    key: tuple[int, int]  # slot and generation

    def between(self, first: str, last: str) -> float:
        """Return the seconds from one instant to another."""
        return (self.instants[last] - self.instants[first]) / 1e9

    @property
    def seconds(self) -> float:
        """From the worker's wish until it can have a lease on mapped weights."""
        return self.between("asked_ns", "mapped_ns")


def samples_of(status: dict[str, Any]) -> list[Sample]:
    """Join what the worker said with what the supervisor and the mover did."""
    loads = {(load["slot"], load["generation"]): load for load in status["activations"]}
    samples = []
    for row in status["attaches"]:
        attach = row["attach"]
        key = (attach["slot"], attach["generation"])
        # A worker that asked after the load was published found the weights on DEVICE.
        load = loads.get(key)
        if load is not None and attach["asked_ns"] > load["done_ns"]:
            load = None
        instants = {name: ns for name, ns in attach.items() if name.endswith("_ns")}
        if load is not None:
            instants |= {name: ns for name, ns in load.items() if name.endswith("ed_ns")}
            instants |= {"began_ns": load["began_ns"], "done_ns": load["done_ns"]}
        samples.append(
            Sample(row["nbytes"], "device" if load is None else load["source"], instants, key)
        )
    return samples


def median(samples: Iterable[Sample], take: Callable[[Sample], float]) -> float:
    """Return the median over samples."""
    return statistics.median(take(sample) for sample in samples)


@dataclass(slots=True, frozen=True)
class Pair:
    """How long loads of one size took, and the raw move of the same bytes: medians, in seconds."""

    nbytes: int
    seconds: float
    raw_s: float

    @property
    def share(self) -> float:
        """How much of a load's time the raw move is."""
        return self.raw_s / self.seconds


def pair(nbytes: int, samples: Iterable[Sample], raw: Mapping[tuple[int, int], float]) -> Pair:
    """Hold each load against the raw move that was measured right after it, by slot and generation.

    A machine's speed drifts within a run (its neighbours), so that the ratio of two medians may be
    that of two moments; the median of the ratios is not.  Loads without a raw move are left out.
    """
    known = [(sample.seconds, raw[sample.key]) for sample in samples if sample.key in raw]
    seconds = statistics.median(one for one, _ in known)
    share = statistics.median(raw_s / one for one, raw_s in known)
    return Pair(nbytes, seconds, share * seconds)


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return (a, B) of t = a + x / B, by least squares of the relative errors, for points (x, t).

    With x in bytes B is a bandwidth; with x the seconds of a raw move of the same bytes B is the
    share of the raw bandwidth that is left once the fixed cost is paid.
    Absolute errors would let the longest loads alone decide, and `a` would be their noise.
    """
    sizes = np.array([nbytes for nbytes, _ in points], float)
    times = np.array([seconds for _, seconds in points], float)
    rows = np.stack([1 / times, sizes / times], axis=1)
    (fixed, per_byte), *_ = np.linalg.lstsq(rows, np.ones(len(points)), rcond=None)
    return float(fixed), float(1 / per_byte)
