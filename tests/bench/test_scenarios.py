"""The scenarios end to end, against the real server, with small models."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from overcommit.bench import __main__ as command
from overcommit.bench import chaos, suite, variants
from overcommit.bench.errors import BenchError
from overcommit.bench.prepare import Fleet, Options, fleet_of
from overcommit.bench.report import Report

VOCABULARY = 3000
MODELS = 8


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    return Options(work=tmp_path_factory.mktemp("work"), seconds=3.0, connections=8)


@pytest.fixture(scope="module")
def folders(options: Options) -> dict[str, Path]:
    """Encoders of about 13 MB each: too large for slabs, small enough for a test."""
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=64,
    )
    folders = {}
    for number in range(MODELS):
        torch.manual_seed(number)
        folder = options.work / "repository" / f"bert-{number}"
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
        folders[folder.name] = folder
    return folders


def make_report(scenario: str) -> Report:
    return Report(scenario, Console(file=io.StringIO(), width=160))


def fleet(options: Options, report: Report, folders: dict[str, Path]) -> Fleet:
    return fleet_of(options, report, folders, VOCABULARY)


def said(report: Report) -> str:
    report.show()
    return report.console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.slow
def test_variants_meets_every_condition(options: Options, folders: dict[str, Path]) -> None:
    report = make_report("variants")
    known = fleet(options, report, folders)
    variants.run_fleet(options, report, known, "40MiB", "44MiB")
    assert report.missed() == [], said(report)
    content = json.loads(report.to_json())
    assert content["figures"]["requests"]["throughput"]["value"] > 0
    assert not list((options.work / "runs").iterdir())


@pytest.mark.slow
@pytest.mark.chaos
def test_chaos_meets_every_condition(options: Options, folders: dict[str, Path]) -> None:
    report = make_report("chaos")
    known = fleet(options, report, folders)
    chaos.run_fleet(options, report, known, "80MiB", "44MiB")
    assert report.missed() == [], said(report)


def test_a_missed_condition_fails_the_command_only_when_it_checks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def scenario(options: Options, report: Report) -> None:
        report.expect("pigs fly", options.quick, "not yet")

    monkeypatch.setitem(suite.SCENARIOS, "variants", scenario)
    file = tmp_path / "results" / "out.json"
    arguments = ["variants", "--work", str(tmp_path), "--json", str(file)]
    runner = CliRunner()
    assert runner.invoke(command.app, arguments).exit_code == 0
    failed = runner.invoke(command.app, [*arguments, "--check"])
    assert failed.exit_code == command.CHECK_FAILED
    assert "pigs fly" in failed.output
    assert runner.invoke(command.app, [*arguments, "--check", "--quick"]).exit_code == 0
    assert json.loads(file.read_text())["conditions"][0]["is_met"]


def test_a_run_that_cannot_be_made_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def scenario(options: Options, report: Report) -> None:
        raise BenchError("the server [sic] did not start")

    monkeypatch.setitem(suite.SCENARIOS, "chaos", scenario)
    result = CliRunner().invoke(command.app, ["chaos", "--work", str(tmp_path)])
    assert result.exit_code == command.RUN_FAILED
    assert "the server [sic] did not start" in result.output
