"""Making room in HOST: only the mover touches it, so nobody has to be asked.

Invariants
 1. A copy that a load reads or writes is never a victim, nor one that a queued wish will read; so is
    one that a prefetch is filling.
 2. Victims are first those that DEVICE also holds, the youngest first: losing that copy costs nothing
    now, and what stays on DEVICE longest needs it last; last of them those that were copied here
    because they leave DEVICE next.  Of the others the policy decides, which here
    hears of loads from disk alone: that is what losing the last copy costs.
 3. What is packed on disk is packed here: budget, victims and policy count what it takes.

Called by residency and its transfers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.device_room import DeviceRoom
from overcommit.runtime.parts import Part
from overcommit.runtime.placement import Room
from overcommit.runtime.policy import Policy
from overcommit.runtime.residents import Parts, Port, State, Totals, Version


class HostRoom(Room):
    """HOST: only the mover touches it, so nobody has to be asked."""

    def __init__(
        self,
        allocator: ChunkAllocator,
        policy: Policy,
        totals: Totals,
        port: Port,
        device: DeviceRoom,
    ) -> None:
        super().__init__(allocator, policy, totals, is_raw=False)
        self._port = port
        self._device = device
        self._doubles: dict[int, Version] = {}  # copies of what DEVICE holds, as published ...
        self._saved: dict[int, Version] = {}  # ... and as copied here from there

    def on_published(self, version: Version, now_ns: int) -> None:
        """DEVICE holds what the copy here holds."""
        self._forget_double(version)
        self._doubles[version.slot] = version
        self._device.on_copy(version, len(version.host) == len(version.distinct_parts))
        if version.source == "disk":
            self._policy.on_load(version.slot, version.load_ns, version.source)
        self._policy.on_use(version.slot, version.uses_host, now_ns)

    def on_filled(self, version: Version, load_ns: int, now_ns: int) -> None:
        """A prefetch has brought a part here; it counts as recent, though nobody has asked yet."""
        if all(self.holdings.places[part].is_filled for part in version.host):
            self._device.on_copy(version, len(version.host) == len(version.distinct_parts))
            self._policy.on_load(version.slot, load_ns, "disk")
            self._policy.on_use(version.slot, version.uses_host, now_ns)

    def _forget_double(self, version: Version) -> None:
        self._doubles.pop(version.slot, None)
        self._saved.pop(version.slot, None)

    def hear(self, version: Version) -> None:
        """Tell the policy what ran of a version that may come here from DEVICE."""
        usage = self._port.usage(version.slot)
        version.uses_host = usage.uses
        self._policy.on_use(version.slot, usage.uses, usage.last_used_ns)

    def on_saving(self, version: Version) -> None:
        """What DEVICE holds is being copied here."""
        if version.slot not in self._doubles:
            self._saved[version.slot] = version

    def on_saved(self, part: Part) -> None:
        """A part has come from DEVICE, where its versions may be no more."""
        places = self.holdings.places
        for version in places[part].holders:
            parts = version.distinct_parts
            is_whole = len(version.host) == len(parts)
            if is_whole and all(places[each].is_filled for each in parts):
                self._device.on_copy(version, is_there=True)

    def give_back(self, part: Part) -> None:
        """The part did not come; what else its versions have here stays."""
        place = self.holdings.places.get(part)
        for version in list(place.holders) if place is not None else ():
            left = tuple(each for each in version.host if each is not part)
            if not left:
                self.drop(version)
                continue
            if (slab := self.holdings.slab_of((part,))) is not None:
                self._slabs[slab].discard(version.slot)
            self.holdings.let_go(version, (part,))
            version.host = left

    def held(self, version: Version) -> Parts:
        """Return the version's parts on HOST, which may be some of them."""
        return version.host

    def _weight(self, version: Version) -> int:
        return max(1, sum(part.stored_bytes for part in version.distinct_parts))

    def _set_held(self, version: Version, parts: Parts) -> None:
        version.host = parts

    def _offers(self, now_ns: int, desperate: bool) -> Generator[Version, None, None]:
        for doubles in (self._doubles, self._saved):
            looked_at: list[Version] = []
            try:
                while doubles:
                    _, version = doubles.popitem()
                    if version.state is State.DEVICE:  # else the copy became the only one
                        looked_at.append(version)
                        if not self._is_spared(version):
                            yield version
            finally:
                doubles |= {v.slot: v for v in reversed(looked_at) if v.slot in self.holders}
        refreshed: set[int] = set()
        with contextlib.closing(self._order.victims()) as slots:
            for slot in slots:
                version = self.holders[slot]
                if version.state is not State.HOST:
                    continue
                if slot not in refreshed:
                    refreshed.add(slot)
                    usage = self._port.usage(slot)
                    told, version.uses_host = version.uses_host, usage.uses
                    if self._hear_of_uses(version, told, usage):
                        continue
                if self._may_leave(version, now_ns, desperate):
                    yield version

    def _may_leave(self, version: Version, now_ns: int, desperate: bool) -> bool:
        if version.state is State.LOADING or version.waiters:
            return False
        return not any(part.job for part in version.host) and not self._is_spared(version)

    def _try_evict(self, version: Version, now_ns: int) -> bool:
        if version.state is State.HOST:
            self._policy.on_evict(version.slot, now_ns)
        self.drop(version)
        self._totals.evictions_host += 1
        return True

    def drop(self, version: Version) -> None:
        """HOST -> DISK, or DEVICE with a host copy -> DEVICE alone; nothing if it has none."""
        if not version.host:
            return
        self.release(version)
        self._device.on_copy(version, is_there=False)
        self._forget_double(version)
        if version.state is State.HOST:
            version.state = State.DISK

    def distrust(self, part: Part) -> None:
        """The part could not be read or copied: nobody has it here any more."""
        place = self.holdings.places.get(part)
        for version in list(place.holders) if place is not None else ():
            self.drop(version)
