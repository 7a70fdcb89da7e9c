"""Making room in a tier, and in DEVICE.

A `Room` is a tier's holdings and the versions that hold parts there.  Asked to place a version's
parts, it takes free bytes, or chooses victims and takes theirs.  DEVICE and HOST differ in who may be
a victim and in what evicting means; `host_room` has the other half.  Each room has a policy of its
own, and tells it what happens there.

Invariants
 1. A version that is placed holds all its parts on DEVICE, and on HOST some of them; parts that are
    there already cost nothing, and no victim takes one of them along.
 2. On DEVICE a version that is pinned, leased or on its way out is never a victim.  One that was
    published less than its `min_resident_ns` ago is one only for a desperate wish; one that was
    published less than the room's `stay_ns` ago, or that requests were told to come back for, only
    if all others together are not enough;
    so is one that requests wait for, and that only STARVING_S after it was published.
    The last word is the port's `try_evict`: it asks the leases.
 3. Nothing is evicted for a wish that the victims at hand cannot satisfy, unless it is desperate;
    then what it frees stays free until it fits (residency lets nobody else take it).
 4. Of the versions that the policy offers, the set that leaves is minimal: none could have stayed.
    What counts is what the set frees: a part that others hold too is freed with the last of them.
    Small models that share a slab leave together where a part of a chunk helps nobody.
 5. For the policy a version on DEVICE has the size of what it alone holds there.
 6. For a prefetch only those leave that its judge lets go, of the first PREFETCH_VICTIMS_MAX that the
    policy offers.

Called by residency.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Final

from overcommit.runtime._shm import ABSENT
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.config import (
    PREFETCH_VICTIMS_MAX,
    SLAB_MODEL_BYTES_MAX,
    SMALL_CHUNK_BYTES,
)
from overcommit.runtime.holdings import Choice, Holdings
from overcommit.runtime.policy import Policy, make_order
from overcommit.runtime.residents import Parts, Port, State, Totals, Usage, Version

STARVING_S: Final = 1.0  # a wish that waited so long may take what others wait for
STARVING_NS: Final = int(STARVING_S * 1e9)

Judge = Callable[[Version], bool]  # whether this one may leave for a prefetch


# Whether the first has to wait before it may push out the others.
Objection = Callable[[Version, list[Version], int], bool]


class Room:
    """One tier; subclasses say who may leave it and how."""

    def __init__(self, allocator: ChunkAllocator, policy: Policy, totals: Totals) -> None:
        self.allocator = allocator
        self.holdings = Holdings(allocator)
        self.holders: dict[int, Version] = {}
        self._policy = policy
        self._order = make_order(policy)
        self._totals = totals
        self._slabs: collections.defaultdict[int, set[int]] = collections.defaultdict(set)
        self._judge: Judge | None = None  # while a prefetch is placed
        self._looks = 0  # of the judge

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

    def _try_evict(self, version: Version, now_ns: int) -> bool:
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

    def try_place_ahead(self, version: Version, parts: Parts, now_ns: int, judge: Judge) -> bool:
        """Hold these parts before somebody asks for them; see invariant 6."""
        self._judge, self._looks = judge, 0
        try:
            return self.try_place(version, parts, now_ns)
        finally:
            self._judge = None

    def _is_spared(self, version: Version) -> bool:
        if self._judge is None:
            return False
        self._looks += 1
        return self._looks > PREFETCH_VICTIMS_MAX or not self._judge(version)

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

    def on_terms(self, version: Version) -> None:
        """It may come from now on; or it is here, and its rank may have shrunk."""
        self._policy.on_add(version.slot, version.nbytes, version.terms.priority)
        if self.holders.get(version.slot) is version:
            self._order.add(version.slot)

    def on_leaving(self, version: Version) -> None:
        """It is ranked no more, though it still holds bytes."""
        self._order.discard(version.slot)
        self._policy.on_remove(version.slot)

    def _hear_of_uses(self, version: Version, told: int, usage: Usage) -> bool:
        """Tell the policy what ran since it was `told`; True if the version comes again later."""
        if usage.uses == told:
            return False
        former = self._policy.rank(version.slot)
        self._policy.on_use(version.slot, usage.uses, usage.last_used_ns)
        return self._policy.rank(version.slot) != former

    # --- making room ----------------------------------------------------------------------------
    def _may_displace(self, version: Version, victims: list[Version], now_ns: int) -> bool:
        """Whether it is worth it."""
        return True

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
            if chosen and not self._may_displace(version, chosen, now_ns):
                return False
            kept, spared = self._without_superfluous(chosen, choice, needed)
            mates: list[Version] = []
            if any(part.nbytes > SLAB_MODEL_BYTES_MAX for part in holdings.missing(parts)):
                kept, mates = self._whole_slabs(kept, now_ns, desperate)
            turns = itertools.chain(
                self._in_turn(kept, ()),
                ((mate, False) for mate in mates),
                self._in_turn([], itertools.chain(spared, offers)),
            )
            for victim, is_checked in turns:
                if victim.slot not in self.holders:
                    continue  # it left as another's mate
                if not (is_checked or self._may_leave(victim, now_ns, desperate)):
                    continue
                if self._try_evict(victim, now_ns) and holdings.try_hold(version, parts):
                    return True
        return False

    def _without_superfluous(
        self, chosen: list[Version], choice: Choice, needed: int
    ) -> tuple[list[Version], list[Version]]:
        """Split the choice into those that must go and those that may stay, the precious first.

        The policy's order alone would evict three small models and then the big one that made them
        pointless.  Not the set of least summed value, though that can be found: it evicts small ones
        that are wanted in place of a large one that is not, which stays in the way.  In replays load
        times were up to 5 % longer with it.
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

    def _whole_slabs(
        self, kept: list[Version], now_ns: int, desperate: bool
    ) -> tuple[list[Version], list[Version]]:
        """Split a choice that is to free chunks: who lives in none of these slabs; all who do.

        Pages that are free between those who stay are no chunk.  So of the slabs in which victims
        live, those go first, and as a whole, of which the victims have the most bytes.  A slab of
        which somebody may not leave is no help; its victims stay in the choice.
        """
        weights: collections.Counter[int] = collections.Counter()
        for victim in kept:
            if (slab := self.holdings.slab_of(self.held(victim))) is not None:
                weights[slab] += victim.nbytes
        leaving: list[Version] = []
        for slab, _ in weights.most_common():
            mates = [self.holders[slot] for slot in sorted(self._slabs[slab])]
            if all(self._may_leave(mate, now_ns, desperate) for mate in mates):
                leaving += mates
        slots = {mate.slot for mate in leaving}
        return [victim for victim in kept if victim.slot not in slots], leaving

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
        # Of every version, whatever its own minimum is: raise it where evictions come too fast.
        self.stay_ns = 0
        self.objects: Objection | None = None

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
        young: list[Version] = []
        queued_for: list[Version] = []
        with contextlib.closing(self._order.victims()) as slots:
            for slot in slots:
                version = self.holders[slot]
                if not _is_evictable(version, now_ns):
                    continue
                usage = self._port.usage(slot)
                if slot not in refreshed:
                    refreshed.add(slot)
                    told, version.uses = version.uses, usage.uses
                    if self._hear_of_uses(version, told, usage):
                        continue
                if usage.leases:
                    continue
                if usage.waiting:
                    queued_for.append(version)
                elif self._is_fresh(version, now_ns):
                    fresh.append(version)
                elif now_ns < max(version.published_ns + self.stay_ns, version.promised_ns):
                    young.append(version)
                elif not self._is_spared(version):
                    yield version
                elif self._looks > PREFETCH_VICTIMS_MAX:
                    return
        # Not held at any price: while room is waited for, nothing is loaded, and that costs more.
        yield from (version for version in young if not self._is_spared(version))
        if desperate:
            yield from fresh
            # What was published a moment ago has not had its turn: two models that want the same
            # bytes would evict each other before either runs.
            yield from (v for v in queued_for if now_ns - v.published_ns >= STARVING_NS)

    def _may_displace(self, version: Version, victims: list[Version], now_ns: int) -> bool:
        return self.objects is None or not self.objects(version, victims, now_ns)

    def _may_leave(self, version: Version, now_ns: int, desperate: bool) -> bool:
        if not _is_evictable(version, now_ns):
            return False
        if self._is_fresh(version, now_ns) and not desperate:
            return False
        usage = self._port.usage(version.slot)
        return not usage.leases and not usage.waiting and not self._is_spared(version)

    def _is_fresh(self, version: Version, now_ns: int) -> bool:
        return now_ns - version.published_ns < version.terms.min_resident_ns

    def on_published(self, version: Version, now_ns: int) -> None:
        """The version is there; it was asked for, so it is recent, though no request has run yet."""
        if version.source is not None:
            self._policy.on_load(version.slot, version.load_ns, version.source)
        self._policy.on_use(version.slot, version.uses, now_ns)

    def on_copy(self, version: Version, is_there: bool) -> None:
        """HOST has, or has no more, all that the version needs to come back."""
        if not version.is_leaving:
            self._policy.on_copy(version.slot, is_there)

    def try_expire(self, version: Version, now_ns: int) -> bool:
        """Evict a version that nobody has used for long, though nobody needs its bytes."""
        return self._may_leave(version, now_ns, desperate=False) and self.try_let_go(version)

    def _try_evict(self, version: Version, now_ns: int) -> bool:
        """DEVICE -> HOST or DISK: free of cost, weights are immutable and the host copy stays."""
        if not self.try_let_go(version):
            return False
        version.evictions += 1
        self._totals.evictions_device += 1
        self._policy.on_evict(version.slot, now_ns)
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


def _is_evictable(version: Version, now_ns: int) -> bool:
    if version.state is not State.DEVICE or version.pinned or version.is_leaving:
        return False
    # Its publish may be an answer of this very event: nobody has heard of it yet.
    return version.published_ns < now_ns
