"""Where entries are found: by slot, by name and version, and in order.

Invariants
 1. `_slots` has every entry until nothing uses it any more, `_current` those that a client can name.
 2. `_successors` has those that wait to take the place of one in `_current`.
 3. Who changes `_current` sets `_names` to None, and the order is made anew when somebody asks; or says by
    `_swap` that one took another's place, which costs no order (45 ms, of 20,000).

Pure.  Called by the registry, which is one, and through it by the supervisor's rooms.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator

from overcommit.runtime.entries import Entry, State, order
from overcommit.runtime.errors import NotFound


class Shelf:
    """All entries, by slot and by name."""

    def __init__(self) -> None:
        self._slots: dict[int, Entry] = {}
        self._current: dict[tuple[str, str], Entry] = {}
        self._successors: dict[int, Entry] = {}  # by the slot of the entry that still serves
        self._names: dict[str, tuple[Entry, ...]] | None = None
        self._ordered: list[Entry] = []
        self._ensembles: list[Entry] = []

    def __len__(self) -> int:
        return len(self._current)

    def entries(self) -> Iterator[Entry]:
        """Yield what is current, by name and numeric version."""
        self._by_name()
        return iter(self._ordered)

    def with_hidden(self) -> Iterator[Entry]:
        """Yield every entry, also those that wait to take over, or leave, in no order."""
        return iter(self._slots.values())

    def ensembles(self) -> list[Entry]:
        """Return those of `entries` that have steps."""
        self._by_name()
        return self._ensembles

    def page(self, offset: int, limit: int) -> list[Entry]:
        """Return one page of `entries`."""
        self._by_name()
        return self._ordered[offset : offset + limit]

    def by_slot(self, slot: int) -> Entry | None:
        """Return the entry of a slot: current, a successor, or retired but still in use."""
        return self._slots.get(slot)

    def find(self, name: str, version: str | None = None) -> Entry:
        """Return a version; without a version, the newest that can be used, else the newest.

        Raises NotFound.
        """
        versions = self._by_name().get(name)
        if not versions:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        if version:
            entry = self._current.get((name, version))
            if entry is None:
                known = ", ".join(entry.version for entry in versions[:20])
                raise NotFound(
                    f"Request for unknown model: '{name}' version {version} is not found; there "
                    f"is {known}"
                )
            return entry
        for entry in reversed(versions):
            if entry.state in (State.READY, State.PACKING):
                return entry
        return versions[-1]

    def folders(self) -> list[str]:
        """Return the folders of all entries, leaving ones too."""
        return [entry.folder for entry in self._slots.values()]

    def has(self, name: str) -> bool:
        """Whether there is a model of this name, in whatever state."""
        return name in self._by_name()

    def versions(self, name: str) -> tuple[Entry, ...]:
        """Return every version of a model, in numeric order.  Raises NotFound."""
        self.find(name)
        return self._by_name()[name]

    def with_successors(self, name: str) -> Iterator[Entry]:
        """Yield every version of a model, and those that wait to take their places.  Raises NotFound."""
        for entry in self.versions(name):
            yield entry
            if entry.slot in self._successors:
                yield self._successors[entry.slot]

    def successor_slot(self, entry: Entry) -> int:
        """Return the slot of the entry that waits to take its place; its own where none does."""
        return self._successors.get(entry.slot, entry).slot

    def is_successor(self, entry: Entry) -> bool:
        """Whether it waits to take the place of an entry of its name and version."""
        current = self._current.get((entry.name, entry.version))
        return current is not None and self._successors.get(current.slot) is entry

    def _works(self, name: str) -> bool:
        """Whether some version serves or may come to serve."""
        return any(entry.state is not State.UNAVAILABLE for entry in self._by_name().get(name, ()))

    def _swap(self, old: Entry, new: Entry) -> None:
        """Make an entry current in the place of one of its name and version."""
        self._current[new.name, new.version] = new
        if self._names is None:
            return
        versions = self._names[new.name]
        self._names[new.name] = tuple(new if entry is old else entry for entry in versions)
        self._ordered[bisect.bisect_left(self._ordered, order(new), key=order)] = new
        if old.config.steps or new.config.steps:
            self._ensembles = [entry for entry in self._ordered if entry.config.steps]

    def _by_name(self) -> dict[str, tuple[Entry, ...]]:
        if self._names is None:
            self._ordered = sorted(self._current.values(), key=order)
            self._ensembles = [entry for entry in self._ordered if entry.config.steps]
            groups = itertools.groupby(self._ordered, key=lambda entry: entry.name)
            self._names = {name: tuple(entries) for name, entries in groups}
        return self._names
