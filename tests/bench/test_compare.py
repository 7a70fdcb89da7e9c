from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from overcommit.bench import compare
from overcommit.bench.compare import (
    OURS,
    Comparing,
    Comparison,
    Contestant,
    Keeper,
    Measurement,
    Spread,
)
from overcommit.bench.dialect import V2
from overcommit.bench.peers import CannotDo, Target
from overcommit.bench.report import Report

ONE = Measurement(OURS, "16", 0, 100.0, 1.0, 2.0, 0, 0, 50.0)


class Servers:
    """Contestants that note when they start and end."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def contestant(self, name: str) -> Contestant:
        @contextlib.contextmanager
        def serve() -> Iterator[Target]:
            self.events.append(f"{name} starts")
            try:
                yield Target(name, "127.0.0.1", 1, V2(), list, (f"as {name}",))
            finally:
                self.events.append(f"{name} ends")

        return Contestant(name, serve)

    def keeper(self, cores: dict[str, float]) -> Keeper:
        contestants = [self.contestant(name) for name in cores]
        return Keeper(contestants, lambda text: None, lambda target: cores[target.name])


def make_report() -> Report:
    return Report("test", Console(file=io.StringIO(), width=160))


def test_turns_alternate() -> None:
    order = [name for _, name in compare.turns(["a", "b", "c"], 3)]
    assert order == list("abcabcabc")
    assert [number for number, _ in compare.turns(["a", "b"], 2)] == [0, 0, 1, 1]


def test_an_idle_server_is_kept_and_a_busy_one_is_started_for_every_turn() -> None:
    servers = Servers()
    with servers.keeper({"idle": 0.001, "busy": 0.2}) as keeper:
        for _, name in compare.turns(["idle", "busy"], 2):
            with keeper.turn(name) as target:
                assert target.name == name
                servers.events.append(f"{name} turns")
    assert servers.events == [
        "idle starts",
        "idle turns",
        "busy starts",
        "busy turns",
        "busy ends",
        "idle turns",
        "busy starts",
        "busy turns",
        "busy ends",
        "idle ends",
    ]


def test_a_server_is_ended_when_its_first_turn_fails_and_when_a_later_one_does() -> None:
    servers = Servers()
    with pytest.raises(ValueError), servers.keeper({"a": 0.0}) as keeper, keeper.turn("a"):
        raise ValueError
    assert servers.events == ["a starts", "a ends"]
    servers = Servers()
    with pytest.raises(ValueError), servers.keeper({"a": 0.0}) as keeper:  # noqa: PT012
        with keeper.turn("a"):
            pass
        with keeper.turn("a"):
            raise ValueError
    assert servers.events == ["a starts", "a ends"]


def test_ratios_are_within_rounds_and_the_median_is_of_ratios() -> None:
    rows = []
    for number, (ours, theirs) in enumerate([(100.0, 10.0), (50.0, 25.0), (90.0, 30.0)]):
        rows.append(replace(ONE, round=number, rate=ours))
        rows.append(replace(ONE, contestant="peer", round=number, rate=theirs))
    comparison = Comparison(rows)
    assert comparison.ratio("peer", "16", "rate") == Spread(3.0, 2.0, 10.0)
    assert comparison.spread("peer", "16", "rate") == Spread(25.0, 10.0, 30.0)


def test_a_round_that_only_one_has_counts_for_no_ratio() -> None:
    rows = [ONE, replace(ONE, round=1, rate=1.0), replace(ONE, contestant="peer", rate=50.0)]
    assert Comparison(rows).ratio("peer", "16", "rate") == Spread(2.0, 2.0, 2.0)


def test_a_peer_that_got_nothing_done_is_infinitely_slower() -> None:
    rows = [ONE, replace(ONE, contestant="peer", rate=0.0)]
    assert Comparison(rows).ratio("peer", "16", "rate").median == float("inf")


def test_what_a_contestant_cannot_do_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    servers = Servers()

    @contextlib.contextmanager
    def refuse() -> Iterator[Target]:
        raise CannotDo("it has no batching")
        yield

    report = make_report()
    contestants = [servers.contestant(OURS), Contestant("peer", refuse)]
    comparison = Comparing(report, 2, 1.0, tmp_path / "load.log").run(contestants, [])
    compare.add(report, comparison)
    assert comparison.cannot == {"peer": "it has no batching"}
    assert "peer was not measured: it has no batching" in report.notes
    assert f"{OURS}: as {OURS}" in report.notes


def test_the_report_has_rows_with_the_ratio_beside_the_peer() -> None:
    report = make_report()
    rows = [ONE, replace(ONE, contestant="peer", rate=25.0, p99_ms=8.0, wrong=2)]
    compare.add(report, Comparison(rows), {"16": 400.0})
    figures = {figure.name: figure for figure in report.sections["16"]}
    assert figures[f"{OURS}: requests"].ratio == 0.25
    assert "4.00 (4.00..4.00)" in figures["peer: requests"].note
    assert figures["peer: p99"].value == 8.0
    assert figures["peer: server CPU a request"].value == 50.0
    assert figures["peer: wrong"].value == 2
    assert f"{OURS}: wrong" not in figures


def test_a_disturbed_measurement_is_made_again_and_the_least_disturbed_counts() -> None:
    def script(*others: float) -> tuple[float, int]:
        left = [replace(ONE, others=value) for value in others]
        found = compare.least_disturbed(lambda: left.pop(0))
        return found.others, len(others) - len(left)

    assert script(0.0, 1.0) == (0.0, 1)
    assert script(0.9, 0.1, 0.0) == (0.1, 2)
    assert script(0.9, 0.5, 0.7, 0.0) == (0.5, compare.TRIES_MAX)
