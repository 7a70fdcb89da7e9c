"""A log-linear histogram of times, as HdrHistogram's: small, mergeable, of bounded relative error.

Values below `2 * SUB_BUCKETS` nanoseconds have a bucket each; above, every power of two is cut into
`SUB_BUCKETS` equal buckets, so that a bucket is never wider than 1/128 of its values.

Invariants
 1. A quantile is at least the true one and at most 1/128 more.
 2. Merging histograms gives the histogram of all their values.

For an open loop, record the time since the *intended* start: a stall then shows in every request
that should have been sent during it (coordinated omission is the error of leaving those out).

Called by the load generator, a few times a second, and by reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

SUB_BITS: Final = 7
SUB_BUCKETS: Final = 1 << SUB_BITS
VALUE_MAX: Final = (1 << 42) - 1  # 73 minutes; longer times are counted as that
_BUCKETS: Final = (42 - SUB_BITS) * SUB_BUCKETS + SUB_BUCKETS


def bucket_of(value: int) -> int:
    """Return the bucket that a value falls into."""
    if value < 2 * SUB_BUCKETS:
        return max(value, 0)
    shift = value.bit_length() - SUB_BITS - 1
    return (shift << SUB_BITS) + (value >> shift)


def highest_of(bucket: int) -> int:
    """Return the highest value of a bucket."""
    if bucket < 2 * SUB_BUCKETS:
        return bucket
    shift = (bucket >> SUB_BITS) - 1
    return (((bucket & (SUB_BUCKETS - 1)) + SUB_BUCKETS + 1) << shift) - 1


class Histogram:
    """Counts of times in nanoseconds."""

    __slots__ = ("_counts", "count", "highest", "lowest", "total")

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.count = 0
        self.total = 0
        self.lowest = VALUE_MAX
        self.highest = 0

    def record(self, value: int) -> None:
        """Count one time."""
        value = min(max(value, 0), VALUE_MAX)
        self._counts[bucket_of(value)] += 1
        self.count += 1
        self.total += value
        self.lowest = min(self.lowest, value)
        self.highest = max(self.highest, value)

    def record_many(self, values: Sequence[int]) -> None:
        """Count many times at once: a tenth of the cost of one after the other."""
        if not values:
            return
        times = np.clip(np.array(values, np.int64), 0, VALUE_MAX)
        # frexp's exponent is the bit length: exact, for values far below 2 ** 53.
        lengths = np.frexp(times.astype(np.float64))[1].astype(np.int64)
        shifts = np.maximum(lengths - SUB_BITS - 1, 0)
        buckets = (shifts << SUB_BITS) + (times >> shifts)
        for bucket, count in zip(*np.unique(buckets, return_counts=True), strict=True):
            self._counts[int(bucket)] += int(count)
        self.count += len(values)
        self.total += int(times.sum())
        self.lowest = min(self.lowest, int(times.min()))
        self.highest = max(self.highest, int(times.max()))

    def share_below(self) -> list[tuple[int, float]]:
        """Return the distribution: for each bucket in use, its highest time and the share up to it."""
        shares: list[tuple[int, float]] = []
        seen = 0
        for bucket, count in enumerate(self._counts):
            if count:
                seen += count
                shares.append((min(highest_of(bucket), self.highest), seen / self.count))
        return shares

    def quantile(self, share: float) -> int:
        """Return the time that this share of all times does not exceed; 0 when nothing is there."""
        # A share that was made by dividing is a hair off, and so is its product with the count.
        exact = share * self.count
        whole = round(exact)
        wanted = whole if abs(exact - whole) < self.count * 1e-12 else math.ceil(exact)
        wanted = max(1, min(self.count, wanted))
        seen = 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= wanted and count:
                return min(highest_of(bucket), self.highest)
        return 0

    @property
    def mean(self) -> float:
        """The exact mean; 0 when nothing is there."""
        return self.total / self.count if self.count else 0.0

    def merge(self, other: Histogram) -> None:
        """Add everything that another histogram holds."""
        for bucket, count in enumerate(other._counts):
            if count:
                self._counts[bucket] += count
        self.count += other.count
        self.total += other.total
        self.lowest = min(self.lowest, other.lowest)
        self.highest = max(self.highest, other.highest)

    def to_wire(self) -> dict[str, list[int]]:
        """Return plain data: the buckets that are not empty, and the exact extremes."""
        buckets = [(bucket, count) for bucket, count in enumerate(self._counts) if count]
        return {
            "buckets": [bucket for bucket, _ in buckets],
            "counts": [count for _, count in buckets],
            "exact": [self.total, self.lowest, self.highest],
        }

    @classmethod
    def from_wire(cls, wire: dict[str, list[int]]) -> Histogram:
        """Undo `to_wire`."""
        histogram = cls()
        for bucket, count in zip(wire["buckets"], wire["counts"], strict=True):
            histogram._counts[bucket] = count
            histogram.count += count
        histogram.total, histogram.lowest, histogram.highest = wire["exact"]
        return histogram
