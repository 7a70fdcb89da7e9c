"""The parts of the supervisor, put together.

Owns the order in which they are built and closed, and what is said of all sites together; each part's
module says what it does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from overcommit.runtime.boundary import Boundary
from overcommit.runtime.children import Child
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.config import WORKERS_MAX, Settings
from overcommit.runtime.device_choice import allow_descriptors, choose, with_packing
from overcommit.runtime.entries import Entry
from overcommit.runtime.errors import ConfigurationError
from overcommit.runtime.fleet import Fleet
from overcommit.runtime.front_end_messages import Pressure
from overcommit.runtime.ledger import Ledger
from overcommit.runtime.occupied import Occupation, occupations
from overcommit.runtime.prefetching import Prefetching, local_s
from overcommit.runtime.process import Process
from overcommit.runtime.quarantine import Quarantine
from overcommit.runtime.registry import Registry
from overcommit.runtime.residents import Totals, Usage
from overcommit.runtime.site import Site, SiteMemory
from overcommit.runtime.spread import Spread
from overcommit.runtime.spreading import Spreading
from overcommit.runtime.telemetry import Telemetry, budgets
from overcommit.runtime.views import View, joined

log = logging.getLogger("overcommit")


class House:
    """Sites, seats and registry of one server."""

    def __init__(
        self,
        settings: Settings,
        on_forked: Callable[[Process], None],
        on_gone: Callable[[Child], None],
        wall_s: Callable[[], float] = local_s,
        on_unborn: Callable[[Process, str], None] = lambda process, why: None,
    ) -> None:
        self.boundary = Boundary()
        self.telemetry = Telemetry()
        gpus = choose(settings)
        self.settings = settings = with_packing(settings, gpus)
        if settings.workers * len(gpus) > WORKERS_MAX:
            raise ConfigurationError(
                f"--workers {settings.workers} for each of {len(gpus)} devices are more than "
                f"{WORKERS_MAX}; lower it"
            )
        plans = [budgets(settings, self.telemetry, gpu, len(gpus)) for gpu in gpus]
        chunks = [
            len(ChunkTable(plan.device_bytes))
            for gpu, plan in zip(gpus, plans, strict=True)
            if gpu is not None and gpu.shares == "vmm"
        ]
        if chunks:
            allow_descriptors(sum(chunks))
        memories = [
            SiteMemory.make(number, gpu, plan)
            for number, (gpu, plan) in enumerate(zip(gpus, plans, strict=True))
        ]
        self.registry = Registry(settings.cache_dir, packs=settings.host_packing == "on")
        self.ledger = Ledger(settings.metrics_models)
        self.quarantine = Quarantine()
        self.fleet = Fleet(
            *(settings, [memory.shared for memory in memories], on_forked, on_gone),
            lambda site, count: self.sites[site].on_shrunk(count),
            lambda site: self.sites[site].on_arena_gone(time.monotonic_ns()),
            on_unborn,
            self.boundary,
            self.title_of,
        )
        self.sites = [
            Site(
                *(memory, settings, self.fleet, self.registry, self.quarantine),
                *(self._pins_at(memory.number), self._tell_pressure),
            )
            for memory in memories
        ]
        self.spreading: Spreading | None = None
        if len(self.sites) > 1:
            spread = Spread([memory.device.capacity_bytes for memory in memories])
            self.spreading = Spreading(spread, self.sites, self.fleet, self.registry)
        self.prefetching: Prefetching | None = None
        if settings.prefetch:
            self.prefetching = Prefetching(
                settings, self.sites, self.home, self.registry, self.fleet, wall_s
            )

    # --- sites ----------------------------------------------------------------------------------
    def home(self, slot: int) -> Site:
        """Return the site that serves a version, the first one if there are several."""
        return self.sites[0] if self.spreading is None else self.spreading.home(slot)

    def site_of(self, child: Child) -> Site:
        """Return the site of a mover or a worker."""
        return self.sites[child.seat.site]

    def _pins_at(self, number: int) -> Callable[[int], bool]:
        """Say of a site which versions are pinned there: those that it serves."""

        def pins(slot: int) -> bool:
            spreading = self.spreading
            return spreading is None or number in spreading.spread.sites_of(slot)

        return pins

    def next_tick_ns(self) -> int | None:
        """Return when a site has something to do, None if only an event can change something."""
        times = [site.next_tick_ns() for site in self.sites]
        return min((at for at in times if at is not None), default=None)

    def tick(self, now_ns: int) -> None:
        """Do what is due."""
        for site in self.sites:
            self.boundary.run("the tick of a site", site.tick, now_ns)
        if self.spreading is not None:
            self.boundary.run("the spreading of models", self.spreading.step, now_ns)

    def on_bell(self, now_ns: int) -> None:
        """A worker dropped a lease while somebody waits for room."""
        for site in self.sites:
            self.boundary.run("the tick of a site", site.activations.tick, now_ns)

    @property
    def is_hungry(self) -> bool:
        """Whether somebody waits for a lease to be dropped."""
        return any(site.memory.table.hungry() for site in self.sites)

    # --- versions -------------------------------------------------------------------------------
    def title_of(self, slot: int) -> str:
        """Name the version in a slot for people."""
        entry = self.registry.by_slot(slot)
        return (
            "a version that is gone" if entry is None else f"{entry.name} version {entry.version}"
        )

    def add(self, entry: Entry, now_ns: int) -> None:
        """A version can be served from now on."""
        if self.spreading is not None and not entry.config.steps:
            self.spreading.add(entry)
        for site in self.sites:
            site.activations.add(entry, now_ns)

    def retire(self, slot: int, now_ns: int) -> None:
        """A version answers what it was asked, and no more."""
        for site in self.sites:
            site.activations.retire(slot, now_ns)

    def remove(self, slot: int, now_ns: int) -> None:
        """A version is served no more."""
        for site in self.sites:
            site.activations.remove(slot, now_ns)
            site.gate.forget(slot)
        if self.spreading is not None:
            self.spreading.remove(slot)

    def forget(self, slot: int) -> None:
        """The slot is free for another version."""
        self.ledger.forget(slot)
        self.quarantine.forget(slot)

    def usage(self, slot: int) -> Usage:
        """Sum the workers' counters for one version."""
        if self.spreading is None:
            return self.sites[0].gate.usage(slot)
        all_of = [site.gate.usage(slot) for site in self.sites]
        return Usage(
            waiting=sum(usage.waiting for usage in all_of),
            uses=sum(usage.uses for usage in all_of),
            last_used_ns=max(usage.last_used_ns for usage in all_of),
            leases=sum(usage.leases for usage in all_of),
        )

    def view(self, slot: int) -> View | None:
        """Return where a version is; None if nobody has asked for it."""
        home = self.home(slot)
        order = [home, *(site for site in self.sites if site is not home)]
        views = (site.residency.view(slot) for site in order)
        return joined([view for view in views if view is not None])

    def totals(self) -> Totals:
        """Sum what residency has counted."""
        total = Totals()
        for site in self.sites:
            one = site.residency.totals()
            for name in Totals.__slots__:
                setattr(total, name, getattr(total, name) + getattr(one, name))
        return total

    # --- workers --------------------------------------------------------------------------------
    def occupied(self) -> list[Occupation]:
        """Which workers others take the place of at the moment."""
        return occupations(self.fleet.of_kind("worker"), self.ledger.usual_ns)

    def names_of(self, slot: int | None) -> tuple[str, str]:
        """Return the name and version of what is in a slot; two empty ones: nothing is."""
        entry = None if slot is None else self.registry.by_slot(slot)
        return ("", "") if entry is None else (entry.name, entry.version)

    # --- front ends -----------------------------------------------------------------------------
    def greet(self, front: Child) -> None:
        """A front end is new: it must know the state of the memory."""
        front.post(self._pressure())

    def _tell_pressure(self) -> None:
        for front in self.fleet.of_kind("front_end"):
            front.post(self._pressure())

    def _pressure(self) -> Pressure:
        complaints = [(site.name, site.pressure.complaint) for site in self.sites]
        if len(complaints) == 1:
            return Pressure(thrashing=complaints[0][1])
        said = [f"device {name}: {text}" for name, text in complaints if text]
        return Pressure(thrashing="; ".join(said))

    # --- ending ---------------------------------------------------------------------------------
    def on_worker_gone(self, worker: Child, now_ns: int) -> None:
        """Settle what a dead worker held, before its page is released."""
        site = self.site_of(worker)
        if worker.leases is not None:
            site.gate.keep_uses(worker.leases, worker.told)
        site.activations.on_worker_gone(worker, now_ns)

    def close(self) -> None:
        """Kill every child, then let the memory go."""
        try:
            if self.prefetching is not None:
                self.prefetching.close()
        finally:
            for site in self.sites:
                site.close()
            self.fleet.close()
            for site in self.sites:
                site.memory.close()
