"""The thread that looks at the repository, and what it has seen.

    asleep --the scan interval is over--> looking at some of it (`scanner`)
    asleep --somebody asks--> looking at the folders that were asked about, and at no others

Invariants
 1. The first result is that of the first look, and there is one however empty the repository is.
 2. Who asks is told when a look has begun after the question and is over; a change that it saw is told no
    later.
 3. A repository that cannot be read is said once, and that it can be read again; what was seen serves on.
 4. A look that fails is not the last one, whatever it failed by.
 5. Only the results, the questions and the bell are shared between the threads.

Called by the catalogue, from the supervisor's one thread.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from overcommit.runtime.repository import VersionSource
from overcommit.runtime.scanner import Scanner

log = logging.getLogger("overcommit.catalogue")


@dataclass(slots=True, frozen=True)
class Seen:
    """What a look has seen."""

    sources: list[VersionSource] | None  # None: what was there before
    answered: tuple[int, ...] = ()  # tickets of questions


class Watch:
    """Looks at the repository in a thread of its own; `fd` becomes readable when there is a result."""

    def __init__(self, roots: Iterable[str], cache_dir: str, interval_s: float) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._scanner = Scanner([Path(root) for root in roots], Path(cache_dir))
        self._interval_s = interval_s
        self._results: queue.SimpleQueue[Seen] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[tuple[int, tuple[str, ...]]] = queue.SimpleQueue()
        self._tickets = 0
        self._woken = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._trouble = ""  # the thread's alone: what was said of the repository

    def start(self) -> None:
        """Begin to look."""
        self._thread = threading.Thread(target=self._run, name="scanner", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._woken.set()
        if self._thread is not None:
            self._thread.join()
        os.close(self.fd)

    def look_at(self, names: Iterable[str]) -> int:
        """Have these models' folders looked at as they are now; return the ticket of the answer."""
        self._tickets += 1
        self._asked.put((self._tickets, tuple(names)))
        self._woken.set()
        return self._tickets

    def take(self) -> list[Seen]:
        """Take the results that are there."""
        os.eventfd_read(self.fd)
        taken: list[Seen] = []
        while not self._results.empty():
            taken.append(self._results.get())
        return taken

    # --- in the thread --------------------------------------------------------------------------
    def _run(self) -> None:
        scanner = self._scanner
        try:
            scanner.first()
        except Exception as error:
            self._complain(error)
        self._tell(Seen(scanner.sources))  # an empty repository is a result too
        due_s = time.monotonic() + self._interval_s
        while True:
            self._woken.wait(max(0.0, due_s - time.monotonic()))
            self._woken.clear()
            if self._closing.is_set():
                return
            tickets, names = self._questions()
            is_changed = False
            try:
                if names:
                    is_changed = scanner.look_at(names)
                if time.monotonic() >= due_s:
                    due_s = time.monotonic() + self._interval_s
                    is_changed = scanner.look() or is_changed
                    self._complain(None)
            except Exception as error:  # the boundary of the thread: the next look may see it
                self._complain(error)
            if is_changed or tickets:
                self._tell(Seen(scanner.sources if is_changed else None, tickets))

    def _complain(self, error: Exception | None) -> None:
        trouble = "" if error is None else str(error) or repr(error)
        if trouble and trouble != self._trouble:
            is_ours = not isinstance(error, OSError)
            text = "the repository cannot be read, what was there is served: %s"
            log.error(text, trouble, exc_info=error if is_ours else None)
        elif self._trouble and not trouble:
            log.info("the repository can be read again")
        self._trouble = trouble

    def _questions(self) -> tuple[tuple[int, ...], list[str]]:
        tickets: list[int] = []
        names: dict[str, None] = {}
        while not self._asked.empty():
            ticket, asked = self._asked.get()
            tickets.append(ticket)
            names |= dict.fromkeys(asked)
        return tuple(tickets), list(names)

    def _tell(self, seen: Seen) -> None:
        self._results.put(seen)
        os.eventfd_write(self.fd, 1)
