"""Telling front ends which versions there are: everything once, then what changes.

While thousands of versions are packed, each of them changes: front ends hear of them together, a few
times a second, because every announcement makes them forget what they had worked out for requests.

Invariants
 1. A front end gets the whole table first, and then every change, in order.
 2. No message is longer than a datagram, however many versions come and go at once; those that are gone
    are told after those that have come.
 3. A change that somebody waits for is told at once, and so is a removal; any other within SAY_NS of
    the next call, or with the next one that is told.

Called by the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from overcommit.runtime.config import CONTROL_MESSAGE_BYTES_MAX
from overcommit.runtime.control import encoded_bytes
from overcommit.runtime.entries import Entry, to_route
from overcommit.runtime.fleet import Fleet
from overcommit.runtime.front_end_messages import ModelNames, Route, Routes
from overcommit.runtime.spreading import Spreading

SAY_NS: Final = 100_000_000
# Slots in one message: they fit beside routes, which are cut at half of it, with what a slot takes at most.
REMOVED_MAX: Final = CONTROL_MESSAGE_BYTES_MAX // 4 // 5

_Item = TypeVar("_Item", Route, ModelNames)


def _parts(
    items: Iterable[_Item], message_of: Callable[[tuple[_Item, ...]], Routes]
) -> list[tuple[_Item, ...]]:
    """Cut a list into parts whose messages fit a datagram; only the last one may be empty."""
    parts: list[tuple[_Item, ...]] = []
    part: list[_Item] = []
    nbytes = 0
    for item in items:
        size = encoded_bytes(message_of((item,)))
        if part and nbytes + size > CONTROL_MESSAGE_BYTES_MAX // 2:
            parts.append(tuple(part))
            part, nbytes = [], 0
        part.append(item)
        nbytes += size
    parts.append(tuple(part))
    return parts


def name_messages(names: Iterable[ModelNames]) -> list[Routes]:
    """Tell what names mean, in messages that fit a datagram."""
    parts = _parts(names, lambda part: Routes(names=part))
    return [Routes(names=part, complete=False) for part in parts if part]


def route_messages(routes: Iterable[Route], removed: Iterable[int] = ()) -> list[Routes]:
    """Split a table into messages that fit a datagram; the last one is `complete`."""
    gone = tuple(removed)
    *parts, last = _parts(routes, lambda part: Routes(upsert=part))
    messages = [Routes(upsert=part, complete=False) for part in parts]
    early = max(0, len(gone) - REMOVED_MAX)  # these do not fit beside the last routes
    if early:
        messages.append(Routes(upsert=last, complete=False))
        last = ()
    for start in range(0, early, REMOVED_MAX):
        part = gone[start : min(early, start + REMOVED_MAX)]
        messages.append(Routes(removed=part, complete=False))
    return [*messages, Routes(upsert=last, removed=gone[early:], complete=True)]


class Announcer:
    """What front ends were told, and what they are still to be told."""

    def __init__(self, fleet: Fleet, spreading: Spreading | None = None) -> None:
        self._fleet = fleet
        self._spreading = spreading
        self._told: set[tuple[int, int]] = set()  # front ends that have the whole table
        self._unsaid: dict[int, Entry] = {}  # by slot
        self._said_ns = 0
        self.revision = 0  # grows with each change, told or not

    def is_unsaid(self, slot: int) -> bool:
        """Whether a change of this version waits to be told."""
        return slot in self._unsaid

    def note(self, entry: Entry, now_ns: int) -> None:
        """A version has changed, and nobody waits for it."""
        self.revision += 1
        self._unsaid[entry.slot] = entry
        self.step(now_ns)

    def step(self, now_ns: int) -> None:
        """Tell what has waited."""
        if self._unsaid and now_ns - self._said_ns >= SAY_NS:
            self.say((), (), now_ns)

    def say(self, changed: Iterable[Entry], removed: Iterable[int], now_ns: int) -> None:
        """Tell these changes now, and those that wait before them."""
        self._unsaid |= {entry.slot: entry for entry in changed}
        gone = tuple(removed)
        for slot in gone:
            self._unsaid.pop(slot, None)
        if not self._unsaid and not gone:
            return
        self.revision += 1
        self._said_ns = now_ns
        if self._spreading is not None:
            self._spreading.tell()  # where it is served, before it is asked for
        messages = route_messages([to_route(entry) for entry in self._unsaid.values()], gone)
        self._unsaid.clear()
        for front in self._fleet.of_kind("front_end", ready=False):
            if front.incarnation in self._told:
                for message in messages:
                    front.post(message)

    def say_names(self, names: Iterable[ModelNames]) -> None:
        """Tell what names mean from now on."""
        self.revision += 1
        for message in name_messages(names):
            for front in self._fleet.of_kind("front_end", ready=False):
                if front.incarnation in self._told:
                    front.post(message)

    def tell_new(self, entries: Iterable[Entry], names: Iterable[ModelNames] = ()) -> None:
        """Give the whole table to every front end that has none yet."""
        new = [
            front
            for front in self._fleet.of_kind("front_end", ready=False)
            if front.incarnation not in self._told
        ]
        if not new:
            return
        # Names first: a front end serves as soon as its table is complete.
        messages = [*name_messages(names), *route_messages([to_route(entry) for entry in entries])]
        for front in new:
            self._told.add(front.incarnation)
            if self._spreading is not None:
                self._spreading.greet(front)
            for message in messages:
                front.post(message)
