"""The pump: what is tried again whenever something may have become free.

Removed versions let go of their bytes first, then as many wishes as there is room for become loads.
Owns the versions that leave; the queue, the loads and the rooms of the tiers are residency's, which
calls it at the end of each event that may free something or adds a wish.

Invariants
 1. Wishes are tried in the order of `wish_queue`, at each event WISHES_TRIED_MAX that were never held
    up, and as many that were (`displacement`) and may be tried again: so those that are held up take
    nobody's turn, however many they are.  A later one may overtake one that does not fit yet, but not
    one that has waited for STARVING_S: from then on all that becomes free is for it.
 2. A wish that leaves the queue here becomes loads, or all who wait get one Refuse or Withdraw.
 3. What waits for a lease or for room is hungry, and the port knows: then who gives a lease back
    rings, and residency is asked again after RETRY_NS if nobody does.

Pure.  Owned by residency, whose docstring has the states of a version.
"""

from __future__ import annotations

import itertools
from typing import Final

from overcommit.runtime import refusals
from overcommit.runtime._shm import ABSENT
from overcommit.runtime.config import REQUEST_TIMEOUT_MS
from overcommit.runtime.demotion import Demotion
from overcommit.runtime.device_room import DeviceRoom
from overcommit.runtime.errors import OutOfMemory, Overloaded, Unavailable
from overcommit.runtime.host_room import HostRoom
from overcommit.runtime.parts import PartTable
from overcommit.runtime.pins import Pins
from overcommit.runtime.placement import STARVING_NS
from overcommit.runtime.residents import (
    NOBODY,
    Action,
    Port,
    Refuse,
    StartLoad,
    State,
    Totals,
    Version,
    Wish,
    Withdraw,
)
from overcommit.runtime.transfers import Transfers
from overcommit.runtime.wish_queue import WishQueue

RETRY_NS: Final = 5_000_000  # for room, if no bell comes first
WISH_WAIT_S: Final = REQUEST_TIMEOUT_MS / 1000  # nobody's request waits longer
WISHES_TRIED_MAX: Final = 8  # at each event, and as many again of those that were held up


class Pump:
    """See the module."""

    def __init__(
        self,
        wishes: WishQueue,
        transfers: Transfers,
        pins: Pins,
        parts: PartTable,
        on_device: DeviceRoom,
        on_host: HostRoom | None,
        port: Port,
        totals: Totals,
    ) -> None:
        self._wishes = wishes
        self._transfers = transfers
        self._pins = pins
        self._parts = parts
        self._on_device = on_device
        self._on_host = on_host
        self._port = port
        self._totals = totals
        self._demotion = Demotion(on_device, on_host, transfers, transfers.forecast)
        self.leaving: dict[int, Version] = {}
        self.tried_ns = 0
        self.is_hungry = False

    def run(self, now_ns: int) -> list[Action]:
        """Let go what leaves, then start as many wishes as there is room for."""
        self.tried_ns = now_ns
        if self.leaving:
            for version in list(self.leaving.values()):
                self._try_leave(version)
        if not self._wishes:
            self.settle_hunger()
            return [*self._demotion.step(now_ns)]
        actions = self._refuse_overdue(now_ns)
        smallest_failed: int | None = None
        for wish in self._next_to_try(now_ns):
            if self._transfers.is_full:
                break
            version = wish.version
            is_starving = now_ns - max(wish.asked_ns, wish.not_before_ns) > STARVING_NS
            if self._is_idle(wish, now_ns):
                actions.append(self._withdraw(version))
                continue
            lacks = self._on_device.holdings.missing(version.distinct_parts)
            size = self._on_device.holdings.footprint(lacks)
            if smallest_failed is not None and size >= smallest_failed and not is_starving:
                continue
            started = self._transfers.try_begin(version, now_ns, desperate=is_starving)
            if started is not None:
                loaded = sum(step.nbytes for step in started if isinstance(step, StartLoad))
                self._wishes.start(version.slot, loaded)
                actions += started
            elif (reason := self.why_never(version)) is not None:
                self._wishes.drop(version.slot)  # another was pinned since it was queued
                actions.append(self.refuse(version, OutOfMemory.code, reason, None, now_ns))
            elif now_ns < wish.not_before_ns:
                continue  # it was held up just now, and holds up nobody
            elif is_starving:
                break
            else:
                actions += self._transfers.cancel_ahead()
                smallest_failed = size if smallest_failed is None else min(size, smallest_failed)
        self.settle_hunger()
        return actions

    def _next_to_try(self, now_ns: int) -> list[Wish]:
        chosen: list[Wish] = []
        if self._transfers.is_full:
            return chosen
        fresh = again = 0
        for wish in self._wishes.in_turn(now_ns):
            # A slot whose former version still leaves is nobody's fault: it holds up no one else.
            if now_ns < wish.not_before_ns or wish.version.slot in self.leaving:
                continue
            if wish.held_until_ns:
                # Likely it is held up again, which costs a look at its victims; others' turn is not lost.
                if again == WISHES_TRIED_MAX:
                    continue
                again += 1
            else:
                fresh += 1
            chosen.append(wish)
            if fresh == WISHES_TRIED_MAX:
                break
        return chosen

    def _try_leave(self, version: Version) -> None:
        """DISK, HOST, LOADING, DEVICE -> (none), unless a load or a lease is in the way."""
        if version.state is State.LOADING:
            if any(part.job for part in version.parts):
                return
            self._transfers.give_up(version)
        if self._on_host is not None:
            self._on_host.drop(version)
        if version.state is State.DEVICE and not self._on_device.try_let_go(version):
            return
        del self.leaving[version.slot]
        self._parts.forget(version.parts)
        self._port.set_state(version.slot, ABSENT, version.generation)

    def _is_idle(self, wish: Wish, now_ns: int) -> bool:
        """Whether everybody who waited has gone: a load would be for nobody."""
        version = wish.version
        if wish.asked_ns == now_ns or wish.is_promised or NOBODY in version.waiters:
            return False
        return not self._port.usage(version.slot).waiting

    def _withdraw(self, version: Version) -> Withdraw:
        self._wishes.drop(version.slot)
        self._totals.withdrawals += 1
        return Withdraw(version.slot, version.take_waiters())

    def settle_hunger(self) -> None:
        """Say whether something waits for what a lease that is given back, or a load that ends, frees."""
        if not self._wishes and not self._transfers.loading:
            self._wishes.rest()
        can_start = not self._transfers.is_full
        leased = bool(self.leaving) and any(
            version.state is State.DEVICE for version in self.leaving.values()
        )
        is_hungry = leased or (can_start and self._waits())
        if is_hungry != self.is_hungry:
            self.is_hungry = is_hungry
            self._port.set_hungry(is_hungry)

    def _waits(self) -> bool:
        tried_ns = self.tried_ns
        return any(wish.not_before_ns <= tried_ns for wish in self._wishes.by_arrival())

    # --- answers --------------------------------------------------------------------------------
    def refuse(
        self, version: Version, code: str, message: str, retry_after_s: float | None, now_ns: int
    ) -> Refuse:
        """Answer everybody who waits for this version; a pinned one is tried again by itself."""
        self._totals.refusals += 1
        self._pins.on_refused(version, retry_after_s, now_ns)
        return Refuse(version.slot, code, message, retry_after_s, version.take_waiters())

    def refuse_for_failure(self, version: Version, now_ns: int) -> Refuse:
        """Answer with why its latest load failed, and when the next one may begin."""
        left_s = (version.retry_ns - now_ns) / 1e9
        message = refusals.load_failed(version.name, version.last_error, left_s)
        return self.refuse(version, Unavailable.code, message, left_s, now_ns)

    def _refuse_overdue(self, now_ns: int) -> list[Action]:
        refused: list[Action] = []
        for wish in list(itertools.islice(self._wishes.by_arrival(), WISHES_TRIED_MAX)):
            if now_ns - wish.asked_ns < WISH_WAIT_S * 1e9:
                break
            self._wishes.drop(wish.version.slot)
            capacity = self._on_device.allocator.capacity_bytes
            message = refusals.no_room(wish.version.name, capacity, WISH_WAIT_S)
            refused.append(self.refuse(wish.version, Overloaded.code, message, 1.0, now_ns))
        return refused

    def why_never(self, version: Version) -> str | None:
        """Say why no eviction could ever make room for this version; None if one could."""
        others = self._pins.others_on_device(version)
        size = self._on_device.bytes_needed(version, others)
        pinned = self._on_device.bytes_out_of_reach(version, others)
        capacity = self._on_device.allocator.capacity_bytes
        if size <= capacity - pinned:
            return None
        return refusals.never_fits(version.name, size, capacity, pinned)
