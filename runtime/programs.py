"""The programs of all versions, as the fork server has to know them: what they import.

The fork server imports it once, and every worker that it forks from then on has it.

Invariants
 1. An image of each program is read once, and what it needs is asked of each fork server once.
 2. A fork server that came in a dead one's place is asked for everything.

Called by the catalogue, from the supervisor's one thread.
"""

from __future__ import annotations

import contextlib

from overcommit.runtime.entries import Entry
from overcommit.runtime.errors import ImageError
from overcommit.runtime.fleet import Fleet
from overcommit.runtime.image import read_header
from overcommit.runtime.preload import modules_of
from overcommit.runtime.process import ForkServer


class Programs:
    """See the module."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._known: set[str] = set()  # keys of those whose imports are known
        self._new: dict[str, str] = {}  # key -> an image of it
        self._modules: set[str] = set()  # what known programs import
        self._preloaded_by: ForkServer | None = None

    def note(self, entry: Entry) -> None:
        """A version is there, and its program perhaps a new one."""
        if entry.program_key not in self._known and entry.image_path:
            self._new.setdefault(entry.program_key, entry.image_path)

    def step(self) -> None:
        """Have the fork server import what known programs need, for the workers to come."""
        server = self._fleet.fork_server
        if not self._new and server is self._preloaded_by:
            return
        if server is None or not server.is_ready or server.unfit is not None:
            return
        new: set[str] = set()
        for image_path in self._new.values():
            with contextlib.suppress(ImageError):
                new.update(modules_of(read_header(image_path)[0].program))
        self._known |= self._new.keys()
        self._new.clear()
        wanted = new - self._modules if self._preloaded_by is server else new | self._modules
        self._modules |= new
        self._preloaded_by = server
        if wanted:
            server.preload(tuple(sorted(wanted)))
