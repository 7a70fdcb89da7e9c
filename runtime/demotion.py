"""Copies from DEVICE to HOST, of who will leave DEVICE next and would be read from disk again.

HOST loses copies of what DEVICE holds too before anything else, so what leaves DEVICE is often nowhere.
When it leaves, somebody waits for its bytes: too late to copy them.  So they are copied before, while
nobody waits for a load, in the order in which the policy lets versions leave.

    on DEVICE alone --[step: it is among the next to leave, HOST has or makes room]--> being copied
    being copied --[end, well]--> on DEVICE, and the part on HOST
    being copied --[end, failed; cancelled: its bytes are in the way of a wish]--> on DEVICE alone, or gone

Invariants
 1. A copy begins only while nobody waits for a load and no other load in the background is in flight; it
    is a prefetch to the mover, so a foreground load waits for what is in flight of it and no more.
 2. Parts that are packed on disk are left out: DEVICE has their raw bytes.
 3. Only what leaves DEVICE later, or is worth less in HOST, loses its place there for it.
 4. Nothing is copied unless reading it from disk was measured to take DEMOTE_GAIN times as long as copying
    it, DEVICE is nearly full, and as much as DEMOTE_SHARE of it is not ready to leave.
 5. Copies take a part of the time: after each there is a pause of DEMOTE_PAUSES times as long.

Pure; owned by the pump.  The loads are `transfers`' business.
"""

from __future__ import annotations

import contextlib

from overcommit.runtime.admission import Forecast
from overcommit.runtime.device_limits import (
    DEMOTE_FREE_SHARE,
    DEMOTE_GAIN,
    DEMOTE_LOOKS,
    DEMOTE_PAUSES,
    DEMOTE_REST_NS,
    DEMOTE_SHARE,
)
from overcommit.runtime.device_room import DeviceRoom
from overcommit.runtime.host_room import HostRoom
from overcommit.runtime.parts import Part
from overcommit.runtime.residents import StartLoad, State, Version
from overcommit.runtime.transfers import Transfers


class Demotion:
    """See the module."""

    def __init__(
        self, device: DeviceRoom, host: HostRoom | None, transfers: Transfers, forecast: Forecast
    ) -> None:
        self._device = device
        self._host = host
        self._transfers = transfers
        self._forecast = forecast
        self._not_before_ns = 0
        self._began_ns: int | None = None

    def step(self, now_ns: int) -> list[StartLoad]:
        """Begin a copy, if it is time for one; nobody waits for a load."""
        host = self._host
        if host is None or self._transfers.is_busy:
            return []
        if self._began_ns is not None:
            self._not_before_ns = now_ns + DEMOTE_PAUSES * (now_ns - self._began_ns)
            self._began_ns = None
        if now_ns < self._not_before_ns:
            return []
        for version in self._next_to_leave(host, now_ns):
            part = self._missing(host, version)
            if part is not None and self._try_place(host, version, part, now_ns):
                self._began_ns = now_ns
                return [self._transfers.save(version, part)]
        self._not_before_ns = now_ns + DEMOTE_REST_NS
        return []

    def _next_to_leave(self, host: HostRoom, now_ns: int) -> list[Version]:
        """Return who is to be copied, the first to leave first."""
        allocator = self._device.allocator
        if allocator.free_bytes > allocator.capacity_bytes * DEMOTE_FREE_SHARE:
            return []
        found: list[Version] = []
        left = allocator.capacity_bytes * DEMOTE_SHARE
        with contextlib.closing(self._device.in_order()) as order:
            for _, version in zip(range(DEMOTE_LOOKS), order, strict=False):
                left -= version.nbytes
                if left < 0:
                    break
                if version.state is State.DEVICE and not version.pinned and not version.is_leaving:
                    found.append(version)
        return found

    def _missing(self, host: HostRoom, version: Version) -> Part | None:
        """Return the first of its parts that is worth a copy."""
        for part in version.distinct_parts:
            place = host.holdings.places.get(part)
            is_there = place is not None and place.is_filled
            if not is_there and not part.job and not part.packed_bytes and self._pays(part):
                return part
        return None

    def _pays(self, part: Part) -> bool:
        paces = [self._forecast.channels[source].pace for source in ("disk", "host")]
        if not all(pace.is_known for pace in paces):
            return False
        from_disk_ns, copy_ns = (pace.of(part.nbytes) for pace in paces)
        return from_disk_ns >= DEMOTE_GAIN * copy_ns

    def _try_place(self, host: HostRoom, version: Version, part: Part, now_ns: int) -> bool:
        host.hear(version)

        def judge(victim: Version) -> bool:
            if victim.state is State.DEVICE:
                return self._device.leaves_before(version, victim)
            return host.leaves_before(victim, version)

        return host.try_place_ahead(version, (part,), now_ns, judge)
