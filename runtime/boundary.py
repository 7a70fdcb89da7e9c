"""Where the failure of one part ends: the rest of the supervisor goes on without it.

Each part of a turn of the supervisor's loop runs in here, and so does each event.
Owns the count of what has failed, which status and metrics show, and says when the next turn may begin.

Invariants
 1. An Exception of what is run here reaches nobody else.  KeyboardInterrupt and SystemExit do.
 2. Each failure is counted, under what was done and the exception's class.  The first one of a kind is
    logged with its traceback; so is one that comes FAILURE_SAID_S or more after the latest that was, with the
    count.
 3. What fails again at each turn costs no core: from the second one on, a turn that follows a turn in which
    something failed is put off, by FAILED_TURNS_PAUSE_S at most.

Owned by the house; called by the supervisor, from its one thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, ParamSpec, TypeVar

from overcommit.runtime.config import FAILED_TURNS_PAUSE_S, FAILURE_SAID_S

log = logging.getLogger("overcommit")

PAUSE_STEP_S: Final = 0.001

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclass(slots=True)
class Failure:
    """What has failed in one way."""

    what: str
    error: str  # the exception's class
    count: int = 0
    message: str = ""  # of the latest


class Boundary:
    """See the module."""

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._failures: dict[tuple[str, str], Failure] = {}
        self._said_ns: dict[tuple[str, str], int] = {}
        self._has_failed = False  # since the turn began
        self._turns_failed = 0  # in a row

    def run(
        self,
        what: str,
        do: Callable[_Arguments, _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Result | None:
        """Do it, and return what that returns; None if it failed.

        `what` is a constant that names it in log and status, as what follows "failed: ".
        """
        try:
            return do(*args, **kwargs)
        except Exception as error:  # the supervisor loop's boundary: one bad part must not end it
            self._note(what, error)
            return None

    def pause_s(self) -> float:
        """A turn ends: return how long to wait before the next one."""
        self._turns_failed = self._turns_failed + 1 if self._has_failed else 0
        self._has_failed = False
        return min(FAILED_TURNS_PAUSE_S, PAUSE_STEP_S * max(0, self._turns_failed - 1))

    def failures(self) -> list[Failure]:
        """Return what has failed so far, by kind."""
        return list(self._failures.values())

    def _note(self, what: str, error: Exception) -> None:
        self._has_failed = True
        now_ns, kind = self._clock_ns(), (what, type(error).__name__)
        failure = self._failures.setdefault(kind, Failure(*kind))
        failure.count += 1
        failure.message = str(error)
        if failure.count == 1 or now_ns - self._said_ns[kind] >= FAILURE_SAID_S * 1e9:
            self._said_ns[kind] = now_ns
            log.error("failed: %s (%d times so far)", what, failure.count, exc_info=error)
