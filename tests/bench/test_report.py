"""Figures, conditions and the numbers between two snapshots."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from overcommit.bench.errors import BenchError
from overcommit.bench.limits import Limits
from overcommit.bench.report import Figure, Report
from overcommit.bench.snapshot import (
    Snapshot,
    activation_figures,
    new_activations,
    tier_figures,
)


def make_report() -> Report:
    report = Report("variants", Console(file=io.StringIO(), width=200))
    report.add("activations", Figure("host copy", 6.0, "GB/s", limit=8.0))
    report.expect("no wrong answer", True)
    report.expect("evictions happened", False, "0")
    report.notes.append("[a note with brackets]")
    return report


def test_what_is_printed_has_ratios_and_missed_conditions() -> None:
    report = make_report()
    report.show()
    text = report.console.file.getvalue()  # type: ignore[attr-defined]
    assert "75%" in text
    assert "MISSED evictions happened (0)" in text
    assert "[a note with brackets]" in text


def test_json_holds_the_machine_the_figures_and_the_conditions() -> None:
    content = json.loads(make_report().to_json())
    assert content["figures"]["activations"]["host copy"]["ratio"] == 0.75
    assert [row["is_met"] for row in content["conditions"]] == [True, False]
    assert content["machine"]["processor"]


def test_only_what_does_not_hold_is_missed() -> None:
    assert [condition.name for condition in make_report().missed()] == ["evictions happened"]


def snapshot(**totals: int) -> Snapshot:
    names = ("loads_from_disk", "loads_from_host", "evictions_device", "evictions_host")
    full = dict.fromkeys((*names, "attaches", "bytes_read", "bytes_copied"), 0) | totals
    status: dict[str, Any] = {"totals": full, "activations": []}
    return Snapshot(status, {})


def test_tiers_are_what_grew_between_two_snapshots() -> None:
    before, after = snapshot(loads_from_disk=10), snapshot(loads_from_disk=12, loads_from_host=3)
    figures = {figure.name: figure for figure in tier_figures(before, after, requests=105)}
    assert figures["loads DISK -> DEVICE"].value == 2
    assert figures["loads HOST -> DEVICE"].value == 3
    assert figures["requests served without a load"].value == 100


def test_a_total_that_is_missing_is_named() -> None:
    with pytest.raises(BenchError, match="'bytes_moved'"):
        snapshot().total("bytes_moved")


def test_reloads_from_disk_do_not_count_a_models_first_load() -> None:
    models = {"a": {"loads_from_disk": 3}, "b": {"loads_from_disk": 1}, "c": {"loads_from_disk": 0}}
    assert Snapshot({}, models).reloads_from_disk == 2


def test_what_still_runs_is_said() -> None:
    status = {
        "front_ends": [{"seat": 1, "in_flight": 2, "blocks_used": 3}],
        "processes": [{"kind": "worker", "seat": 0, "state": "STARTING"}],
    }
    text = Snapshot(status, {"m": {"loading": True}}).unquiet()
    assert text == ("front end 1: 2 in flight, 3 blocks; worker 0 is STARTING; m is loading")


def test_activations_stand_beside_their_limit() -> None:
    record = {"source": "host", "nbytes": 4000, "read_ns": 0, "copy_ns": 1000, "total_ns": 2000}
    before, after = snapshot(), snapshot()
    before.status["activations"] = [record]
    after.status["activations"] = [record, record | {"copy_ns": 500}]
    records = new_activations(before, after)
    assert len(records) == 1
    physical = Limits(8e9, 16e9, 2e9, True)
    figures = {figure.name: figure for figure in activation_figures(records, "host", physical)}
    assert figures["host copy"].value == 8.0
    assert figures["host copy"].ratio == 0.5
    assert "host read" not in figures
    assert activation_figures(records, "disk", physical) == []
