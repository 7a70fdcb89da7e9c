"""Several devices in one server: who serves what, decided once a second and told to the front ends.

Joins the pure `spread` with what the sites' looks show, what registers and what dies.

Invariants
 1. A front end hears of a version's homes before it hears of the version, and of every change in order.
 2. Homes are advice: a request that comes to another site is answered there.
 3. What a site serves no more it gives back as soon as nothing uses it.
 4. A site is lost when its processes cannot start (LOST_STARTS) or the driver says so (LOST_XIDS); it is
    back when a mover and a worker of it serve.

    SERVES --[step: why_lost]--> LOST, its versions are others' --[step: complete again]--> SERVES

Where a server has one device there is no `Spreading`.  Called by the house, from the supervisor's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Final

from overcommit.runtime.children import Child
from overcommit.runtime.device_limits import HOMES_A_MESSAGE, SPREAD_INTERVAL_S
from overcommit.runtime.entries import Entry
from overcommit.runtime.fleet import Fleet
from overcommit.runtime.front_end_messages import Homes
from overcommit.runtime.registry import Registry
from overcommit.runtime.site import Site
from overcommit.runtime.spread import SiteLook, Spread

log = logging.getLogger("overcommit.spread")

INTERVAL_NS: Final = int(SPREAD_INTERVAL_S * 1e9)


class Spreading:
    """See the module."""

    def __init__(self, spread: Spread, sites: Sequence[Site], fleet: Fleet, registry: Registry):
        self.spread = spread
        self._sites = sites
        self._fleet = fleet
        self._registry = registry
        self._told: set[tuple[int, int]] = set()  # front ends that know all homes
        self._unsaid: dict[int, tuple[int, ...]] = {}
        self._leaving: set[tuple[int, int]] = set()  # (site, slot): what it serves no more
        self._next_ns = 0
        self.moves = self.replicated = 0

    # --- events ---------------------------------------------------------------------------------
    def add(self, entry: Entry) -> None:
        """A version can be served."""
        is_fixed = entry.config.sequence is not None
        if self.spread.add(entry.slot, entry.nbytes, _share_of(entry), is_fixed):
            self._unsaid[entry.slot] = self.spread.sites_of(entry.slot)

    def remove(self, slot: int) -> None:
        """It is served no more."""
        self.spread.remove(slot)
        self._unsaid.pop(slot, None)
        self._leaving = {pair for pair in self._leaving if pair[1] != slot}

    def home(self, slot: int) -> Site:
        """Return the site that serves a version first."""
        return self._sites[next(iter(self.spread.sites_of(slot)), 0)]

    # --- front ends -----------------------------------------------------------------------------
    def greet(self, front: Child) -> None:
        """A front end is about to get its table."""
        self._told.add(front.incarnation)
        self._post([front], self.spread.all())

    def tell(self) -> None:
        """Tell every front end what has changed."""
        if not self._unsaid:
            return
        fronts = [
            front
            for front in self._fleet.of_kind("front_end", ready=False)
            if front.incarnation in self._told
        ]
        self._post(fronts, self._unsaid)
        self._unsaid = {}

    @staticmethod
    def _post(fronts: Sequence[Child], homes: Mapping[int, tuple[int, ...]]) -> None:
        pairs = list(homes.items())
        for at in range(0, len(pairs), HOMES_A_MESSAGE):
            message = Homes(homes=dict(pairs[at : at + HOMES_A_MESSAGE]))
            for front in fronts:
                front.post(message)

    # --- time -----------------------------------------------------------------------------------
    def step(self, now_ns: int) -> None:
        """Look at the sites, if it is time; tell what has changed."""
        self._look_for_losses(now_ns)
        if now_ns >= self._next_ns:
            self._next_ns = now_ns + INTERVAL_NS
            before = self.spread.all() if log.isEnabledFor(logging.DEBUG) else {}
            changed = self.spread.look(*self._see(), self._batch_of)
            for slot, sites in changed.items():
                log.debug("slot %d: sites %s -> %s", slot, before.get(slot), sites)
                self.replicated += len(sites) > 1
                self.moves += len(sites) == 1
            self._settle(changed, now_ns)
            self._leaving = {pair for pair in self._leaving if not self._release(*pair, now_ns)}
        self.tell()

    def _look_for_losses(self, now_ns: int) -> None:
        for site in self._sites:
            why = site.why_lost()
            if why and not site.is_lost:
                site.is_lost = True
                changed = self.spread.lose(site.number)
                log.error(
                    "device %s is lost: %s; %d versions are served by others",
                    *(site.name, why, len(changed)),
                )
                self._settle(changed, now_ns)
            elif site.is_lost and not why and site.is_complete:
                site.is_lost = False
                log.warning("device %s is back", site.name)
                self._settle(self.spread.regain(site.number), now_ns)

    def _see(self) -> tuple[list[SiteLook], dict[int, int]]:
        looks = []
        queues: dict[int, int] = {}
        for site in self._sites:
            reading, waiting = site.pressure.reading, site.pressure.waiting
            for slot, count in waiting.items():
                queues[slot] = queues.get(slot, 0) + count
            looks.append(
                SiteLook(
                    capacity_bytes=site.residency.device.capacity_bytes,
                    working_set_bytes=reading.working_set_bytes,
                    is_short=reading.is_thrashing,
                    waiting=sum(waiting.values()),
                    workers=site.workers,
                    loaded=site.pressure.loaded,
                )
            )
        return looks, queues

    def _batch_of(self, slot: int) -> int:
        entry = self._registry.by_slot(slot)
        return 1 if entry is None else entry.config.batching.max_batch_size

    def _settle(self, changed: Mapping[int, tuple[int, ...]], now_ns: int) -> None:
        """Have the front ends know, pins moved, and what is served elsewhere given back."""
        self._unsaid |= changed
        for slot, sites in changed.items():
            entry = self._registry.by_slot(slot)
            for site in self._sites:
                if entry is not None and entry.config.pin:
                    site.activations.add(entry, now_ns)
                if site.number in sites:
                    self._leaving.discard((site.number, slot))
                else:
                    self._leaving.add((site.number, slot))

    def _release(self, site: int, slot: int, now_ns: int) -> bool:
        return self._sites[site].residency.release(slot, now_ns)


def _share_of(entry: Entry) -> str:
    """Name the largest part that the version may share with others; "": none."""
    largest = max(entry.parts, key=lambda part: part.nbytes, default=None)
    return "" if largest is None else largest.digest
