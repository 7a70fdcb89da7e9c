"""Making room in a tier.

A `Room` is a tier's holdings and the versions that hold parts there.  Asked to place a version's
parts, it takes free bytes, or chooses victims and takes theirs.  DEVICE and HOST differ in who may be
a victim and in what evicting means; `device_room` and `host_room` have that.  Each room has a policy
of its own, and tells it what happens there.

Invariants
 1. A version that is placed holds all its parts on DEVICE, and on HOST some of them; parts that are
    there already cost nothing, and no victim takes one of them along.
 2. Nothing is evicted for a wish that the victims at hand cannot satisfy, unless it is desperate;
    then what it frees stays free until it fits (residency lets nobody else take it).
 3. Of the versions that the policy offers, the set that leaves is minimal: none could have stayed.
    What counts is what the set frees: a part that others hold too is freed with the last of them.
    Small models that share a slab leave together where a part of a chunk helps nobody.
 4. For a prefetch only those leave that its judge lets go, of the first PREFETCH_VICTIMS_MAX that the
    policy offers.

Called by the rooms' callers: residency, its transfers, its idle clock.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Final

from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.config import SLAB_MODEL_BYTES_MAX
from overcommit.runtime.holdings import Choice, Holdings
from overcommit.runtime.policy import Policy, make_order
from overcommit.runtime.prefetch_limits import PREFETCH_VICTIMS_MAX
from overcommit.runtime.residents import Parts, Totals, Usage, Version

STARVING_S: Final = 1.0  # a wish that waited so long may take what others wait for
STARVING_NS: Final = int(STARVING_S * 1e9)

Judge = Callable[[Version], bool]  # whether this one may leave for a prefetch


class Room:
    """One tier; subclasses say who may leave it and how."""

    def __init__(
        self, allocator: ChunkAllocator, policy: Policy, totals: Totals, *, is_raw: bool = True
    ) -> None:
        self.allocator = allocator
        self.holdings = Holdings(allocator, is_raw=is_raw)
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
        if there:
            self.holdings.try_hold(version, there)  # no victim takes them along
        if not self.holdings.try_hold(version, parts) and not self._try_make_room(
            version, parts, now_ns, desperate
        ):
            self.holdings.let_go(version, [part for part in there if part not in before])
            return False
        held = tuple(dict.fromkeys((*before, *parts))) if before else parts
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

    def in_order(self) -> Generator[Version, None, None]:
        """Yield who is here, the first to leave first, as far as is known; close it before anything else."""
        with contextlib.closing(self._order.victims()) as slots:
            for slot in slots:
                yield self.holders[slot]

    def leaves_before(self, version: Version, other: Version) -> bool:
        """Whether the policy would let it go before the other one."""
        return self._policy.rank(version.slot) < self._policy.rank(other.slot)

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
        self._policy.on_add(version.slot, self._weight(version), version.terms.priority)
        if self.holders.get(version.slot) is version:
            self._order.add(version.slot)

    def _weight(self, version: Version) -> int:
        """Bytes that it would take here if it shared nothing."""
        return version.nbytes

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
            if any(holdings.size(p) > SLAB_MODEL_BYTES_MAX for p in holdings.missing(parts)):
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
        if len(chosen) < 2:
            return chosen, []
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
        if not self._slabs:
            return kept, []
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
        if not self._slabs:
            return []
        slabs = (self.holdings.slab_of(self.held(victim)) for victim in victims)
        return list(dict.fromkeys(slab for slab in slabs if slab is not None))

    def _mates(self, slabs: list[int]) -> Iterator[tuple[Version, bool]]:
        # The emptiest slab first: it takes the fewest evictions to free its chunk.
        for slab in sorted(slabs, key=lambda s: len(self._slabs.get(s, ()))):
            for slot in sorted(self._slabs.get(slab, ())):
                if slot in self.holders:
                    yield self.holders[slot], False
