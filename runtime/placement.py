"""Making room in a tier.

A `Room` is a tier's holdings and the versions that hold parts there.  Asked to place a version's
parts, it takes free bytes, or chooses victims and takes theirs.  DEVICE and HOST differ in who may be
a victim and in what evicting means; both are here.

Invariants
 1. A version that is placed holds all its parts on DEVICE, and on HOST some of them; parts that are
    there already cost nothing, and no victim takes one of them along.
 2. On DEVICE a version that is pinned, leased or on its way out is never a victim.  One that was
    published less than its `min_resident_ns`, or the room's, ago is one only for a desperate wish;
    so is one that requests wait for, and that only STARVING_S after it was published.
    The last word is the port's `try_evict`: it asks the leases.
 3. On HOST a copy that a load reads or writes is never a victim, nor one that a queued wish will
    read.  Victims are first those that DEVICE also holds: losing that copy costs nothing now.
 4. Nothing is evicted for a wish that the victims at hand cannot satisfy, unless it is desperate;
    then what it frees stays free until it fits (residency lets nobody else take it).
 5. Of the versions that the policy offers, the set that leaves is minimal: none could have stayed.
    What counts is what the set frees: a part that others hold too is freed with the last of them.
    Small models that share a slab leave together where a part of a chunk helps nobody.
 6. For the policy a version on DEVICE has the size of what it alone holds there.

Called by residency.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Generator, Iterable, Iterator
from typing import Final

from overcommit.runtime._shm import ABSENT
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.config import SLAB_MODEL_BYTES_MAX, SMALL_CHUNK_BYTES
from overcommit.runtime.holdings import Choice, Holdings
from overcommit.runtime.parts import Part
from overcommit.runtime.policy import Order, Policy
from overcommit.runtime.residents import Parts, Port, State, Totals, Version

STARVING_S: Final = 1.0  # a wish that waited so long may take what others wait for
STARVING_NS: Final = int(STARVING_S * 1e9)


class Room:
    """One tier; subclasses say who may leave it and how."""

    def __init__(self, allocator: ChunkAllocator, policy: Policy, totals: Totals) -> None:
        self.allocator = allocator
        self.holdings = Holdings(allocator)
        self.holders: dict[int, Version] = {}
        self._policy = policy
        self._order = Order(policy)
        self._totals = totals
        self._slabs: collections.defaultdict[int, set[int]] = collections.defaultdict(set)

    # --- what a tier must say -------------------------------------------------------------------
    def held(self, version: Version) -> Parts:
        """Return the parts that the version holds here."""
        raise NotImplementedError

    def _set_held(self, version: Version, parts: Parts) -> None:
        raise NotImplementedError

    def _offers(self, now_ns: int, desperate: bool) -> Generator[Version, None, None]:
        """Yield those that may leave now, the least precious first."""
        raise NotImplementedError

    def _may_leave(self, version: Version, now_ns: int, desperate: bool) -> bool:
        raise NotImplementedError

    def _try_evict(self, version: Version) -> bool:
        raise NotImplementedError

    # --- holding --------------------------------------------------------------------------------
    def try_place(
        self, version: Version, parts: Parts, now_ns: int, *, desperate: bool = False
    ) -> bool:
        """Hold these parts for the version, evicting others where that is allowed and enough."""
        before = self.held(version)
        there = [part for part in parts if part in self.holdings.places]
        self.holdings.try_hold(version, there)  # no victim takes them along
        if not self.holdings.try_hold(version, parts) and not self._try_make_room(
            version, parts, now_ns, desperate
        ):
            self.holdings.let_go(version, [part for part in there if part not in before])
            return False
        held = tuple(dict.fromkeys((*before, *parts)))
        self._set_held(version, held)
        if version.slot not in self.holders:
            self.holders[version.slot] = version
            self._order.add(version.slot)
        if (slab := self.holdings.slab_of(held)) is not None:
            self._slabs[slab].add(version.slot)
        return True

    def release(self, version: Version) -> None:
        """The version holds nothing here any more."""
        held = self.held(version)
        del self.holders[version.slot]
        self._order.discard(version.slot)
        if (slab := self.holdings.slab_of(held)) is not None:
            self._slabs[slab].discard(version.slot)
            if not self._slabs[slab]:
                del self._slabs[slab]
        self._set_held(version, ())
        self.holdings.let_go(version, held)

    def on_priority(self, version: Version) -> None:
        """Its rank may have shrunk."""
        if self.holders.get(version.slot) is version:
            self._order.add(version.slot)

    def on_leaving(self, version: Version) -> None:
        """It is ranked no more, though it still holds bytes."""
        self._order.discard(version.slot)

    # --- making room ----------------------------------------------------------------------------
    def _try_make_room(self, version: Version, parts: Parts, now_ns: int, desperate: bool) -> bool:
        holdings = self.holdings
        with contextlib.closing(self._offers(now_ns, desperate)) as offers:
            needed = holdings.footprint(holdings.missing(parts)) - self.allocator.free_bytes
            chosen: list[Version] = []
            choice = Choice(holdings)
            while choice.freed < needed and (victim := next(offers, None)) is not None:
                chosen.append(victim)
                choice.add(self.held(victim))
            if choice.freed < needed and not desperate:
                return False
            kept, spared = self._without_superfluous(chosen, choice, needed)
            for victim, is_checked in self._in_turn(kept, itertools.chain(spared, offers)):
                if victim.slot not in self.holders:
                    continue  # it left as another's mate
                if not (is_checked or self._may_leave(victim, now_ns, desperate)):
                    continue
                if self._try_evict(victim) and holdings.try_hold(version, parts):
                    return True
        return False

    def _without_superfluous(
        self, chosen: list[Version], choice: Choice, needed: int
    ) -> tuple[list[Version], list[Version]]:
        """Split the choice into those that must go and those that may stay, the precious first.

        The policy's order alone would evict three small models and then the big one that made them
        pointless.
        """
        kept, spared = [], []
        for victim in reversed(chosen):
            held = self.held(victim)
            if choice.freed - choice.loss(held) >= needed:
                choice.discard(held)
                spared.append(victim)
            else:
                kept.append(victim)
        return kept[::-1], spared[::-1]

    def _in_turn(
        self, kept: list[Version], rest: Iterable[Version]
    ) -> Iterator[tuple[Version, bool]]:
        """Yield victims, and whether they were checked, until the caller has what it needs.

        Bytes may suffice and still be no help: pages in slabs that others keep.  So where a victim
        lived in a slab, its mates go next, which frees the whole chunk, before the policy is asked
        for more.
        """
        slabs = self._slabs_of(kept)
        yield from ((victim, True) for victim in kept)
        yield from self._mates(slabs)
        for victim in rest:
            slabs = self._slabs_of([victim])
            yield victim, True
            yield from self._mates(slabs)

    def _slabs_of(self, victims: Iterable[Version]) -> list[int]:
        slabs = (self.holdings.slab_of(self.held(victim)) for victim in victims)
        return list(dict.fromkeys(slab for slab in slabs if slab is not None))

    def _mates(self, slabs: list[int]) -> Iterator[tuple[Version, bool]]:
        # The emptiest slab first: it takes the fewest evictions to free its chunk.
        for slab in sorted(slabs, key=lambda s: len(self._slabs.get(s, ()))):
            for slot in sorted(self._slabs.get(slab, ())):
                if slot in self.holders:
                    yield self.holders[slot], False


class DeviceRoom(Room):
    """DEVICE: whoever leaves has to be asked for, through the port."""

    def __init__(
        self, allocator: ChunkAllocator, policy: Policy, totals: Totals, port: Port
    ) -> None:
        super().__init__(allocator, policy, totals)
        self._port = port
        # Of every version, whatever its own is: raise it where evictions come too fast.
        self.min_resident_ns = 0

    def held(self, version: Version) -> Parts:
        """Return the version's parts on DEVICE: all or none."""
        return version.device

    def _set_held(self, version: Version, parts: Parts) -> None:
        version.device = parts

    def try_place(
        self, version: Version, parts: Parts, now_ns: int, *, desperate: bool = False
    ) -> bool:
        """See `Room`; who held a part alone and does no more is smaller now."""
        if not super().try_place(version, parts, now_ns, desperate=desperate):
            return False
        self._weigh(version)
        self._weigh_holders(version.device, 2)
        return True

    def release(self, version: Version) -> None:
        """See `Room`; who holds a part alone now has become larger."""
        held = version.device
        super().release(version)
        self._weigh_holders(held, 1)

    def _weigh_holders(self, parts: Parts, count: int) -> None:
        """Tell the policy of those whose part has just come to be held by so many."""
        for part in parts:
            place = self.holdings.places.get(part)
            if place is not None and part.digest and len(place.holders) == count:
                for holder in place.holders:
                    self._weigh(holder)

    def _weigh(self, version: Version) -> None:
        if not version.is_leaving:
            unique = max(1, self.holdings.unique_bytes(version.device))
            self._policy.on_add(version.slot, unique, version.terms.priority)

    def bytes_out_of_reach(self, version: Version, pinned: list[Version]) -> int:
        """Bytes that this version can never get, because these others keep theirs."""
        parts = {part for other in pinned for part in other.device} - set(version.parts)
        large = [part for part in parts if part.nbytes > SLAB_MODEL_BYTES_MAX]
        if all(part.nbytes <= SLAB_MODEL_BYTES_MAX for part in version.parts):
            return self.holdings.footprint(parts)
        slabs = SMALL_CHUNK_BYTES * len(self._slabs_of(pinned))  # a slab is no chunk for it
        return self.holdings.footprint(large) + slabs

    def bytes_needed(self, version: Version, pinned: list[Version]) -> int:
        """Bytes that it takes when nobody else is here but these."""
        parts = version.distinct_parts
        if len(parts) > 1 and self._slabs_of(pinned):
            # What is private may find a place in one of their slabs.
            parts = tuple(part for part in parts if part.nbytes > SLAB_MODEL_BYTES_MAX)
        return self.holdings.footprint(parts)

    def _offers(self, now_ns: int, desperate: bool) -> Generator[Version, None, None]:
        refreshed: set[int] = set()
        fresh: list[Version] = []
        queued_for: list[Version] = []
        with contextlib.closing(self._order.victims()) as slots:
            for slot in slots:
                version = self.holders[slot]
                if not _is_evictable(version, now_ns):
                    continue
                usage = self._port.usage(slot)
                if usage.uses != version.uses and slot not in refreshed:
                    # Used since the policy last heard of it: it comes again in its right place.
                    refreshed.add(slot)
                    version.uses = usage.uses
                    self._policy.on_use(slot, usage.uses, usage.last_used_ns)
                elif usage.leases:
                    continue
                elif usage.waiting:
                    queued_for.append(version)
                elif self._is_fresh(version, now_ns):
                    fresh.append(version)
                else:
                    yield version
        if desperate:
            yield from fresh
            # What was published a moment ago has not had its turn: two models that want the same
            # bytes would evict each other before either runs.
            yield from (v for v in queued_for if now_ns - v.published_ns >= STARVING_NS)

    def _may_leave(self, version: Version, now_ns: int, desperate: bool) -> bool:
        if not _is_evictable(version, now_ns):
            return False
        if self._is_fresh(version, now_ns) and not desperate:
            return False
        usage = self._port.usage(version.slot)
        return not usage.leases and not usage.waiting

    def _is_fresh(self, version: Version, now_ns: int) -> bool:
        stay_ns = max(version.terms.min_resident_ns, self.min_resident_ns)
        return now_ns - version.published_ns < stay_ns

    def try_expire(self, version: Version, now_ns: int) -> bool:
        """Evict a version that nobody has used for long, though nobody needs its bytes."""
        return self._may_leave(version, now_ns, desperate=False) and self.try_let_go(version)

    def _try_evict(self, version: Version) -> bool:
        """DEVICE -> HOST or DISK: free of cost, weights are immutable and the host copy stays."""
        if not self.try_let_go(version):
            return False
        version.evictions += 1
        self._totals.evictions_device += 1
        self._policy.on_evict(version.slot)
        return True

    def try_let_go(self, version: Version) -> bool:
        """Take the version off DEVICE unless a worker runs it."""
        assert version.state is State.DEVICE
        if not self._port.try_evict(version.slot, version.generation):
            return False
        self.release(version)
        version.state = State.HOST if version.host else State.DISK
        self._port.set_state(version.slot, ABSENT, version.generation)
        return True


class HostRoom(Room):
    """HOST: only the mover touches it, so nobody has to be asked."""

    def __init__(self, allocator: ChunkAllocator, policy: Policy, totals: Totals) -> None:
        super().__init__(allocator, policy, totals)
        self._doubles: dict[int, Version] = {}  # copies of what DEVICE holds, as published

    def on_published(self, version: Version) -> None:
        """DEVICE holds what the copy here holds."""
        self._doubles.pop(version.slot, None)
        self._doubles[version.slot] = version

    def held(self, version: Version) -> Parts:
        """Return the version's parts on HOST, which may be some of them."""
        return version.host

    def _set_held(self, version: Version, parts: Parts) -> None:
        version.host = parts

    def _offers(self, now_ns: int, desperate: bool) -> Generator[Version, None, None]:
        looked_at: list[Version] = []
        try:
            # The youngest first: what stays on DEVICE longest needs its copy last.
            while self._doubles:
                _, version = self._doubles.popitem()
                if version.state is State.DEVICE:  # else the copy became the only one
                    looked_at.append(version)
                    yield version
        finally:
            self._doubles |= {v.slot: v for v in reversed(looked_at) if v.slot in self.holders}
        with contextlib.closing(self._order.victims()) as slots:
            for slot in slots:
                version = self.holders[slot]
                if version.state is State.HOST and self._may_leave(version, now_ns, desperate):
                    yield version

    def _may_leave(self, version: Version, now_ns: int, desperate: bool) -> bool:
        return version.state is not State.LOADING and not version.waiters

    def _try_evict(self, version: Version) -> bool:
        self.drop(version)
        self._totals.evictions_host += 1
        return True

    def drop(self, version: Version) -> None:
        """HOST -> DISK, or DEVICE with a host copy -> DEVICE alone; nothing if it has none."""
        if not version.host:
            return
        self.release(version)
        self._doubles.pop(version.slot, None)
        if version.state is State.HOST:
            version.state = State.DISK

    def distrust(self, part: Part) -> None:
        """The part could not be read or copied: nobody has it here any more."""
        place = self.holdings.places.get(part)
        for version in list(place.holders) if place is not None else ():
            self.drop(version)


def _is_evictable(version: Version, now_ns: int) -> bool:
    if version.state is not State.DEVICE or version.pinned or version.is_leaving:
        return False
    # Its publish may be an answer of this very event: nobody has heard of it yet.
    return version.published_ns < now_ns
