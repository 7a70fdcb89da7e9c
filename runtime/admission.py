"""When a version that is wanted would be on DEVICE: the wait for loads, foreseen.

Each source (the disk, the host tier) is a channel that its loads share.  What a load costs its
channel is measured as the time for which it would have had the channel to itself: while n loads run,
each is charged 1/n of the time.  So loads that run side by side, of any sizes, give one line of cost
over bytes, and what is left of a load in flight follows from how much it has been charged.

A forecast is the least time that the loads ahead can take, not the likely one: whoever is refused on
its strength could not have been served.  What it leaves out (room that must first become free,
binding, somebody who overtakes) makes waits longer.

Invariants
 1. A forecast does not fall when a load is added ahead, or when one of them, or the version itself,
    has more bytes.
 2. There is no forecast (None) while the cost of a source that the version needs is unknown; a source
    of loads ahead that is unknown counts nothing.
 3. A load that failed says nothing of costs.

Pure.  Called by residency.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from overcommit.runtime.config import LOADS_IN_FLIGHT_MAX
from overcommit.runtime.pace import Pace
from overcommit.runtime.residents import Source

Need = tuple[Source, int]  # where from, bytes

SOURCES: Final[tuple[Source, ...]] = ("disk", "host")


def least_ns(
    ahead: Iterable[float], own_ns: float, abreast: int, widest_ns: float | None = None
) -> float:
    """Return the least time until work is done that is queued behind others.

    `abreast` of them share the channel at a time, first come, first served.  Those that must end
    before it begins take at least what the smallest of them need; the rest of them run beside it,
    and each of those takes as much of the channel as it does: as its widest piece, if it has some.
    """
    works = sorted(ahead)
    first = works[: max(0, len(works) - (abreast - 1))]
    rest = works[len(first) :]
    beside_ns = own_ns if widest_ns is None else widest_ns
    return sum(first) + sum(min(work, beside_ns) for work in rest) + own_ns


class Channel:
    """One source and the loads that run from it."""

    def __init__(self) -> None:
        self.pace = Pace()
        self._charged_ns = 0.0  # so far to each load that has been here all the time
        self._at_ns = 0
        self._running: dict[int, tuple[int, float]] = {}  # job -> bytes, what was charged before it

    def __len__(self) -> int:
        return len(self._running)

    def start(self, job: int, nbytes: int, now_ns: int) -> None:
        """A load begins."""
        self._advance(now_ns)
        self._running[job] = nbytes, self._charged_ns

    def end(self, job: int, ok: bool, now_ns: int) -> None:
        """A load ends; one that is not known is ignored."""
        self._advance(now_ns)
        nbytes, before_ns = self._running.pop(job, (0, 0.0))
        if ok and nbytes:
            self.pace.note(nbytes, self._charged_ns - before_ns)

    def left_of(self, job: int, now_ns: int) -> float:
        """Return what this load still needs."""
        self._advance(now_ns)
        return self._left(job)

    def _left(self, job: int) -> float:
        nbytes, before_ns = self._running[job]
        return max(0.0, self.pace.of(nbytes) - (self._charged_ns - before_ns))

    def _advance(self, now_ns: int) -> None:
        if self._running:
            self._charged_ns += max(0, now_ns - self._at_ns) / len(self._running)
        self._at_ns = max(self._at_ns, now_ns)


class Forecast:
    """The channels of one server."""

    def __init__(self) -> None:
        self.channels: dict[Source, Channel] = {source: Channel() for source in SOURCES}
        self._jobs: dict[int, tuple[Source, int]] = {}  # in flight: from where, for which version
        self._busy_since_ns = 0
        self._busy_ns = 0

    # --- events ---------------------------------------------------------------------------------
    def on_started(self, job: int, slot: int, source: Source, nbytes: int, now_ns: int) -> None:
        """A load was handed to the mover."""
        if not self._jobs:
            self._busy_since_ns = now_ns
        self._jobs[job] = source, slot
        self.channels[source].start(job, nbytes, now_ns)

    def on_ended(self, job: int, ok: bool, now_ns: int) -> None:
        """The mover has ended it."""
        source, _ = self._jobs.pop(job, (None, 0))
        if source is None:
            return
        self.channels[source].end(job, ok, now_ns)
        if not self._jobs:
            self._busy_ns += max(0, now_ns - self._busy_since_ns)

    # --- asking ---------------------------------------------------------------------------------
    def busy_ns(self, now_ns: int) -> int:
        """Return for how long, since the start, at least one load was in flight."""
        running = max(0, now_ns - self._busy_since_ns) if self._jobs else 0
        return self._busy_ns + running

    def cost_ns(self, needs: Iterable[Need]) -> float | None:
        """Return what loads take that have their channels to themselves; None: unknown."""
        total = 0.0
        for source, nbytes in needs:
            pace = self.channels[source].pace
            if not pace.is_known:
                return None
            total += pace.of(nbytes)
        return total

    def wait_ns(
        self, own: Sequence[Need], queued: Sequence[Sequence[Need]], now_ns: int
    ) -> float | None:
        """Return the least time until what a version needs is loaded, after what others need."""
        if self.cost_ns(own) is None:
            return None
        waits = []
        for source, channel in self.channels.items():
            mine = _costs(own, source, channel)
            ahead = list(self._in_flight(source, now_ns).values())
            ahead += [sum(costs) for needs in queued if (costs := _costs(needs, source, channel))]
            waits.append(least_ns(ahead, sum(mine), LOADS_IN_FLIGHT_MAX, max(mine, default=0.0)))
        return max(waits)

    def loading_ns(self, jobs: Iterable[int], now_ns: int) -> float | None:
        """Return the least time until these loads in flight are done; None: unknown, or none."""
        by_source: dict[Source, list[float]] = {}
        slots: set[int] = set()
        for job in jobs:
            source, slot = self._jobs.get(job, (None, 0))
            if source is None or not self.channels[source].pace.is_known:
                return None
            by_source.setdefault(source, []).append(self.channels[source].left_of(job, now_ns))
            slots.add(slot)
        waits = []
        for source, mine in by_source.items():
            lefts = self._in_flight(source, now_ns)
            others = [left for slot, left in lefts.items() if slot not in slots]
            waits.append(least_ns(others, sum(mine), len(others) + 1, max(mine)))
        return max(waits, default=None)

    def _in_flight(self, source: Source, now_ns: int) -> dict[int, float]:
        """What each version with loads in flight still needs of a channel."""
        lefts: dict[int, float] = {}
        for job, (kind, slot) in self._jobs.items():
            if kind == source:
                left_ns = self.channels[source].left_of(job, now_ns)
                lefts[slot] = lefts.get(slot, 0.0) + left_ns
        return lefts


def _costs(needs: Iterable[Need], source: Source, channel: Channel) -> list[float]:
    return [channel.pace.of(nbytes) for kind, nbytes in needs if kind == source]
