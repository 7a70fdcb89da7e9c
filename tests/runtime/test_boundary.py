"""What fails in the supervisor ends nothing else, and is seen."""

from __future__ import annotations

import errno
import logging

import pytest

from overcommit.runtime.boundary import Boundary
from overcommit.runtime.config import FAILED_TURNS_PAUSE_S, FAILURE_SAID_S


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def fail(error: BaseException) -> None:
    raise error


def test_a_failure_reaches_nobody_and_a_result_comes_through() -> None:
    boundary = Boundary()
    assert boundary.run("a part", fail, OSError(errno.EMFILE, "too many")) is None
    assert boundary.run("a part", divmod, 7, 2) == (3, 1)
    (failure,) = boundary.failures()
    assert (failure.what, failure.error, failure.count) == ("a part", "OSError", 1)
    assert "too many" in failure.message


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_is_to_end_the_server_does(kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        Boundary().run("a part", fail, kind())


def test_each_kind_is_logged_once_and_again_after_a_while(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    boundary = Boundary(clock)
    with caplog.at_level(logging.ERROR):
        for what in ("one", "other"):
            for _ in range(1000):
                boundary.run(what, fail, ValueError("no"))
            boundary.run(what, fail, KeyError("no"))
        assert len(caplog.records) == 4
        assert all(record.exc_info for record in caplog.records)
        caplog.clear()
        clock.now_ns += int(FAILURE_SAID_S * 1e9)
        for _ in range(10):
            boundary.run("one", fail, ValueError("no"))
    assert [record.getMessage() for record in caplog.records] == ["failed: one (1001 times so far)"]
    assert [failure.count for failure in boundary.failures()] == [1010, 1, 1000, 1]


def test_turns_that_fail_one_after_the_other_are_put_off_ever_longer_up_to_a_limit() -> None:
    boundary = Boundary()
    pauses = []
    for _ in range(100):
        boundary.run("a part", fail, ValueError())
        pauses.append(boundary.pause_s())
    assert pauses[0] == 0.0, "what failed once holds nobody up"
    assert pauses == sorted(pauses)
    assert pauses[1] > 0
    assert pauses[-1] == FAILED_TURNS_PAUSE_S
    boundary.run("a part", int)
    assert boundary.pause_s() == 0.0
