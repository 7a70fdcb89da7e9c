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
    return suite.run("all", Options(work=tmp_path), Console(file=io.StringIO()))


def test_every_scenario_can_be_named_on_the_command_line() -> None:
    assert {each.value for each in command.Scenario} == {*suite.SCENARIOS, *suite.GROUPS}


def test_one_that_cannot_run_is_missed_and_the_others_go_on(reports: list[Report]) -> None:
    failed, ran = reports
    assert [condition.detail for condition in failed.missed()] == ["no pigs"]
    assert not ran.missed()
    assert ran.headlines == [("pigs", "2 fly", "the sky")], "compared with its usual peer"


def test_each_says_how_long_it_took(reports: list[Report]) -> None:
    reports[0].took_s, reports[1].took_s = 61.4, 3.2
    assert suite.times(reports) == "chaos 61 s, overcommit 3 s; all 1 min 5 s"
    content = json.loads(suite.to_json(reports))["scenarios"]
    assert [one["took_s"] for one in content.values()] == [61.4, 3.2]


def test_results_are_one_file_with_one_description_of_the_machine(reports: list[Report]) -> None:
    content = json.loads(suite.to_json(reports))
    assert set(content) == {"machine", "scenarios"}
    assert content["scenarios"]["overcommit"]["conditions"][0]["is_met"]
    assert "machine" not in content["scenarios"]["overcommit"]
    assert json.loads(suite.to_json(reports[1:]))["scenario"] == "overcommit"


def test_the_table_goes_between_the_marks_and_nowhere_else(
    reports: list[Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "README.md"
    monkeypatch.setattr(suite, "SERVING", ("overcommit",))
    marks = [
        mark.format(group=group)
        for group in ("serving", "memory")
        for mark in (suite.BEGIN, suite.END)
    ]
    file.write_text("before\n{}\nstale\n{}\nbetween\n{}\n{}\nafter\n".format(*marks))
    for _ in range(2):
        suite.write_table(file, reports)
        text = file.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "stale" not in text
        serving, memory = text.split("between")
        assert serving.count("| `overcommit` | pigs | 2 fly | the sky |") == 1
        assert memory.count("| `chaos` | 0 of 1 conditions hold | | |") == 1
    file.write_text("nothing")
    with pytest.raises(BenchError, match="bench:serving:begin"):
        suite.write_table(file, reports)


def test_groups_together_are_all_and_share_nothing() -> None:
    assert [*suite.members("serving")] == [n for n in suite.SCENARIOS if n in suite.SERVING]
    assert {*suite.members("serving"), *suite.members("memory")} == {*suite.members("all")}
    assert set(suite.SERVING) <= set(suite.SCENARIOS)
    assert suite.members("all") == list(suite.SCENARIOS)
