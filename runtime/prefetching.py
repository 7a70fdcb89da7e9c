"""Prefetching in the supervisor: counters in, loads before they are asked for out.

Joins the workers' counters and the wall clock with the predictor (`prefetch`), its books, and the
residency of the site that serves a version.
A step a second: read some counters, look after what is outstanding, begin at most one load.

Invariants
 1. Nobody is told of a request: uses are seen when the counters are read, PREFETCH_LOOKS versions a step.
 2. A prefetch begins only when no request waits for a load, within the budget; a version that is pinned,
    leased, waited for or was used within PREFETCH_IDLE_S is not displaced, nor one that is worth more.
 3. Each outstanding prefetch is settled once: used, lost, expired, cancelled or failed.

    candidate --begin--> loading --published--> waiting --used--> gain
                         |  |  |                   |--evicted, or PREFETCH_EXPIRY_S--> waste
                         |  |  +--a request comes: promoted--> gain, less the wait for the rest
                         |  +--in the way of a request: cancelled
                         +--failed

Called by the supervisor, from its one thread.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from overcommit.runtime.activation import Activations
from overcommit.runtime.config import Settings
from overcommit.runtime.entries import State
from overcommit.runtime.fleet import Fleet
from overcommit.runtime.memories import Memories
from overcommit.runtime.prefetch import Candidate, Prefetcher, PrefetchWish
from overcommit.runtime.prefetch_books import PrefetchBooks
from overcommit.runtime.prefetch_limits import PREFETCH_INTERVAL_S, PREFETCH_LOOKS
from overcommit.runtime.registry import Registry
from overcommit.runtime.residents import (
    Action,
    CancelStarted,
    PromoteStarted,
    Source,
    StartLoad,
    Version,
)
from overcommit.runtime.residents import State as Residence
from overcommit.runtime.views import Tier

if TYPE_CHECKING:
    from overcommit.runtime.site import Site

INTERVAL_NS: Final = int(PREFETCH_INTERVAL_S * 1e9)
# Until loads were measured: seconds, and seconds a byte.
_GUESSED_COSTS: Final[dict[Source, tuple[float, float]]] = {
    "disk": (0.01, 1e-9),
    "host": (0.001, 1e-10),
}


def local_s() -> float:
    """Return the local wall clock, in seconds since the epoch: the hours of a calendar are local."""
    now_s = time.time()
    return now_s + time.localtime(now_s).tm_gmtoff


class Prefetching:
    """See the module."""

    def __init__(
        self,
        settings: Settings,
        sites: Sequence[Site],
        home: Callable[[int], Site],
        registry: Registry,
        fleet: Fleet,
        wall_s: Callable[[], float],
    ) -> None:
        """`home(slot)` is the site that serves a version: one of `sites`."""
        self._home = home
        self._registry = registry
        self._fleet = fleet
        self._wall_s = wall_s
        self.prefetcher = Prefetcher()
        self.books = PrefetchBooks(settings.prefetch_bytes_per_s, settings.prefetch_share)
        self.memories = Memories(Path(settings.cache_dir), self.prefetcher, self._name_of)
        self.uses_seen = 0
        self._seen: dict[int, int] = {}  # uses, by slot
        self._next_ns = 0
        self._to_read: list[int] = []
        self._to_weigh: list[int] = []
        self._wished: list[int] = []  # slots of the last step's wishes, looked at again
        for site in sites:
            on_action = functools.partial(self.on_action, site.activations)
            site.activations.watch(on_action, self.on_ready, self.on_removed)

    # --- events ---------------------------------------------------------------------------------
    def on_ready(self, slot: int, name: str) -> None:
        """A version can be served from now on."""
        self.memories.on_ready(slot, name)

    def on_removed(self, slot: int) -> None:
        """A version is served no more."""
        self._seen.pop(slot, None)
        self.books.forget(slot)
        self.memories.on_removed(slot, self._name_of(slot) or "")

    def on_action(self, activations: Activations, action: Action, now_ns: int) -> None:
        """Residency has decided something: loads that requests wait for settle bets."""
        if isinstance(action, StartLoad):
            if action.urgency == "foreground":
                self._on_demand(action, now_ns)
        elif isinstance(action, PromoteStarted):
            running = activations.load(action.job)
            if running is not None and running.message.slot in self.books.outstanding:
                ahead = self.books.outstanding[running.message.slot]
                elapsed_s = (now_ns - running.asked_ns) / 1e9
                self.books.totals.promoted += 1
                self.books.use(ahead.slot, max(0.0, ahead.saves_s - elapsed_s))
        elif isinstance(action, CancelStarted):
            running = activations.load(action.job)
            if running is None or running.message.source == "device":
                return  # a copy to HOST is nobody's bet
            if self.books.end(running.message.slot) is not None:
                self.books.totals.cancelled += 1

    def _on_demand(self, load: StartLoad, now_ns: int) -> None:
        assert load.source != "device", "nobody waits for a copy to HOST"
        ahead = self.books.outstanding.get(load.slot)
        if ahead is not None and ahead.tier is Tier.HOST and load.source == "host":
            self.books.use(load.slot)
        else:
            self.books.lose(load.slot)  # it was there, and was evicted before this
            self.books.miss(load.slot, self._cost_s(load.slot, load.source, load.nbytes))

    # --- time -----------------------------------------------------------------------------------
    def step(self, now_ns: int) -> None:
        """Learn a little, begin at most one prefetch."""
        if now_ns < self._next_ns:
            return
        self._next_ns = now_ns + INTERVAL_NS
        wall_s = self._wall_s()
        self._read_uses(now_ns, wall_s)
        self._settle(now_ns / 1e9)
        self._begin(now_ns, wall_s)
        self.memories.step(now_ns)

    def close(self) -> None:
        """Learn what is left to learn and keep it."""
        now_ns, wall_s = time.monotonic_ns(), self._wall_s()
        self._to_read = []
        for _ in range(len(self._told()) // PREFETCH_LOOKS + 1):
            self._read_uses(now_ns, wall_s)
        self.memories.close()

    def _read_uses(self, now_ns: int, wall_s: float) -> None:
        self._to_read = self._to_read or self._told()
        slots, self._to_read = self._to_read[-PREFETCH_LOOKS:], self._to_read[:-PREFETCH_LOOKS]
        for slot in slots:
            usage = self._home(slot).gate.usage(slot)
            if usage.uses == self._seen.get(slot, 0):
                continue
            self.uses_seen += max(0, usage.uses - self._seen.get(slot, 0))
            self._seen[slot] = usage.uses
            self.books.use(slot)
            self.prefetcher.use(slot, wall_s - (now_ns - usage.last_used_ns) / 1e9)
            self.memories.on_use(slot)

    def _told(self) -> list[int]:
        """Return the slots that a worker has ever had requests for."""
        told: set[int] = set()
        for worker in self._fleet.of_kind("worker"):
            told |= worker.told
        return sorted(told)

    def _settle(self, now_s: float) -> None:
        for slot, ahead in list(self.books.outstanding.items()):
            view = self._home(slot).residency.view(slot)
            state = Residence.DISK if view is None else view.state
            if ahead.tier is Tier.DEVICE:
                is_there = state in (Residence.LOADING, Residence.DEVICE)
            else:
                is_there = state is not Residence.DISK
            if is_there:
                continue
            if view is not None and view.last_error:
                self.books.totals.failed += 1
                self.books.end(slot)
            else:
                self.books.lose(slot)
        self.books.expire(now_s)

    # --- choosing -------------------------------------------------------------------------------
    def _begin(self, now_ns: int, wall_s: float) -> None:
        self._to_weigh = self._to_weigh or list(self.prefetcher.slots())
        slots, self._to_weigh = self._to_weigh[-PREFETCH_LOOKS:], self._to_weigh[:-PREFETCH_LOOKS]
        candidates = [c for s in {*slots, *self._wished} for c in self._candidates(s)]
        wishes = self.prefetcher.wishes(candidates, wall_s)
        self._wished = [wish.candidate.slot for wish in wishes]
        can_bet = self.books.may_displace
        for wish in wishes:
            if self._try(wish, can_bet, now_ns, wall_s):
                return

    def _candidates(self, slot: int) -> Iterator[Candidate]:
        entry = self._registry.by_slot(slot)
        if entry is None or entry.state is not State.READY or entry.retired or entry.config.pin:
            return
        site = self._home(slot)
        if site.activations.quarantine.blocked(slot, time.monotonic_ns()) is not None:
            return
        view = site.residency.view(slot)
        state = Residence.DISK if view is None else view.state
        nbytes = entry.nbytes
        if state is Residence.HOST:
            yield Candidate(slot, Tier.DEVICE, nbytes, self._cost_s(slot, "host", nbytes))
        elif state is Residence.DISK:
            disk_s = self._cost_s(slot, "disk", nbytes)
            yield Candidate(slot, Tier.DEVICE, nbytes, disk_s)
            if site.residency.host is not None:
                saves_s = max(0.0, disk_s - self._cost_s(slot, "host", nbytes))
                yield Candidate(slot, Tier.HOST, nbytes, saves_s)

    def _try(self, wish: PrefetchWish, can_bet: bool, now_ns: int, wall_s: float) -> bool:
        wanted = wish.candidate
        tier, site = wanted.tier, self._home(wanted.slot)
        allocator = site.residency.device if tier is Tier.DEVICE else site.residency.host
        assert allocator is not None
        capacity = allocator.capacity_bytes
        if not self.books.may_spend(tier, wanted.nbytes, capacity, now_ns / 1e9):
            return False
        accepted: list[Version] = []
        on_paper: dict[int, float] = {}
        missing = wanted.nbytes - allocator.free_bytes

        def judge(version: Version) -> bool:
            nonlocal missing
            if tier is Tier.HOST and version.state is Residence.DEVICE:
                return True  # a second copy costs nothing now
            used_ns = max(site.gate.usage(version.slot).last_used_ns, version.published_ns)
            idle_s = (now_ns - used_ns) / 1e9
            holder = Candidate(version.slot, tier, version.nbytes, self._loses_s(version, tier))
            if not self.prefetcher.may_displace(wish, holder, idle_s, wall_s):
                return False
            if can_bet:
                accepted.append(version)
            elif missing > 0:
                on_paper[version.slot] = holder.saves_s
                missing -= version.nbytes
            return can_bet

        actions = site.residency.prefetch(wanted.slot, tier, now_ns, judge)
        gone = [v.slot for v in accepted if not (v.device if tier is Tier.DEVICE else v.host)]
        if actions is None:
            self.books.displace(gone, now_ns / 1e9)  # and still it did not fit
            if on_paper and missing <= 0:
                self.books.bet_on_paper(wanted.slot, wanted.saves_s, on_paper.items(), now_ns / 1e9)
            return False
        self.books.start(
            *(wanted.slot, tier, wanted.nbytes, wanted.saves_s, now_ns / 1e9), displaced=gone
        )
        site.activations.apply(actions, now_ns)
        return True

    def _loses_s(self, version: Version, tier: Tier) -> float:
        """Return the seconds of load that leaving the tier would cost the next request."""
        slot = version.slot
        host_s = self._cost_s(slot, "host", version.nbytes)
        if tier is Tier.DEVICE and version.host:
            return host_s
        disk_s = self._cost_s(slot, "disk", version.nbytes)
        return disk_s if tier is Tier.DEVICE else max(0.0, disk_s - host_s)

    def _cost_s(self, slot: int, source: Source, nbytes: int) -> float:
        pace = self._home(slot).residency.forecast.channels[source].pace
        if pace.is_known:
            return pace.of(nbytes) / 1e9
        fixed_s, byte_s = _GUESSED_COSTS[source]
        return fixed_s + nbytes * byte_s

    def _name_of(self, slot: int) -> str | None:
        entry = self._registry.by_slot(slot)
        return None if entry is None else entry.name
