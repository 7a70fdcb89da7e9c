"""Trace and log settings: a change is taken whole or not at all."""

from __future__ import annotations

from typing import Any

import pytest

from overcommit.runtime.errors import BadRequest
from overcommit.runtime.wire_settings import LogSettings, TraceSettings


def test_a_model_has_the_servers_settings_but_for_its_own() -> None:
    trace = TraceSettings()
    trace.change("", {"trace_rate": "5"})
    trace.change("m", {"trace_count": ["3"], "nope": 1})
    assert (trace.of("m")["trace_rate"], trace.of("m")["trace_count"]) == ("5", "3")
    assert trace.of("")["trace_count"] == "-1"
    trace.change("m", {"trace_count": None})
    trace.change("", {"trace_rate": None})
    assert trace.of("m") == TraceSettings().of("")


@pytest.mark.parametrize(
    "change",
    [
        *({"trace_rate": value} for value in ("x", "0", -1, True, 1.5, [], ["1", "2"], 1 << 40)),
        *({"trace_level": value} for value in (["TIMESTAMPS"], "TENSORS", [1])),
        {"trace_file": "/tmp/x"},
        {"trace_mode": "opentelemetry"},
        {"log_frequency": "-1"},
    ],
)
def test_a_wrong_trace_setting_changes_nothing(change: dict[str, Any]) -> None:
    trace = TraceSettings()
    with pytest.raises(BadRequest):
        trace.change("m", {"trace_count": "9", **change})
    assert trace.of("m") == TraceSettings().of("m")


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_the_level_that_a_server_was_started_with_is_shown(level: str) -> None:
    assert LogSettings.of(level).level == level.upper()


def test_the_finest_that_is_on_is_the_level() -> None:
    log = LogSettings.of("info").changed({"log_verbose_level": 2, "nope": 1})
    assert log.level == "DEBUG"
    quiet = log.changed({"log_verbose_level": 0, "log_info": False, "log_warning": False})
    assert quiet.level == "ERROR"
    assert quiet.changed({"log_error": False}).level == "CRITICAL"


@pytest.mark.parametrize(
    "change",
    [
        *({"log_info": value} for value in ("x", 1, None)),
        *({"log_verbose_level": value} for value in (-1, "1", 1.5, True, 1 << 40)),
        {"log_file": "/tmp/x"},
        {"log_format": "xml"},
    ],
)
def test_a_wrong_log_setting_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        LogSettings().changed(change)
