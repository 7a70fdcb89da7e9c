"""Plots are PNG files with something on them."""

from __future__ import annotations

import functools
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from overcommit.bench import plots
from overcommit.bench.errors import BenchError
from overcommit.bench.histogram import Histogram
from overcommit.bench.report import Report

pytest.importorskip("matplotlib")


def some_times(factor: int) -> Histogram:
    times = Histogram()
    times.record_many([factor * number * 1000 for number in range(1, 2000)])
    return times


POINTS = {
    "ours": [plots.LoadPoint(1000, 2.0, "4"), plots.LoadPoint(3000, 5.0, "16")],
    "theirs": [plots.LoadPoint(500, 9.0)],
}
DONE = [
    plots.Activation(8_000_000, 0.004, "host"),
    plots.Activation(90_000_000, 0.09, "disk"),
    plots.Activation(9_000_000, 0.009, "disk"),
]
DRAWN: dict[str, Callable[[Path], None]] = {
    "throughput": functools.partial(plots.throughput, POINTS, limit=4000.0),
    "latency": functools.partial(plots.latency, {"a": some_times(1), "b": some_times(3)}),
    "tiers": functools.partial(plots.tiers, [0, 1, 2], {"DEVICE": [1, 2, 3], "HOST": [3, 2, 1]}),
    "activations": functools.partial(plots.activations, DONE, {"host": 1.6e10, "disk": 2e9}),
}
EMPTY: dict[str, Callable[[Path], None]] = {
    "throughput": functools.partial(plots.throughput, {}),
    "latency": functools.partial(plots.latency, {"a": Histogram()}),
    "tiers": functools.partial(plots.tiers, [], {}),
    "activations": functools.partial(plots.activations, [], {"host": 1e10}),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_plot_is_a_png_that_shows_more_than_an_empty_one(name: str, tmp_path: Path) -> None:
    full, empty = tmp_path / "new folder" / "full.png", tmp_path / "empty.png"
    DRAWN[name](full)
    EMPTY[name](empty)
    for path in (full, empty):
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert full.stat().st_size > empty.stat().st_size


def test_a_report_draws_what_its_scenario_left(tmp_path: Path) -> None:
    report = Report("variants", Console(file=io.StringIO()))
    report.plots["latency"] = DRAWN["latency"]
    (path,) = report.draw(tmp_path)
    assert path == tmp_path / "variants-latency.png"
    assert path.stat().st_size > 1000


def test_without_matplotlib_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match="pip install"):
        plots.latency({}, tmp_path / "x.png")
