"""What the log says of single versions."""

from __future__ import annotations

import logging

import pytest

from overcommit.runtime.entries import Entry, State, new_entry
from overcommit.runtime.repository import VersionSource
from overcommit.runtime.sparing import LINES_MAX, PERIOD_NS
from overcommit.runtime.version_log import VersionLog


def broken(name: str, reason: str) -> Entry:
    entry = new_entry(0, VersionSource(name, "1", f"/{name}", "a", None, reason))
    entry.state, entry.reason = State.UNAVAILABLE, reason
    return entry


def test_of_a_thousand_broken_models_some_are_named_and_all_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    versions = VersionLog()
    for number in range(1000):
        versions.broken(broken(f"m{number}", f"no layer {number}"), 0)
    versions.step(1)
    assert caplog.messages == [f"m{n} version 1: no layer {n}" for n in range(LINES_MAX)]
    versions.step(PERIOD_NS)
    assert caplog.messages[LINES_MAX].startswith(f"{1000 - LINES_MAX} more lines")
    assert {record.levelno for record in caplog.records} == {logging.ERROR}


def test_a_model_that_worked_in_between_is_named_again(caplog: pytest.LogCaptureFixture) -> None:
    versions, entry = VersionLog(), broken("m", "no room")
    versions.broken(entry, 0)
    versions.broken(entry, 0)
    assert len(caplog.messages) == 1
    versions.works(entry)
    versions.failed("m", "1", "no room", 0)
    assert len(caplog.messages) == 2


def test_what_serves_on_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    entry = broken("m", "serving the version from before")
    entry.state = State.READY
    VersionLog().broken(entry, 0)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_of_many_that_take_over_the_first_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    versions = VersionLog()
    for _ in range(LINES_MAX + 7):
        versions.takes_over(broken("m", ""), 0)
    versions.step(PERIOD_NS)
    assert len(caplog.messages) == LINES_MAX + 1
    assert caplog.messages[-1] == "7 more versions work: they take over"
