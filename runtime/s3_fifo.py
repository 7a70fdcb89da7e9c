"""S3-FIFO: a small queue that filters, a main queue, and the names of those that were filtered out.

Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, with bytes in place of
objects.  A version comes into the small queue; if it was used again by the time its turn comes it
moves on to main, else it leaves and its name is kept; whoever comes back while its name is known
comes into main at once.  In main a version that was used since its last turn gets another one.

Here the request that asked for a load is no use *again*, and a tier holds 5 to 5,000 versions, so one
more use is enough for main (the paper, with millions of objects: two).

Invariants
 1. A member of the order is in exactly one queue.  The small queue gives up first while it holds
    more than SMALL_SHARE of the bytes, or main holds nobody.
 2. A version gets at most USES_MAX further turns for its uses, so a walk ends.
 3. Names are kept for at most as many bytes as main holds, and NAMES_MAX.
 4. The rank is not the order: it only says whether something of the version has changed.

Pure.  Made by `policy.make_policy` and `policy.make_order`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Final

from overcommit.runtime.greedy_dual import Rank, Source

SMALL_SHARE: Final = 0.1
USES_MAX: Final = 3
NAMES_MAX: Final = 65_536


@dataclass(slots=True)
class _Known:
    nbytes: int
    priority: int
    uses: int = 0  # as told last: counters of a worker that died are lost
    counted: int = 0  # in all; never shrinks
    again: int = 0  # since it came or had its last turn, without the one that asked for it
    credit: int = 0
    last_ns: int = 0


class S3Fifo:
    """What is known of versions; `Queues` has the order."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._names: dict[int, int] = {}  # who left the small queue unused -> bytes, oldest first
        self._name_bytes = 0

    def on_add(self, slot: int, nbytes: int, priority: int) -> None:
        """Know the version; what is known of its use is kept if it was not removed since."""
        known = self._known.setdefault(slot, _Known(nbytes, priority))
        known.nbytes, known.priority = max(1, nbytes), priority

    def on_use(self, slot: int, uses: int, now_ns: int) -> None:
        """Count what is new."""
        known = self._known[slot]
        new = max(0, uses - known.uses)
        known.uses = uses
        known.counted += new
        paid = min(new, known.credit)
        known.credit -= paid
        known.again = min(USES_MAX, known.again + new - paid)
        known.last_ns = max(known.last_ns, now_ns)

    def on_load(self, slot: int, load_ns: int, source: Source) -> None:
        """It starts anew; the request that asked for it has not run yet."""
        known = self._known[slot]
        known.again, known.credit = 0, 1

    def on_copy(self, slot: int, is_there: bool) -> None:
        """Do nothing: queues do not care what a load costs."""

    def on_evict(self, slot: int, now_ns: int) -> None:
        """Do nothing: the queues know who leaves, and from which."""

    def on_remove(self, slot: int) -> None:
        """Forget the version and its name."""
        self._known.pop(slot, None)
        self.take_name(slot)

    def rank(self, slot: int) -> Rank:
        """By priority and use; see invariant 4."""
        known = self._known[slot]
        return known.priority, known.counted, known.last_ns

    # --- for the queues -------------------------------------------------------------------------
    def nbytes(self, slot: int) -> int:
        """Return the version's size."""
        return self._known[slot].nbytes

    def priority(self, slot: int) -> int:
        """Return the version's priority."""
        return self._known[slot].priority

    def is_used_again(self, slot: int) -> bool:
        """It has a further turn to its credit."""
        return self._known[slot].again > 0

    def spend(self, slot: int, everything: bool) -> None:
        """It has had a further turn: for one use, or for all of them."""
        known = self._known[slot]
        known.again = 0 if everything else known.again - 1

    def keep_name(self, slot: int, bytes_max: int) -> None:
        """It left the small queue unused."""
        self.take_name(slot)
        nbytes = self._known[slot].nbytes
        self._names[slot] = nbytes
        self._name_bytes += nbytes
        while self._names and (self._name_bytes > bytes_max or len(self._names) > NAMES_MAX):
            self.take_name(next(iter(self._names)))

    def take_name(self, slot: int) -> bool:
        """Forget the name; True if it was known."""
        nbytes = self._names.pop(slot, None)
        self._name_bytes -= nbytes or 0
        return nbytes is not None


@dataclass(slots=True)
class _Queues:
    """Of one priority, the oldest first; values are bytes as counted when it came in."""

    small: dict[int, int] = field(default_factory=dict)
    main: dict[int, int] = field(default_factory=dict)
    small_bytes: int = 0
    main_bytes: int = 0

    def put(self, slot: int, nbytes: int, is_main: bool) -> None:
        if is_main:
            self.main[slot] = nbytes
            self.main_bytes += nbytes
        else:
            self.small[slot] = nbytes
            self.small_bytes += nbytes

    def take(self, slot: int) -> bool:
        """Take it out of its queue; True if that was the small one."""
        if slot in self.small:
            self.small_bytes -= self.small.pop(slot)
            return True
        self.main_bytes -= self.main.pop(slot)
        return False


class Queues:
    """Who leaves first: the order of one tier, as `policy.Order` is for ranks."""

    def __init__(self, policy: S3Fifo) -> None:
        self._policy = policy
        self._queues: dict[int, _Queues] = {}  # by priority
        self._members: dict[int, int] = {}  # slot -> priority, as it came in

    def __len__(self) -> int:
        return len(self._members)

    def add(self, slot: int) -> None:
        """Take a slot in, or take notice of its new priority."""
        priority, is_main = self._policy.priority(slot), self._policy.take_name(slot)
        if slot in self._members:
            if self._members[slot] == priority:
                return
            is_main = not self._queues[self._members[slot]].take(slot)
        queues = self._queues.setdefault(priority, _Queues())
        queues.put(slot, self._policy.nbytes(slot), is_main)
        self._members[slot] = priority

    def discard(self, slot: int) -> None:
        """Leave a slot out from now on; from the small queue, remember its name."""
        priority = self._members.pop(slot, None)
        if priority is None:
            return
        queues = self._queues[priority]
        if queues.take(slot):
            self._policy.keep_name(slot, queues.main_bytes)
        if not queues.small and not queues.main:
            del self._queues[priority]

    def victims(self) -> Generator[int, None, None]:
        """Yield slots in turn; one whose rank changes when it is offered comes again."""
        for priority in sorted(self._queues):
            queues = self._queues.get(priority)
            if queues is not None:
                yield from self._walk(queues)

    def _walk(self, queues: _Queues) -> Generator[int, None, None]:
        small, main = iter(list(queues.small)), list(queues.main)
        at = 0
        small_left = queues.small_bytes
        next_small = next(small, None)
        while next_small is not None or at < len(main):
            share = SMALL_SHARE * (queues.small_bytes + queues.main_bytes)
            is_small = next_small is not None and (small_left > share or at >= len(main))
            slot = next_small if is_small else main[at]
            assert slot is not None
            if is_small:
                small_left -= queues.small.get(slot, 0)
                next_small = next(small, None)
            else:
                at += 1
            if slot not in (queues.small if is_small else queues.main):
                continue  # it has left
            if not self._policy.is_used_again(slot):
                former = self._policy.rank(slot)
                yield slot
                if slot not in self._members or self._policy.rank(slot) == former:
                    continue
                if not self._policy.is_used_again(slot):
                    yield slot
                    continue
            # Another turn: from the small queue on to main, in main at its end.
            self._policy.spend(slot, everything=is_small)
            queues.put(slot, self._take_bytes(queues, slot), is_main=True)
            main.append(slot)

    def _take_bytes(self, queues: _Queues, slot: int) -> int:
        queues.take(slot)
        return self._policy.nbytes(slot)
