"""Which versions are in which tier, and what is done about a wish for one that is not on DEVICE.

Owns the two allocators, the state of every version, the queue of wishes and the loads in flight.
A version consists of parts, which others may share: parts are loaded and placed, versions are asked
for, published and evicted (`parts`, `holdings`, `transfers`).
Pure: events and `now_ns` go in, actions come out; leases, counters and state words are behind
`Port`.  Who must leave a tier is `placement`'s business.

Invariants
 1. A version is LOADING or has one place in the queue, however many wait for it; LOADING, each of
    its parts is on DEVICE or has a load in flight, which another version may have started.
 2. Who waits gets exactly one Publish, Refuse or Withdraw, unless it is forgotten first: a wish
    ends in a load, in a refusal, when nobody waits for it any more, or after WISH_WAIT_S; a load
    ends when the mover says so.
 3. A version holds all its parts on DEVICE exactly while LOADING or DEVICE, some on HOST while HOST
    and maybe then; on DISK it holds nothing.
 4. The state word is written with every transition: RESIDENT only after the bytes are there, and
    bytes are given to another only after the word says otherwise and no lease is held.
 5. The generation of a slot grows by one with each publish and never shrinks, not even when the
    slot gets another version.
 6. Wishes are served in the order of `wish_queue`.  A later one may overtake one that does not fit
    yet, but not one that has waited for STARVING_S: from then on all that becomes free is for it.
 7. A failed load leaves nothing behind but a back-off (LOAD_BACKOFF_S, by failures in a row) for
    each version that waited for the part.  Loads of other parts go on for those who want them.
 8. A prefetch begins only while nobody waits for a load.  Who wants its version promotes it; in the
    way of a wish it is cancelled, which is nobody's failure.
 9. A removed version takes its waiters with it at once, and its bytes as soon as no lease and no
    load needs them; its slot may have a new version meanwhile, which is not loaded before that.

                           want                      want
        (none) -add-> DISK -----------> LOADING <----------- HOST
                      ^  ^               |   |               |  ^
                      |  +---------------+   | on_load_done  |  |
                      |    on_load_done      v               |  |
                      |                    DEVICE            |  |
                      |     evicted        |    |  evicted,  |  |
                      +--------------------+    +------------|--+
                      |                           host copy  |
                      +--------------------------------------+
                                 host copy evicted

DISK      no bytes anywhere; ABSENT
LOADING   parts that were not on DEVICE are being filled, from disk (through HOST if there is room)
          or from HOST; the last one that ends, whoever started it, publishes
DEVICE    RESIDENT for `generation`; may have a host copy too
HOST      ABSENT; a host copy is there, or a prefetch makes one: the next load reads what it lacks
leaving   removed, LOADING or DEVICE as before but out of reach: never a victim, never published

(none) -> DISK [add]
DISK -> LOADING [Transfers.try_begin, by want, tick, and whatever makes room]
HOST -> LOADING [Transfers.try_begin]
DISK -> LOADING [Transfers.try_ahead, by prefetch]
DISK -> HOST [Transfers.try_ahead, by prefetch]
LOADING -> DEVICE [on_load_done, ok; or at once, if others had all its parts there]
LOADING -> DISK [on_load_done, failed or cancelled]
HOST -> DISK [on_load_done, a prefetch to HOST failed or was cancelled]
DEVICE -> DISK [DeviceRoom.try_let_go, no host copy]
DEVICE -> HOST [DeviceRoom.try_let_go, host copy]; both by a victim's turn or by IdleClock.expire
DEVICE -> DEVICE [HostRoom.drop: it loses its host copy]
HOST -> DISK [HostRoom.drop]
DISK -> (none) [remove]
HOST -> (none) [remove]
DEVICE -> (none) [remove]
DEVICE -> leaving [remove, leased]
LOADING -> leaving [remove]
leaving -> (none) [_try_leave: by tick when the lease is gone, by on_load_done]

Called by the supervisor's activations, from its one thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from overcommit.runtime import refusals
from overcommit.runtime._shm import ABSENT
from overcommit.runtime.admission import Forecast
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.config import LOAD_BACKOFF_S, NEVER_NS, REQUEST_TIMEOUT_MS
from overcommit.runtime.device_room import DeviceRoom
from overcommit.runtime.displacement import Demand, Displacement
from overcommit.runtime.errors import OutOfMemory, Overloaded, Unavailable
from overcommit.runtime.host_room import HostRoom
from overcommit.runtime.idle import IdleClock
from overcommit.runtime.mover_messages import CANCELLED
from overcommit.runtime.parts import PartInfo, PartTable
from overcommit.runtime.pins import Pins
from overcommit.runtime.placement import STARVING_NS, Judge
from overcommit.runtime.policy import Policy
from overcommit.runtime.residents import (
    NOBODY,
    Action,
    Foretold,
    Port,
    Publish,
    Refuse,
    StartLoad,
    State,
    Terms,
    Totals,
    Usage,
    Version,
    Wish,
    Withdraw,
)
from overcommit.runtime.transfers import Transfers
from overcommit.runtime.views import Tier, View, summary_of, view_of
from overcommit.runtime.wish_queue import WishQueue

__all__ = ["Action", "Port", "Publish", "Refuse", "Residency", "StartLoad"]
__all__ += ["Terms", "Usage", "View", "Withdraw"]

RETRY_NS: Final = 5_000_000  # for room, if no bell comes first
WISH_WAIT_S: Final = REQUEST_TIMEOUT_MS / 1000  # nobody's request waits longer
WISHES_TRIED_MAX: Final = 8  # of the queue's head, at each event


class Residency:
    """All versions and both tiers of one server."""

    def __init__(
        self,
        device: ChunkAllocator,
        host: ChunkAllocator | None,
        new_policy: Callable[[], Policy],  # one for each tier
        port: Port,
        introduce: Callable[[int, int], None] = lambda slot, now_ns: None,
    ) -> None:
        """`introduce(slot, now_ns)` is called for one that is not known: it may `add` it.

        So a version that nobody asks for costs nothing here.
        """
        self._introduce = introduce
        self.device = device
        self.host = host
        self._port = port
        self._totals = Totals()
        self._on_device = DeviceRoom(device, new_policy(), self._totals, port)
        self._on_host: HostRoom | None = None
        if host is not None:
            self._on_host = HostRoom(host, new_policy(), self._totals, port, self._on_device)
        self._idle = IdleClock(self._on_device, self._totals, port)
        self._rooms = [r for r in (self._on_device, self._on_host) if r is not None]
        self._versions: dict[int, Version] = {}
        self._leaving: dict[int, Version] = {}
        self._generations: dict[int, int] = {}  # of slots whose version was removed
        self._parts = PartTable()
        self.forecast = Forecast()
        self._transfers = Transfers(
            *(self._on_device, self._on_host, port, self._totals, self._idle), self.forecast
        )
        self._wishes = WishQueue(self.forecast, self._transfers.lacks)
        self._pins = Pins()
        self._tried_ns = 0
        self._is_hungry = False

    def __repr__(self) -> str:
        tiers = [(room.allocator, len(room.holders)) for room in self._rooms]
        loading = len(self._transfers.loading)
        return summary_of(len(self._versions), tiers, loading, len(self._wishes))

    # --- events ---------------------------------------------------------------------------------
    def add(
        self,
        slot: int,
        name: str,
        nbytes: int,
        now_ns: int,
        terms: Terms,
        parts: Sequence[PartInfo] = (),
    ) -> None:
        """A version can be asked for; for a known slot: its terms are these from now on.

        `parts` are those of its image that it may share, the rest of `nbytes` is its own.
        """
        version = self._versions.get(slot)
        if version is None:
            generation = self._generations.pop(slot, 0)
            whole = self._parts.parts_of(nbytes, parts)
            version = Version(slot, name, nbytes, terms, generation, whole)
            self._versions[slot] = version
        assert version.nbytes == nbytes, f"slot {slot} already has another image"
        version.name, version.terms = name, terms
        self._idle.watch(version, now_ns)
        for room in self._rooms:
            room.on_terms(version)
        self._pins.settle(version)

    def remove(self, slot: int, now_ns: int) -> list[Action]:
        """A version is served no more; does nothing for one that is not known."""
        if (version := self._versions.pop(slot, None)) is None:
            return []
        actions: list[Action] = []
        self._wishes.forget(slot)
        if version.waiters:
            message = refusals.gone(version.name)
            actions.append(self._refuse(version, Unavailable.code, message, None, now_ns))
        self._pins.discard(slot)
        for room in self._rooms:
            room.on_leaving(version)
        self._generations[slot] = version.generation
        version.is_leaving = True
        former = self._leaving.setdefault(slot, version)
        if former is not version:
            assert version.state is State.DISK, "loaded before the former had left"
            self._parts.forget(version.parts)
        return actions + self._pump(now_ns)

    def want(self, slot: int, waiter: int, now_ns: int, latest_ns: int = NEVER_NS) -> list[Action]:
        """Somebody has requests for this version, the last one until `latest_ns`."""
        version = self._known(slot, now_ns)
        if version is None:
            self._totals.refusals += 1
            waiters = frozenset({waiter} - {NOBODY})
            return [Refuse(slot, Unavailable.code, refusals.gone(), None, waiters)]
        if version.state is State.DEVICE and waiter == NOBODY:
            return []
        version.waiters |= {waiter}
        if version.state is State.DEVICE:
            self._totals.attaches += 1
            return [self._transfers.answer(version)]
        if version.state is State.LOADING:
            return [*self._transfers.promote(version)]
        if slot in self._wishes:
            return []
        if now_ns < version.retry_ns:
            return [self._refuse_for_failure(version, now_ns)]
        if (reason := self._why_never(version)) is not None:
            return [self._refuse(version, OutOfMemory.code, reason, None, now_ns)]
        if (back_s := self._wishes.back_s(version, latest_ns, now_ns)) is not None:
            message = refusals.too_much_before(version.name, len(self._wishes), back_s)
            return [self._refuse(version, Overloaded.code, message, back_s, now_ns)]
        self._wishes.add(Wish(version, now_ns))
        return self._pump(now_ns)

    def _known(self, slot: int, now_ns: int) -> Version | None:
        if slot not in self._versions:
            self._introduce(slot, now_ns)
        return self._versions.get(slot)

    def expect(self, slot: int, earliest_ns: int, now_ns: int) -> tuple[int, int] | None:
        """Return when a version that was wanted is resident at the earliest, and likely, if later.

        Requests will be told to come back then; so it is loaded although nobody waits any more.
        """
        version = self._versions.get(slot)
        if version is None or version.state is State.DEVICE:
            return None
        return self._wishes.expect(version, earliest_ns, now_ns)

    def on_load_done(
        self, job: int, ok: bool, message: str, now_ns: int, load_ns: int
    ) -> list[Action]:
        """The mover ended a load; one that is not known (said twice) is ignored."""
        ahead = set(self._transfers.ahead)
        steps, failed = self._transfers.end(job, ok, now_ns, load_ns)
        actions: list[Action] = [*steps]
        for each in steps:
            if isinstance(each, Publish):
                self._wishes.on_published(each.slot, now_ns)
        for version in failed:
            if message == CANCELLED:
                if version.waiters:  # since its load was cancelled
                    self._wishes.add(Wish(version, now_ns))
                continue
            step = min(version.failures, len(LOAD_BACKOFF_S) - 1)
            version.failures += 1
            version.retry_ns = now_ns + int(LOAD_BACKOFF_S[step] * 1e9)
            version.last_error = message or "the load failed for a reason that is not known"
            if version.slot not in ahead:
                actions.append(self._refuse_for_failure(version, now_ns))
        return actions + self._pump(now_ns)

    def prefetch(self, slot: int, tier: Tier, now_ns: int, judge: Judge) -> list[Action] | None:
        """Bring a version to a tier unasked, if whom `judge` lets go makes room; None: not now."""
        version = self._known(slot, now_ns)
        if version is None or self._wishes or slot in self._leaving or now_ns < version.retry_ns:
            return None
        steps = self._transfers.try_ahead(version, tier, now_ns, judge)
        return None if steps is None else [*steps]

    def forget_waiter(self, waiter: int) -> None:
        """A worker is gone: it gets no answers, and what only it wanted is wanted no more."""
        for version in self._transfers.loading.values():
            version.waiters -= {waiter}
        for wish in list(self._wishes.by_arrival()):
            wish.version.waiters -= {waiter}
            if not wish.version.waiters:
                self._wishes.drop(wish.version.slot)
        self._settle_hunger()

    def tick(self, now_ns: int) -> list[Action]:
        """Try again what waited for room, a lease or a back-off; let go what was idle for long."""
        actions: list[Action] = []
        self._idle.expire(now_ns)
        for slot in self._pins.take_due(now_ns):
            actions += self.want(slot, NOBODY, now_ns)
        return actions + self._pump(now_ns)

    def clear_from(self, offset: int, now_ns: int) -> list[Action]:
        """Evict who holds bytes of DEVICE from this offset on, unless it runs now: ask again.

        One that is pinned comes back elsewhere.
        """
        actions: list[Action] = []
        for version in self._on_device.clear_from(offset, now_ns):
            if version.pinned:
                actions += self.want(version.slot, NOBODY, now_ns)
        return actions

    def set_stay(self, stay_ns: int) -> None:
        """From now on who was published so lately leaves after all others; 0: as the policy says."""
        self._on_device.stay_ns = stay_ns

    # --- asking ---------------------------------------------------------------------------------
    def next_tick_ns(self) -> int | None:
        """Return when `tick` is due, None if only an event can change something."""
        times = self._pins.times()
        if (expiry_ns := self._idle.next_ns()) is not None:
            times.append(expiry_ns)
        if self._is_hungry:
            times.append(self._tried_ns + RETRY_NS)
        elif self._wishes:
            oldest = next(self._wishes.by_arrival())
            times.append(oldest.asked_ns + int(WISH_WAIT_S * 1e9))
            held = [w.not_before_ns for w in self._wishes.by_arrival() if w.not_before_ns]
            times += [at_ns for at_ns in held if at_ns > self._tried_ns]
        return min(times, default=None)

    def loads_in_flight(self) -> list[StartLoad]:
        """Return every load that was started and has not ended, in order."""
        return self._transfers.in_flight()

    def view(self, slot: int) -> View | None:
        """Return where a version is; None if there is none in this slot."""
        version = self._versions.get(slot)
        if version is None:
            return None
        on_host = None if self._on_host is None else self._on_host.holdings
        return view_of(version, self._on_device.holdings, on_host)

    def foretell(self, slot: int) -> Foretold | None:
        """Return where a version will be when its loads have ended well; None if it is not LOADING."""
        version = self._versions.get(slot)
        if version is None or version.state is not State.LOADING:
            return None
        return self._transfers.foretell(version)

    def device_slots(self) -> Iterator[int]:
        """Yield the slots of all versions that hold bytes on DEVICE."""
        return iter(self._on_device.holders)

    def unique_bytes(self, slots: Iterable[int]) -> int:
        """Return what these versions weigh together; what several share counts once."""
        known = (version for slot in slots if (version := self._versions.get(slot)) is not None)
        return sum(part.nbytes for part in {part for each in known for part in each.parts})

    def saved_bytes(self) -> tuple[int, ...]:
        """Return what sharing saves on DEVICE and, if there is one, in HOST."""
        return tuple(room.holdings.saved_bytes() for room in self._rooms)

    def totals(self) -> Totals:
        """Return a copy of the running totals."""
        return replace(self._totals)

    # --- serving wishes -------------------------------------------------------------------------
    def _pump(self, now_ns: int) -> list[Action]:
        """Let go what leaves, then start as many wishes as there is room for."""
        self._tried_ns = now_ns
        for version in list(self._leaving.values()):
            self._try_leave(version)
        actions = self._refuse_overdue(now_ns)
        smallest_failed: int | None = None
        # A slot whose former version still leaves is nobody's fault: it holds up no one else.
        turns = self._wishes.in_turn(now_ns)
        free = (wish for wish in turns if wish.version.slot not in self._leaving)
        for wish in list(itertools.islice(free, WISHES_TRIED_MAX)):
            if self._transfers.is_full:
                break
            version = wish.version
            if now_ns < wish.not_before_ns:
                continue
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
            elif (reason := self._why_never(version)) is not None:
                self._wishes.drop(version.slot)  # another was pinned since it was queued
                actions.append(self._refuse(version, OutOfMemory.code, reason, None, now_ns))
            elif now_ns < wish.not_before_ns:
                continue  # it was held up just now, and holds up nobody
            elif is_starving:
                break
            else:
                actions += self._transfers.cancel_ahead()
                smallest_failed = size if smallest_failed is None else min(size, smallest_failed)
        self._settle_hunger()
        return actions

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
        del self._leaving[version.slot]
        self._parts.forget(version.parts)
        self._port.set_state(version.slot, ABSENT, version.generation)

    def weigh_displacement(self, demand: Demand) -> None:
        """From now on a load may have to wait before it pushes out what is asked for more."""
        self._on_device.objects = Displacement(self._wishes, self.forecast, demand).objects

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

    def _settle_hunger(self) -> None:
        if not self._wishes and not self._transfers.loading:
            self._wishes.rest()
        can_start = not self._transfers.is_full
        leased = any(version.state is State.DEVICE for version in self._leaving.values())
        waits = any(wish.not_before_ns <= self._tried_ns for wish in self._wishes.by_arrival())
        is_hungry = leased or (can_start and waits)
        if is_hungry != self._is_hungry:
            self._is_hungry = is_hungry
            self._port.set_hungry(is_hungry)

    # --- answers --------------------------------------------------------------------------------
    def _refuse(
        self, version: Version, code: str, message: str, retry_after_s: float | None, now_ns: int
    ) -> Refuse:
        """Answer everybody who waits for this version; a pinned one is tried again by itself."""
        self._totals.refusals += 1
        self._pins.on_refused(version, retry_after_s, now_ns)
        return Refuse(version.slot, code, message, retry_after_s, version.take_waiters())

    def _refuse_for_failure(self, version: Version, now_ns: int) -> Refuse:
        left_s = (version.retry_ns - now_ns) / 1e9
        message = refusals.load_failed(version.name, version.last_error, left_s)
        return self._refuse(version, Unavailable.code, message, left_s, now_ns)

    def _refuse_overdue(self, now_ns: int) -> list[Action]:
        refused: list[Action] = []
        for wish in list(itertools.islice(self._wishes.by_arrival(), WISHES_TRIED_MAX)):
            if now_ns - wish.asked_ns < WISH_WAIT_S * 1e9:
                break
            self._wishes.drop(wish.version.slot)
            message = refusals.no_room(wish.version.name, self.device.capacity_bytes, WISH_WAIT_S)
            refused.append(self._refuse(wish.version, Overloaded.code, message, 1.0, now_ns))
        return refused

    def _why_never(self, version: Version) -> str | None:
        """Say why no eviction could ever make room for this version; None if one could."""
        others = self._pins.others_on_device(version)
        size = self._on_device.bytes_needed(version, others)
        pinned = self._on_device.bytes_out_of_reach(version, others)
        if size <= self.device.capacity_bytes - pinned:
            return None
        return refusals.never_fits(version.name, size, self.device.capacity_bytes, pinned)
