"""Making room in DEVICE: whoever leaves has to be asked for, through the port.

Invariants
 1. A version that is pinned, leased or on its way out is never a victim.  One that was
    published less than its `min_resident_ns` ago is one only for a desperate wish; one that was
    published less than the room's `stay_ns` ago only if all others together are not enough.  One
    that requests were told to come back for, and who shares its slab, is one only for a desperate
    wish while that lasts; but no more than PROMISED_SHARE of DEVICE is kept so, for those who come
    back first: what is beyond that leaves after all others.  One that requests wait for is one only
    for a desperate wish, and that only STARVING_S after it was published.  The last word is the
    port's `try_evict`: it asks the leases.
 2. For the policy a version on DEVICE has the size of what it alone holds there.

Called by residency, its transfers and its idle clock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Final

from overcommit.runtime._shm import ABSENT
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.config import SLAB_MODEL_BYTES_MAX, SMALL_CHUNK_BYTES
from overcommit.runtime.placement import STARVING_NS, Room
from overcommit.runtime.policy import Policy
from overcommit.runtime.prefetch_limits import PREFETCH_VICTIMS_MAX
from overcommit.runtime.residents import Parts, Port, State, Totals, Version

PROMISED_SHARE: Final = 0.75  # of DEVICE that is kept at most for those who were told to come back

# Whether the first has to wait before it may push out the others.
Objection = Callable[[Version, list[Version], int], bool]


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
            if not part.digest:
                continue  # its version's alone
            place = self.holdings.places.get(part)
            if place is not None and len(place.holders) == count:
                for holder in place.holders:
                    self._weigh(holder)

    def _weigh(self, version: Version) -> None:
        if not version.is_leaving:
            unique = max(1, self.holdings.unique_bytes(version.device))
            self._policy.on_add(version.slot, unique, version.terms.priority)

    def bytes_out_of_reach(self, version: Version, pinned: list[Version]) -> int:
        """Bytes that this version can never get, because these others keep theirs."""
        if not pinned:
            return 0
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
        promised: list[tuple[int, Version]] = []
        slabs: dict[int, int] = {}
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
                elif now_ns < (until_ns := self._promised_ns(version, slabs)):
                    promised.append((until_ns, version))
                elif now_ns < version.published_ns + self.stay_ns:
                    young.append(version)
                elif not self._is_spared(version):
                    yield version
                elif self._looks > PREFETCH_VICTIMS_MAX:
                    return
        # Not held at any price: while room is waited for, nothing is loaded, and that costs more.
        yield from (version for version in young if not self._is_spared(version))
        kept, loose = self._divide(promised)
        yield from (version for version in loose if not self._is_spared(version))
        if desperate:
            yield from kept
            yield from fresh
            # What was published a moment ago has not had its turn: two models that want the same
            # bytes would evict each other before either runs.
            yield from (v for v in queued_for if now_ns - v.published_ns >= STARVING_NS)

    def _promised_ns(self, version: Version, slabs: dict[int, int]) -> int:
        """Return until when requests may come back for it, or for one that would leave with it.

        `slabs` is what was found for those who live in slabs.
        """
        slab = self.holdings.slab_of(version.device) if self._slabs else None
        if slab is None:
            return version.promised_ns
        if slab not in slabs:
            mates = self._slabs.get(slab, ())
            slabs[slab] = max((self.holders[slot].promised_ns for slot in mates), default=0)
        return slabs[slab]

    def _divide(self, promised: list[tuple[int, Version]]) -> tuple[list[Version], list[Version]]:
        """Split them into those that are kept and those beyond that, the first to leave first."""
        promised.sort(key=lambda each: each[0])
        left = PROMISED_SHARE * self.allocator.capacity_bytes
        kept: list[Version] = []
        loose: list[Version] = []
        for _, version in promised:
            fits = version.nbytes <= left
            (kept if fits else loose).append(version)
            left -= version.nbytes if fits else 0
        return kept, loose[::-1]

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

    def clear_from(self, offset: int, now_ns: int) -> list[Version]:
        """Evict who holds bytes from this offset on; return whom.  Leases are asked, nothing else."""
        places = self.holdings.places
        late = [
            version
            for version in self.holders.values()
            if version.state is State.DEVICE
            and not version.is_leaving
            and version.published_ns < now_ns
            and any(sum(e) > offset for part in version.device for e in places[part].extents)
        ]
        return [version for version in late if self._try_evict(version, now_ns)]

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
