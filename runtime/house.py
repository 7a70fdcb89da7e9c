"""The parts of the supervisor, put together.

Owns nothing but the order in which they are built and closed; each part's module says what it does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from overcommit.runtime.activation import Activations
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.config import CUDA_SMALL_SHARE, Settings
from overcommit.runtime.device_choice import allow_descriptors, choose
from overcommit.runtime.drivers import open_nvml
from overcommit.runtime.fleet import Child, Fleet
from overcommit.runtime.gate import SharedGate
from overcommit.runtime.gpu_pressure import GpuPressure
from overcommit.runtime.gpu_watch import GpuWatch
from overcommit.runtime.ledger import Ledger
from overcommit.runtime.memory import SharedMemory
from overcommit.runtime.policy import Policy, make_policy
from overcommit.runtime.prefetching import Prefetching, local_s
from overcommit.runtime.pressure import Pressure
from overcommit.runtime.process import Process
from overcommit.runtime.registry import Registry
from overcommit.runtime.residency import Residency
from overcommit.runtime.telemetry import Telemetry, budgets, show_bytes

log = logging.getLogger("overcommit")


class House:
    """Memory, seats, registry and residency of one server."""

    def __init__(
        self,
        settings: Settings,
        on_forked: Callable[[Process], None],
        on_gone: Callable[[Child], None],
        wall_s: Callable[[], float] = local_s,
    ) -> None:
        self.settings = settings
        self.telemetry = Telemetry()
        self.gpu = choose(settings)
        self.gpu_watch: GpuWatch | None = None
        self.gpu_pressure: GpuPressure | None = None
        budget = budgets(settings, self.telemetry, self.gpu)
        if self.gpu is None:
            device = ChunkAllocator(budget.device_bytes)
        else:
            allow_descriptors(len(ChunkTable(budget.device_bytes)))
            device = ChunkAllocator(
                budget.device_bytes, can_split=False, small_share=CUDA_SMALL_SHARE
            )
            log.info("DEVICE is %s of GPU %d", show_bytes(device.capacity_bytes), self.gpu.device)
        host = ChunkAllocator(budget.host_bytes) if budget.host_bytes else None
        self.registry = Registry(settings.cache_dir)
        self.ledger = Ledger(settings.metrics_models)

        def new_policy() -> Policy:
            return make_policy(settings.policy, settings.policy_half_life_s)

        self.memory = SharedMemory(
            *(device.capacity_bytes, host.capacity_bytes if host else 0),
            None if self.gpu is None else self.gpu.device,
        )
        self.fleet = Fleet(settings, self.memory, on_forked, on_gone, self._on_shrunk)
        self.gate = SharedGate(self.memory.table, self.fleet.lease_pages)
        self.residency = Residency(device, host, new_policy, self.gate, self._introduce)
        self.activations = Activations(settings, self.residency, self.registry, self.fleet)
        self.pressure = Pressure(settings, self.residency, self.activations, self.gate, self.fleet)
        self.prefetching: Prefetching | None = None
        if settings.prefetch:
            self.prefetching = Prefetching(
                *(settings, self.residency, self.registry, self.fleet, self.gate),
                *(self.activations, wall_s),
            )

        if self.gpu is not None:
            self.gpu_watch = GpuWatch(self.gpu, lambda: open_nvml(settings))
            self.gpu_pressure = GpuPressure(
                *(ChunkTable(self.memory.device_bytes), self.residency),
                *(self.activations, self.fleet),
            )

    def gpu_pids(self) -> dict[int, str]:
        """Our processes that may hold memory of the GPU."""
        return {
            child.process.pid: child.seat.kind
            for kind in ("mover", "worker")
            for child in self.fleet.of_kind(kind, ready=False)
            if child.process.pid is not None
        }

    def _on_shrunk(self, count: int) -> None:
        device = self.residency.device
        device.retire(ChunkTable(self.memory.device_bytes).offset(count))
        log.warning(
            "the GPU's memory is short: DEVICE has %d chunks, %s, from now on",
            *(count, show_bytes(device.capacity_bytes)),
        )

    def _introduce(self, slot: int, now_ns: int) -> None:
        self.activations.introduce(slot, now_ns)

    def on_worker_gone(self, worker: Child, now_ns: int) -> None:
        """Settle what a dead worker held, before its page is released."""
        if worker.leases is not None:
            self.gate.keep_uses(worker.leases, worker.told)
        self.activations.on_worker_gone(worker, now_ns)

    def close(self) -> None:
        """Kill every child, then let the memory go."""
        try:
            if self.prefetching is not None:
                self.prefetching.close()
        finally:
            if self.gpu_watch is not None:
                self.gpu_watch.close()
            self.fleet.close()
            self.memory.close()
