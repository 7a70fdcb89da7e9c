"""How loads compare with raw moves of the same bytes, in a report.

Called by the scenario `activation`.
"""

from __future__ import annotations

from collections.abc import Mapping

from overcommit.bench.activation_samples import Pair
from overcommit.bench.report import Figure, Report
from overcommit.runtime.config import MIB


def show(
    report: Report, phase: str, source: str, pairs: Mapping[int, Pair], limit_from: int
) -> float:
    """Show each size beside the raw figure.

    Return the best raw rate of sizes from `limit_from` bytes up, in bytes a second: a shorter one says
    nothing of memory's bandwidth.
    """
    limit = 0.0
    for size, one in sorted(pairs.items()):
        raw = size / one.raw_s
        if size >= limit_from:
            limit = max(limit, raw)
        note = f"{one.seconds * 1e3:.2f} ms"
        figure = Figure(f"{size // MIB} MiB", size / one.seconds / 1e9, "GB/s", raw / 1e9, note)
        report.add(f"{phase}: {source.upper()} -> DEVICE, beside the raw figure", figure)
    return limit


def judge(report: Report, phase: str, pairs: Mapping[int, Pair], first: int, share: float) -> None:
    """Expect a share of the raw figure, over the whole time, of all sizes from `first` bytes up."""
    judged = {size: one.share for size, one in sorted(pairs.items()) if size >= first}
    report.expect(
        f"{phase}: {share:.0%} of the raw figure over the whole time from {first // MIB} MiB up",
        all(ratio >= share for ratio in judged.values()),
        ", ".join(f"{size // MIB} MiB {ratio:.1%}" for size, ratio in judged.items()),
    )
