"""All scenarios together: one that fails spares the others, results are written where they belong."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from overcommit.bench import __main__ as command
from overcommit.bench import suite
from overcommit.bench.errors import BenchError
from overcommit.bench.prepare import Options
from overcommit.bench.report import Report


def good(options: Options, report: Report) -> None:
    report.headlines.append(("pigs", f"{len(options.against)} fly", "the sky"))
    report.expect("pigs fly", True)


def bad(options: Options, report: Report) -> None:
    raise BenchError("no pigs")


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Report]:
    for name in list(suite.SCENARIOS):
        monkeypatch.delitem(suite.SCENARIOS, name)
    monkeypatch.setitem(suite.SCENARIOS, "chaos", bad)
    monkeypatch.setitem(suite.SCENARIOS, "overcommit", good)
    return suite.run(suite.ALL, Options(work=tmp_path), Console(file=io.StringIO()))


def test_every_scenario_can_be_named_on_the_command_line() -> None:
    assert {each.value for each in command.Scenario} == {*suite.SCENARIOS, suite.ALL}


def test_one_that_cannot_run_is_missed_and_the_others_go_on(reports: list[Report]) -> None:
    failed, ran = reports
    assert [condition.detail for condition in failed.missed()] == ["no pigs"]
    assert not ran.missed()
    assert ran.headlines == [("pigs", "2 fly", "the sky")], "compared with its usual peer"


def test_results_are_one_file_with_one_description_of_the_machine(reports: list[Report]) -> None:
    content = json.loads(suite.to_json(reports))
    assert set(content) == {"machine", "scenarios"}
    assert content["scenarios"]["overcommit"]["conditions"][0]["is_met"]
    assert "machine" not in content["scenarios"]["overcommit"]
    assert json.loads(suite.to_json(reports[1:]))["scenario"] == "overcommit"


def test_the_table_goes_between_the_marks_and_nowhere_else(
    reports: list[Report], tmp_path: Path
) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"before\n{suite.BEGIN}\nstale\n{suite.END}\nafter\n")
    for _ in range(2):
        suite.write_table(file, reports)
        text = file.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "stale" not in text
        assert text.count("| `overcommit` | pigs | 2 fly | the sky |") == 1
        assert "| `chaos` | 0 of 1 conditions hold | | |" in text
    file.write_text("nothing")
    with pytest.raises(BenchError, match="bench:begin"):
        suite.write_table(file, reports)
