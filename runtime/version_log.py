"""What the log says of single versions: what cannot be served, and what takes over.

Invariants
 1. Why a version cannot be served is said when it is first known, and again when it is another reason; but of
    thousands at once the first ones, and how many more there are (`sparing`).

Called by the catalogue, from the supervisor's one thread.
"""

from __future__ import annotations

import logging

from overcommit.runtime.entries import Entry, State
from overcommit.runtime.sparing import Sparing

log = logging.getLogger("overcommit.catalogue")


class VersionLog:
    """See the module."""

    def __init__(self) -> None:
        self._broken = Sparing()
        self._taking_over = Sparing()

    def broken(self, entry: Entry, now_ns: int) -> None:
        """Its files cannot be served, as its reason says; what served before may serve on."""
        level = logging.ERROR if entry.state is State.UNAVAILABLE else logging.WARNING
        self._say(level, entry.name, entry.version, entry.reason, now_ns)

    def failed(self, name: str, version: str, message: str, now_ns: int) -> None:
        """It was packed in vain."""
        self._say(logging.ERROR, name, version, message, now_ns)

    def on_trial(self, entry: Entry, message: str, now_ns: int) -> None:
        """It was tried out in vain."""
        text = f"it stays on trial, what served before serves on: {message}"
        self.failed(entry.name, entry.version, text, now_ns)

    def works(self, entry: Entry) -> None:
        """It is served: what is said of it next is new."""
        self._broken.forget((entry.name, entry.version))

    def takes_over(self, entry: Entry, now_ns: int) -> None:
        """A version on trial works."""
        if self._taking_over.admits_new(now_ns):
            log.info("%s version %s works: it takes over", entry.name, entry.version)

    def step(self, now_ns: int) -> None:
        """Say how many were counted."""
        if more := self._broken.take_more(now_ns):
            log.error(
                "%d more lines as these are left out: /v2/repository/index says which versions cannot be "
                "served, or not as their files are now, and why; so does `overcommit check`",
                more,
            )
        if more := self._taking_over.take_more(now_ns):
            log.info("%d more versions work: they take over", more)

    def _say(self, level: int, name: str, version: str, text: str, now_ns: int) -> None:
        if self._broken.admits((name, version), text, now_ns):
            log.log(level, "%s version %s: %s", name, version, text)
