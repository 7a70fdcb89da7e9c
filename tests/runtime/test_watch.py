"""The thread that looks at the repository."""

from __future__ import annotations

import logging
import select
from pathlib import Path

import pytest

from overcommit.runtime.watch import Watch


def test_a_repository_that_cannot_be_read_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "overcommit.catalogue")
    watch = Watch([str(tmp_path)], str(tmp_path / ".cache"), 0.001)
    troubles = iter([OSError("no such file")] * 3 + [OSError("no right"), ValueError("a bug")])

    def look() -> bool:
        for trouble in troubles:
            raise trouble
        return True

    monkeypatch.setattr(watch._scanner, "look", look)
    watch.start()
    try:
        seen = 0
        while seen < 2:
            select.select([watch.fd], [], [])
            seen += len(watch.take())
    finally:
        watch.close()
    said = [text.removeprefix("the repository can") for text in caplog.messages]
    assert said == [
        "not be read, what was there is served: no such file",
        "not be read, what was there is served: no right",
        "not be read, what was there is served: a bug",
        " be read again",
    ]
    assert [bool(record.exc_info) for record in caplog.records] == [False, False, True, False]
