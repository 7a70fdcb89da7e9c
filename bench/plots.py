"""Pictures of what was found: each function takes figures and writes one PNG file.

matplotlib is imported when something is drawn, not before: it is an extra, and it is slow to load.
Only its object interface is used, with the Agg canvas: no display, no global state.

Called through `Report.plots`, with `--plot FOLDER`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from overcommit.bench.errors import BenchError
from overcommit.bench.histogram import Histogram

INCHES: Final = (8.0, 5.0)
DPI: Final = 120
_MARKS: Final = "osD^v<>PX*"


@dataclass(slots=True, frozen=True)
class LoadPoint:
    """One load on one system."""

    rate: float  # right answers a second
    p99_ms: float
    label: str = ""  # beside the point, as the connections or the rate asked for


@dataclass(slots=True, frozen=True)
class Activation:
    """One load of weights."""

    nbytes: int
    seconds: float
    source: str  # "disk" or "host"


def require() -> None:
    """Raise BenchError when nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError(
            "plots need matplotlib, which is not installed: "
            "install it with `pip install 'overcommit[bench]'`, or leave --plot out"
        )


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, which="both", alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def throughput(
    systems: Mapping[str, Sequence[LoadPoint]], path: Path, limit: float | None = None
) -> None:
    """Draw throughput against p99, a line a system; `limit` is the machine's, in requests/s."""
    figure, axes = _axes("throughput against tail latency", "right answers a second", "p99, ms")
    for number, (name, points) in enumerate(systems.items()):
        mark = _MARKS[number % len(_MARKS)]
        rates, tails = [p.rate for p in points], [p.p99_ms for p in points]
        axes.plot(rates, tails, marker=mark, label=name)
        for point in points:
            if point.label:
                at = (point.rate, point.p99_ms)
                axes.annotate(point.label, at, (4, 4), textcoords="offset points", fontsize=7)
    if limit is not None:
        axes.axvline(limit, color="black", linestyle=":", label="limit of this machine")
    if any(point.p99_ms > 0 for points in systems.values() for point in points):
        axes.set_yscale("log")
    axes.set_xlim(left=0)
    _save(figure, axes, path)


def latency(histograms: Mapping[str, Histogram], path: Path) -> None:
    """Draw which share of requests was slower, over time; both axes logarithmic, so tails show."""
    figure, axes = _axes("latency", "ms", "share of requests that took longer")
    is_empty = True
    for name, histogram in histograms.items():
        shares = histogram.share_below()
        # The last share is 1: nothing was slower, which no logarithmic axis can show.
        pairs = [(ns / 1e6, 1 - share) for ns, share in shares if share < 1 and ns > 0]
        if pairs:
            is_empty = False
            axes.step(*zip(*pairs, strict=True), where="post", label=name)
    if not is_empty:
        axes.set_xscale("log")
        axes.set_yscale("log")
    _save(figure, axes, path)


def tiers(seconds: Sequence[float], shares: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw where the weights were that requests needed, over time; one sequence a tier, stacked."""
    figure, axes = _axes("where the weights were", "s", "requests a second")
    if len(seconds):
        axes.stackplot(seconds, *shares.values(), labels=list(shares))
    axes.set_ylim(bottom=0)
    _save(figure, axes, path)


def activations(done: Sequence[Activation], limits: Mapping[str, float], path: Path) -> None:
    """Draw how long loads took against their bytes; `limits` are bytes a second by source."""
    figure, axes = _axes("activations", "weights, MB", "ms")
    for number, source in enumerate(sorted({one.source for one in done} | limits.keys())):
        color = f"C{number}"
        mine = [one for one in done if one.source == source]
        if mine:
            sizes, times = [one.nbytes / 1e6 for one in mine], [one.seconds * 1e3 for one in mine]
            axes.scatter(sizes, times, s=12, alpha=0.5, color=color, label=f"from {source}")
        if limits.get(source) and done:
            ends = [min(one.nbytes for one in done) / 2, max(one.nbytes for one in done) * 2]
            bound = [nbytes / limits[source] * 1e3 for nbytes in ends]
            label = f"limit from {source}, {limits[source] / 1e9:.1f} GB/s"
            axes.plot([nbytes / 1e6 for nbytes in ends], bound, "--", color=color, label=label)
    if done:
        axes.set_xscale("log")
        axes.set_yscale("log")
    _save(figure, axes, path)


def curves(
    title: str, shares: Sequence[float], values: Mapping[str, Sequence[float]], y: str, path: Path
) -> None:
    """Draw a line a policy over the cache's share of all bytes."""
    figure, axes = _axes(title, "cache, of all bytes", y)
    for number, (name, line) in enumerate(values.items()):
        style = "--" if number >= len(_MARKS) else "-"
        mark = _MARKS[number % len(_MARKS)]
        axes.plot([100 * share for share in shares], line, style, marker=mark, label=name)
    axes.set_xscale("log")
    axes.set_xticks([100 * share for share in shares], [f"{share:.0%}" for share in shares])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    _save(figure, axes, path)


def ratios(title: str, found: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw all ratios to LRU that were found: a column a policy, a colour a trace."""
    figure, axes = _axes(title, "", "load time / LRU's")
    names = list(dict.fromkeys(name for by_name in found.values() for name in by_name))
    for number, (trace, by_name) in enumerate(found.items()):
        shift = (number - (len(found) - 1) / 2) * 0.25
        points = [(names.index(n) + shift, v) for n, values in by_name.items() for v in values]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.scatter(xs, ys, s=10, alpha=0.5, color=f"C{number}", label=trace)
    axes.axhline(1.0, color="black", linestyle=":")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(bottom=0)
    _save(figure, axes, path)
