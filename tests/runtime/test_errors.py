"""What is said of exceptions that are not ours."""

from __future__ import annotations

from overcommit.runtime.errors import said_by


def test_a_native_librarys_frames_are_left_out() -> None:
    error = RuntimeError(
        "[12:00:01] /src/gbtree.cc:12: Check failed: 4 columns\nStack trace:\n  [bt] (0) lib(+0x22)"
    )
    assert said_by(error) == "RuntimeError: [12:00:01] /src/gbtree.cc:12: Check failed: 4 columns"
    assert said_by(ValueError("one\ntwo")) == "ValueError: one\ntwo"
