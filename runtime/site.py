"""A site: a device, and what belongs to it alone.

    GPU or host memory -> DEVICE, its share of HOST, the residency table -> residency, activations
    its seats in the fleet: one mover, `workers` workers

Sites know nothing of each other: each can serve any version, by loading it.  Which one is asked is
`spreading`'s business.  HOST is cut into shares because a copy is fast from the memory near its GPU only,
and because a mover that dies takes no other's loads along.

Invariants
 1. Its residency table, lease pages, arenas and loads are touched by its own mover and workers alone.

Made by the house; called by the supervisor's loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from overcommit.runtime.activation import Activations
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.chunk_table import ChunkTable, small_share_of
from overcommit.runtime.config import Settings
from overcommit.runtime.device_limits import LOST_STARTS, LOST_XIDS
from overcommit.runtime.drivers import open_nvml
from overcommit.runtime.fleet import Fleet
from overcommit.runtime.gate import SharedGate
from overcommit.runtime.gpu import Gpu
from overcommit.runtime.gpu_pressure import GpuPressure
from overcommit.runtime.gpu_watch import GpuWatch
from overcommit.runtime.memory import SharedMemory
from overcommit.runtime.policy import make_policy
from overcommit.runtime.pressure import Pressure
from overcommit.runtime.quarantine import Quarantine
from overcommit.runtime.registry import Registry
from overcommit.runtime.residency import Residency
from overcommit.runtime.retiring import RetiringAllocator
from overcommit.runtime.run_allocator import RunAllocator
from overcommit.runtime.seats import SeatState
from overcommit.runtime.telemetry import Budgets, show_bytes

log = logging.getLogger("overcommit")


@dataclass(slots=True, frozen=True)
class SiteMemory:
    """What a site is made of: a GPU or None for host memory, and its tiers."""

    number: int
    gpu: Gpu | None
    device: ChunkAllocator
    host: ChunkAllocator | None
    shared: SharedMemory

    @classmethod
    def make(cls, number: int, gpu: Gpu | None, budget: Budgets) -> SiteMemory:
        """Take the memory that the budget allows."""
        if gpu is None:
            device: ChunkAllocator = ChunkAllocator(budget.device_bytes)
        elif gpu.shares == "ipc":
            device = RunAllocator(budget.device_bytes)
        else:
            device = RetiringAllocator(
                budget.device_bytes, small_share=small_share_of(budget.device_bytes)
            )
        if gpu is not None:
            log.info("DEVICE is %s of GPU %d", show_bytes(device.capacity_bytes), gpu.device)
        host = ChunkAllocator(budget.host_bytes, has_tails=True) if budget.host_bytes else None
        shared = SharedMemory(
            *(device.capacity_bytes, host.capacity_bytes if host else 0),
            *(None if gpu is None else gpu.device, "vmm" if gpu is None else gpu.shares),
        )
        return cls(number, gpu, device, host, shared)

    @property
    def name(self) -> str:
        """What operators call the device."""
        return f"cpu:{self.number}" if self.gpu is None else str(self.gpu.device)


class Site:
    """See the module."""

    def __init__(
        self,
        memory: SiteMemory,
        settings: Settings,
        fleet: Fleet,
        registry: Registry,
        quarantine: Quarantine,
        pins: Callable[[int], bool],
        on_pressure: Callable[[], None],
    ) -> None:
        """`pins(slot)`: whether a pinned version is pinned here; `on_pressure()`: it has changed."""
        self.number = memory.number
        self.name = memory.name
        self.gpu = memory.gpu
        self.memory = memory.shared
        self.is_lost = False
        self._fleet = fleet
        self._memory = memory
        self.gate = SharedGate(self.memory.table, lambda: fleet.lease_pages(self.number))
        self.residency = Residency(
            *(memory.device, memory.host),
            lambda: make_policy(settings.policy, settings.policy_half_life_s),
            *(self.gate, self._introduce),
        )
        self.activations = Activations(
            *(settings, self.residency, registry, fleet, quarantine, self.number, pins),
            # How a worker on a GPU gets at what the mover wrote there was not tried.
            self.memory.table if self.gpu is None else None,
            fleet.boundary,
        )
        self.pressure = Pressure(settings, self.residency, self.activations, self.gate, on_pressure)
        self.gpu_watch: GpuWatch | None = None
        self.gpu_pressure: GpuPressure | None = None
        feed = fleet.feeds[self.number]
        if self.gpu is not None:
            self.gpu_watch = GpuWatch(self.gpu, lambda: open_nvml(settings))
        if feed is not None:
            assert isinstance(memory.device, RetiringAllocator)
            self.gpu_pressure = GpuPressure(
                *(ChunkTable(self.memory.device_bytes), memory.device, self.residency),
                *(self.activations, feed, lambda count: fleet.shrink(self.number, count)),
            )

    def _introduce(self, slot: int, now_ns: int) -> None:
        self.activations.introduce(slot, now_ns)

    def tick(self, now_ns: int) -> None:
        """Do what is due."""
        self.activations.tick(now_ns)
        self.pressure.tick(now_ns)
        if self.gpu_pressure is not None and self.gpu_watch is not None:
            self.gpu_pressure.tick(self.gpu_watch.reading, now_ns)

    def next_tick_ns(self) -> int | None:
        """Return when something is due, None if only an event can change something."""
        times = [self.residency.next_tick_ns()]
        if self.gpu_pressure is not None:
            times.append(self.gpu_pressure.next_ns())
        return min((at for at in times if at is not None), default=None)

    def on_shrunk(self, count: int) -> None:
        """There are only so many chunks of the GPU from now on."""
        device = self._memory.device
        assert isinstance(device, RetiringAllocator)
        device.retire(ChunkTable(self.memory.device_bytes).offset(count))
        log.warning(
            "the GPU's memory is short: DEVICE has %d chunks, %s, from now on",
            *(count, show_bytes(device.capacity_bytes)),
        )

    def on_arena_gone(self, now_ns: int) -> None:
        """DEVICE died with its mover, and nobody is left who had it open: it is empty now."""
        self.activations.apply(self.residency.lose_device(now_ns), now_ns)

    def pids(self) -> dict[int, str]:
        """Our processes that may hold memory of the device."""
        return {
            child.process.pid: child.seat.kind
            for kind in ("mover", "worker")
            for child in self._fleet.of_kind(kind, ready=False, site=self.number)
            if child.process.pid is not None
        }

    @property
    def workers(self) -> int:
        """How many workers serve."""
        return sum(1 for _ in self._fleet.of_kind("worker", site=self.number))

    @property
    def is_complete(self) -> bool:
        """Whether its mover and a worker serve."""
        return bool(self.workers) and any(self._fleet.of_kind("mover", site=self.number))

    def why_lost(self) -> str:
        """Say why the device cannot be used at the moment; "": it can, or that is not known yet."""
        reading = None if self.gpu_watch is None else self.gpu_watch.reading
        xids = LOST_XIDS.intersection(reading.xids if reading is not None else ())
        if xids:
            return f"the driver reported Xid {min(xids)}"
        seats = [seat for seat in self._fleet.seats if seat.site == self.number]
        for kind in ("mover", "worker"):
            mine = [seat for seat in seats if seat.kind == kind]
            if mine and all(
                seat.failed_starts >= LOST_STARTS or seat.state is SeatState.BROKEN for seat in mine
            ):
                return f"its {kind}s die before they serve, see the log above"
        return ""

    def close(self) -> None:
        """Stop watching."""
        if self.gpu_watch is not None:
            self.gpu_watch.close()
