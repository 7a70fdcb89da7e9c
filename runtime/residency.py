"""Which versions are in which tier, and what is done about a wish for one that is not on DEVICE.

Owns the two allocators, the state of every version, the queue of wishes and the loads in flight;
takes what happens, and leaves to `pump` what is tried again whenever something became free.
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
 5. The generation of a slot grows with each publish and each load that fails and never shrinks, not
    even when the slot gets another version.
 6. Wishes are served in turn and in time (`pump`).
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
DEVICE -> DEVICE [HostRoom.drop: it loses its host copy; Transfers.save, by Demotion: it gets one]
HOST -> DISK [HostRoom.drop]
DISK -> (none) [remove]
HOST -> (none) [remove]
DEVICE -> (none) [remove]
DEVICE -> leaving [remove, leased]
LOADING -> leaving [remove]
leaving -> (none) [Pump.run: by tick when the lease is gone, by on_load_done]

Called by the supervisor's activations, from its one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from overcommit.runtime import refusals
from overcommit.runtime.admission import Forecast
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.config import LOAD_BACKOFF_S, NEVER_NS
from overcommit.runtime.device_room import DeviceRoom
from overcommit.runtime.displacement import Demand, Displacement
from overcommit.runtime.errors import OutOfMemory, Overloaded, Unavailable
from overcommit.runtime.holdings import Forms
from overcommit.runtime.host_room import HostRoom
from overcommit.runtime.idle import IdleClock
from overcommit.runtime.mover_messages import CANCELLED
from overcommit.runtime.parts import PartInfo, PartTable
from overcommit.runtime.pins import Pins
from overcommit.runtime.placement import Judge
from overcommit.runtime.policy import Policy
from overcommit.runtime.pump import RETRY_NS, WISH_WAIT_S, Pump
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
    Version,
    Wish,
)
from overcommit.runtime.returns import Returns
from overcommit.runtime.transfers import Transfers
from overcommit.runtime.views import Tier, View, summary_of, view_of
from overcommit.runtime.wish_queue import WishQueue


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
        self._generations: dict[int, int] = {}  # of slots whose version was removed
        self._parts = PartTable(shares=not device.is_contiguous)
        self.forecast = Forecast()
        self._transfers = Transfers(
            *(self._on_device, self._on_host, port, self._totals, self._idle), self.forecast
        )
        self._wishes = WishQueue(self.forecast, self._transfers.lacks)
        self._pins = Pins()
        self._pump = Pump(
            *(self._wishes, self._transfers, self._pins, self._parts),
            *(self._on_device, self._on_host, port, self._totals),
        )
        self._returns = Returns(self._wishes, port, self._versions.get, self.want)

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
        packed_bytes: int = 0,
    ) -> None:
        """A version can be asked for; for a known slot: its terms are these from now on.

        `parts` are those of its image that it may share, the rest of `nbytes` is its own, packed in
        `packed_bytes` if it is packed.
        """
        version = self._versions.get(slot)
        if version is None:
            whole = self._parts.parts_of(nbytes, parts, packed_bytes)
            version = Version(slot, name, nbytes, terms, self._generations.pop(slot, 0), whole)
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
            actions.append(self._pump.refuse(version, Unavailable.code, message, None, now_ns))
        self._pins.discard(slot)
        for room in self._rooms:
            room.on_leaving(version)
        self._generations[slot] = version.generation + (version.state is State.LOADING)
        version.is_leaving = True
        former = self._pump.leaving.setdefault(slot, version)
        if former is not version:
            assert version.state is State.DISK, "loaded before the former had left"
            self._parts.forget(version.parts)
        return actions + self._pump.run(now_ns)

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
            return [self._pump.refuse_for_failure(version, now_ns)]
        if (reason := self._pump.why_never(version)) is not None:
            return [self._pump.refuse(version, OutOfMemory.code, reason, None, now_ns)]
        if (back_s := self._wishes.back_s(version, latest_ns, now_ns)) is not None:
            message = refusals.too_much_before(version.name, len(self._wishes), back_s)
            return [self._pump.refuse(version, Overloaded.code, message, back_s, now_ns)]
        self._wishes.add(Wish(version, now_ns))
        return self._pump.run(now_ns)

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
        return self._returns.expect(version, earliest_ns, now_ns)

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
                actions.append(self._pump.refuse_for_failure(version, now_ns))
        return actions + self._pump.run(now_ns)

    def prefetch(self, slot: int, tier: Tier, now_ns: int, judge: Judge) -> list[Action] | None:
        """Bring a version to a tier unasked, if whom `judge` lets go makes room; None: not now."""
        version = self._known(slot, now_ns)
        if version is None or self._wishes or slot in self._pump.leaving:
            return None
        if now_ns < version.retry_ns:
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
        self._pump.settle_hunger()

    def tick(self, now_ns: int) -> list[Action]:
        """Try again what waited for room, a lease or a back-off; let go what was idle for long."""
        self._idle.expire(now_ns)
        due = self._pins.take_due(now_ns)
        actions = [action for slot in due for action in self.want(slot, NOBODY, now_ns)]
        return actions + self._returns.tick(now_ns) + self._pump.run(now_ns)

    def clear_from(self, offset: int, now_ns: int) -> list[Action]:
        """Evict who holds bytes of DEVICE from this offset on, unless it runs now: ask again.

        One that is pinned comes back elsewhere.
        """
        return self._pinned_again(self._on_device.clear_from(offset, now_ns), now_ns)

    def _pinned_again(self, gone: Iterable[Version], now_ns: int) -> list[Action]:
        """Of those that left DEVICE who is pinned comes back."""
        pinned = [version.slot for version in gone if version.pinned]
        return [action for slot in pinned for action in self.want(slot, NOBODY, now_ns)]

    def lose_device(self, now_ns: int) -> list[Action]:
        """All bytes on DEVICE are gone, and no worker is left that held a lease: load again."""
        actions: list[Action] = []
        for place in self._on_device.holdings.places.values():
            place.is_filled = False
        held = [v for v in self._on_device.holders.values() if not v.is_leaving]
        lost = [version for version in held if version.state is State.DEVICE]
        for version in lost:
            gone = self._on_device.try_let_go(version)
            assert gone, "no worker is left"
        for version in list(self._transfers.loading.values()):
            if not version.is_leaving:
                actions += self._transfers.start_again(version, now_ns)
        actions += self._pinned_again(lost, now_ns)
        return actions + self._pump.run(now_ns)

    def release(self, slot: int, now_ns: int) -> bool:
        """Give back what a version holds that is served elsewhere; False: not now, it is in use."""
        version = self._versions.get(slot)
        if version is None or version.state is State.DISK or version.pinned:
            return True
        if version.state is State.LOADING or version.waiters:
            return False
        if version.state is State.DEVICE and not self._on_device.try_expire(version, now_ns):
            return False
        if self._on_host is not None and not any(part.job for part in version.host):
            self._on_host.drop(version)
        return True

    def set_stay(self, stay_ns: int) -> None:
        """From now on who was published so lately leaves after all others; 0: as the policy says."""
        self._on_device.stay_ns = stay_ns

    def weigh_displacement(self, demand: Demand) -> None:
        """From now on a giant may have to wait before it pushes out what is asked for more."""
        parts = (self.device, self._wishes, self.forecast, demand)
        self._on_device.objects = Displacement(*parts).objects

    # --- asking ---------------------------------------------------------------------------------
    def next_tick_ns(self) -> int | None:
        """Return when `tick` is due, None if only an event can change something."""
        times = self._pins.times()
        times += [at for at in (self._idle.next_ns(), self._returns.next_ns()) if at is not None]
        if self._pump.is_hungry:
            times.append(self._pump.tried_ns + RETRY_NS)
        elif self._wishes:
            oldest = next(self._wishes.by_arrival())
            times.append(oldest.asked_ns + int(WISH_WAIT_S * 1e9))
            held = [w.not_before_ns for w in self._wishes.by_arrival() if w.not_before_ns]
            times += [at_ns for at_ns in held if at_ns > self._pump.tried_ns]
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

    def host_forms(self) -> Forms:
        """Return in which forms HOST holds weights."""
        return Forms() if self._on_host is None else self._on_host.holdings.forms()

    def totals(self) -> Totals:
        """Return a copy of the running totals."""
        return replace(self._totals)
