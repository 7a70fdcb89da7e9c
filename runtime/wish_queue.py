"""The wishes that wait for a load: in which order, and how long.

Between models: start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996), as between the lanes of a
worker.  A wish's tag is where the clock stands, or how far its version has come with what it was
charged before; the lowest tag goes first, the clock follows it, and a load is charged by its bytes.
So among models that are wanted all the time each gets an equal part of the bytes that are loaded,
and a giant waits for as many loads of others as it weighs.  First come, first served was left: each
model has one place in the queue then, and a giant of 1 GB among small ones of 8 MB gets 0.7 of the
disk.

Invariants
 1. A version has at most one wish, and a tag that never falls while it is charged for.
 2. Wishes come in the order of their tags; equal tags in order of arrival.  One that has waited
    for FAIR_WAIT_NS comes before all of them: however much its version was charged, it gets on.
    Next are those that are due: requests were told to come back, reckoned by this order, and it went
    slower than that; the one that should have begun first goes first.
 3. When nothing waits and nothing loads, all charges are forgotten: nobody pays later for what
    nobody else wanted.

Pure.  Owned by residency.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator
from typing import Final

from overcommit.runtime.admission import Forecast, Need
from overcommit.runtime.config import FAIR_WAIT_S, MIB, NEVER_NS, RESERVED_S
from overcommit.runtime.lateness import Lateness
from overcommit.runtime.parts import Part
from overcommit.runtime.residents import Version, Wish

FAIR_WAIT_NS: Final = int(FAIR_WAIT_S * 1e9)
RESERVED_NS: Final = int(RESERVED_S * 1e9)
LOAD_BYTES_MIN: Final = 1 * MIB  # a load is charged no less: it costs time that has no bytes
GRACE_NS: Final = 25_000_000  # for those who were told to come back, before it may be evicted
FORESEEN_NS_MIN: Final = 1_000_000  # shorter waits say little
DUE_LOADS: Final = 2.0  # a promised load should begin so many times its own time before its end
FORESEEN_MAX: Final = 256  # wishes ahead that are looked at one by one

Entry = tuple[float, int, int]  # tag, number of arrival, slot
Lacks = Callable[[Version], list[tuple[Part, Need]]]


class WishQueue:
    """Wishes by version."""

    def __init__(self, forecast: Forecast, lacks: Lacks) -> None:
        """`lacks` says which parts of a version have to be loaded, and from where."""
        self._forecast = forecast
        self._lacks = lacks
        self._wishes: dict[int, Wish] = {}  # by slot, in order of arrival
        self._order: list[Entry] = []
        self._entries: dict[int, Entry] = {}
        self._due: list[tuple[int, int]] = []  # when, slot: of the wishes that are promised
        self._charged: dict[int, float] = {}  # slot -> the tag that it has come to
        self._clock = 0.0
        self._arrivals = itertools.count()
        self._foreseen: dict[int, tuple[int, float]] = {}  # slot -> when, the wait as told then
        self._lateness = Lateness()

    def __len__(self) -> int:
        return len(self._wishes)

    def __contains__(self, slot: int) -> bool:
        return slot in self._wishes

    def get(self, slot: int) -> Wish | None:
        """Return the version's wish."""
        return self._wishes.get(slot)

    def by_arrival(self) -> Iterator[Wish]:
        """Yield all wishes, the oldest first."""
        return iter(self._wishes.values())

    def in_turn(self, now_ns: int) -> Iterator[Wish]:
        """Yield wishes in the order in which they are served; none may come or go meanwhile."""
        early: set[int] = set()
        for slot, wish in self._wishes.items():
            if now_ns - wish.asked_ns < FAIR_WAIT_NS:
                break
            early.add(slot)
            yield wish
        for due_ns, slot in self._due:
            if due_ns > now_ns:
                break
            if slot not in early:
                early.add(slot)
                yield self._wishes[slot]
        for _, _, slot in self._order:
            if slot not in early:
                yield self._wishes[slot]

    def add(self, wish: Wish) -> None:
        """A version is wanted."""
        slot = wish.version.slot
        assert slot not in self._wishes, "a version has one place in the queue"
        self._wishes[slot] = wish
        entry = max(self._clock, self._charged.get(slot, 0.0)), next(self._arrivals), slot
        self._entries[slot] = entry
        bisect.insort(self._order, entry)

    def drop(self, slot: int) -> Wish | None:
        """The wish ends without a load; None if there was none."""
        wish = self._wishes.pop(slot, None)
        if wish is not None:
            entry = self._entries.pop(slot)
            del self._order[bisect.bisect_left(self._order, entry)]
            if wish.is_promised:
                del self._due[bisect.bisect_left(self._due, (wish.due_ns, slot))]
        return wish

    def _promise(self, wish: Wish, due_ns: int) -> None:
        """Requests are told to come back; what they were told before stays true."""
        slot = wish.version.slot
        if due_ns >= wish.due_ns:
            return
        if wish.is_promised:
            del self._due[bisect.bisect_left(self._due, (wish.due_ns, slot))]
        wish.due_ns = due_ns
        bisect.insort(self._due, (due_ns, slot))

    def start(self, slot: int, nbytes: int) -> None:
        """The wish's loads begin: it is charged for so many bytes."""
        tag = self._entries[slot][0]
        self.drop(slot)
        self._clock = max(self._clock, tag)
        self._charged[slot] = tag + max(LOAD_BYTES_MIN, nbytes)
        if len(self._charged) > 2 * len(self._wishes) + 1024:
            self._charged = {s: to for s, to in self._charged.items() if to > self._clock}

    def forget(self, slot: int) -> None:
        """The version is gone, with its wish."""
        self.drop(slot)
        self._charged.pop(slot, None)
        self._foreseen.pop(slot, None)

    def rest(self) -> None:
        """Nothing waits and nothing loads."""
        assert not self._wishes
        self._charged.clear()
        self._clock = 0.0

    # --- how long -------------------------------------------------------------------------------
    def wait_ns(self, version: Version, now_ns: int) -> tuple[float, float] | None:
        """Return the least time until it is loaded, and what of it is its own; None: unknown.

        For a version that is not in the queue: if it were added now.  A part that several of them
        lack is counted once, where it comes first.
        """
        entry = self._entries.get(version.slot)
        if entry is None:
            tag = max(self._clock, self._charged.get(version.slot, 0.0))
            entry = tag, next(self._arrivals), version.slot
        before = bisect.bisect_left(self._order, entry)
        looked_at = min(before, FORESEEN_MAX)
        seen: set[Part] = set()
        ahead: list[list[Need]] = []
        for _, _, slot in self._order[:looked_at]:
            ahead.append(self._needs(self._wishes[slot].version, seen))
        own = self._needs(version, seen)
        own_ns = self._forecast.cost_ns(own)
        wait_ns = self._forecast.wait_ns(own, ahead, now_ns)
        if own_ns is None or wait_ns is None:
            return None
        if looked_at < before:
            # The rest is taken to be like those that were looked at.
            wait_ns += (before - looked_at) * (wait_ns - own_ns) / looked_at
        return wait_ns, own_ns

    def _needs(self, version: Version, seen: set[Part]) -> list[Need]:
        needs = [need for part, need in self._lacks(version) if part not in seen]
        seen.update(version.parts)
        return needs

    def expect(self, version: Version, earliest_ns: int, now_ns: int) -> tuple[int, int] | None:
        """Return when it is loaded at the earliest, and likely, if that is later than this.

        None: it is not, or nothing is known.  Its wish, if it has one, is then a promise.
        """
        wish = self._wishes.get(version.slot)
        own_ns = 0.0
        if wish is None:
            jobs = [part.job for part in version.parts if part.job]
            wait_ns = self._forecast.loading_ns(jobs, now_ns)
        else:
            foreseen = self.wait_ns(version, now_ns)
            wait_ns, own_ns = (None, 0.0) if foreseen is None else foreseen
            if wait_ns is not None and wish.not_before_ns > now_ns:
                wait_ns = max(wait_ns, wish.held_until_ns - now_ns + own_ns)
        if wait_ns is None or now_ns + wait_ns <= earliest_ns:
            return None
        self._foreseen.setdefault(version.slot, (now_ns, wait_ns))
        likely_ns = now_ns + self.likely_ns(wait_ns)
        if wish is not None:
            self._promise(wish, likely_ns - int(DUE_LOADS * own_ns))
        version.promised_ns = max(version.promised_ns, likely_ns + GRACE_NS)
        return now_ns + int(wait_ns), likely_ns

    def likely_ns(self, wait_ns: float) -> int:
        """Return within which time what takes so long at least has nearly always been done."""
        return int(wait_ns * self._lateness.factor)

    def load_ns(self, version: Version) -> float:
        """Return what a load of the whole version takes by itself, 0 while unknown."""
        return self._forecast.cost_ns([("host" if version.host else "disk", version.nbytes)]) or 0.0

    def promise(self, version: Version, at_ns: int) -> None:
        """A version's wish, if it has one, is for requests that come at this time."""
        if (wish := self._wishes.get(version.slot)) is not None:
            self._promise(wish, at_ns - int(DUE_LOADS * self.load_ns(version)))

    def on_published(self, slot: int, now_ns: int) -> None:
        """A version is on DEVICE: learn how much longer than foreseen it took."""
        at_ns, wait_ns = self._foreseen.pop(slot, (0, 0.0))
        if wait_ns >= FORESEEN_NS_MIN:
            self._lateness.note((now_ns - at_ns) / wait_ns)

    def back_s(self, version: Version, latest_ns: int, now_ns: int) -> float | None:
        """Return None if the version may be queued, else in how many seconds to ask again.

        It may if some request for it can still be answered in time, or if what is ahead of it
        takes RESERVED_S at most: then the requests are refused, and served when they come back.
        """
        if latest_ns >= NEVER_NS or not self._wishes:
            return None
        foreseen = self.wait_ns(version, now_ns)
        if foreseen is None:
            return None
        wait_ns, own_ns = foreseen
        if now_ns + wait_ns <= latest_ns or wait_ns - own_ns <= RESERVED_NS:
            return None
        return (now_ns + wait_ns - latest_ns) / 1e9
