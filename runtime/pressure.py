"""The pressure on a site's DEVICE: looked at once a second, reported, and damped.

Joins the judge of thrashing and the book of demand with what really happens: reads the counters of the
versions on DEVICE and the activations, tells residency how long a version stays at least, says (health,
the log) when thrashing begins and ends.  Where there are several sites, `spreading` goes by its looks.

Invariants
 1. It changes nothing but the order of eviction, and that only with the setting `damping`.
 2. A look costs at most twice LOOKED_AT_MAX readings of counters, however many versions there are.

Called by the site, from the supervisor's one thread.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Final

from overcommit.runtime.activation import Activations
from overcommit.runtime.config import Settings
from overcommit.runtime.displacement import Demand
from overcommit.runtime.gate import SharedGate
from overcommit.runtime.refusals import mib
from overcommit.runtime.residency import Residency
from overcommit.runtime.thrashing import Load, Look, Reading, Thrashing

log = logging.getLogger("overcommit.pressure")

PERIOD_NS: Final = 1_000_000_000
LOOKED_AT_MAX: Final = 4096


class Pressure:
    """See the module."""

    def __init__(
        self,
        settings: Settings,
        residency: Residency,
        activations: Activations,
        gate: SharedGate,
        on_change: Callable[[], None],
    ) -> None:
        self.waiting: dict[int, int] = {}  # requests, by slot; of those looked at last
        self.loaded: tuple[int, ...] = ()  # slots that came to DEVICE before that
        self._damps = settings.damping
        self._residency = residency
        self._activations = activations
        self._gate = gate
        self._on_change = on_change
        self._thrashing = Thrashing(residency.device.capacity_bytes)
        self._demand = Demand()
        self._next_ns = 0
        self._seen_ns = 0  # activations up to here were counted
        if self._damps:
            residency.weigh_displacement(self._demand)

    @property
    def reading(self) -> Reading:
        """What was found last."""
        return self._thrashing.reading

    def next_ns(self) -> int:
        """When `tick` is due."""
        return self._next_ns

    def tick(self, now_ns: int) -> None:
        """Look, if it is time."""
        if now_ns < self._next_ns:
            return
        self._next_ns = now_ns + PERIOD_NS
        former = self.reading
        loads = self._new_loads(now_ns)
        slots = dict.fromkeys(itertools.islice(self._residency.device_slots(), LOOKED_AT_MAX))
        slots |= dict.fromkeys(load.slot for load in loads)
        usages = {slot: self._gate.usage(slot) for slot in slots}
        uses = {slot: usage.uses for slot, usage in usages.items()}
        self.waiting = {slot: usage.waiting for slot, usage in usages.items() if usage.waiting}
        self.loaded = tuple(load.slot for load in loads)
        absent = [slot for slot in self._demand.known() if slot not in uses][:LOOKED_AT_MAX]
        self._demand.look(uses | {slot: self._gate.usage(slot).uses for slot in absent}, now_ns)
        look = Look(now_ns, self._residency.forecast.busy_ns(now_ns), loads, uses)
        reading = self._thrashing.take(look, self._residency.unique_bytes)
        if self._damps and reading.stay_ns != former.stay_ns:
            self._residency.set_stay(reading.stay_ns)
        if reading.is_thrashing != former.is_thrashing:
            self._announce(reading)

    @property
    def complaint(self) -> str:
        """Say what is wrong and what helps; "": nothing is."""
        return remedy(self.reading) if self.reading.is_thrashing else ""

    def describe(self) -> dict[str, object]:
        """Return what status shows."""
        reading = self.reading
        return {
            "active": reading.is_thrashing,
            "working_set_bytes": reading.working_set_bytes,
            "memory_bytes": reading.memory_bytes,
            "loads_per_s": round(reading.loads_per_s, 1),
            "busy_share": round(reading.busy_share, 3),
            "uses_per_load": round(reading.uses_per_load, 2),
            "stay_ms": round(reading.stay_ns / 1e6, 1) if self._damps else 0.0,
            "remedy": self.complaint,
        }

    def _new_loads(self, now_ns: int) -> tuple[Load, ...]:
        loads = []
        for record in reversed(self._activations.timings.activations):
            if record.done_ns <= self._seen_ns:
                break
            loads.append(Load(record.slot, record.nbytes, record.total_ns))
        self._seen_ns = now_ns
        return tuple(loads)

    def _announce(self, reading: Reading) -> None:
        if reading.is_thrashing:
            log.warning("thrashing: %s", remedy(reading))
        else:
            log.warning("thrashing has ended: the models in use fit again, or are asked less")
        self._on_change()


def remedy(reading: Reading) -> str:
    """Say what is wrong, by how much, and what helps."""
    return (
        f"the models in use need {mib(reading.working_set_bytes)} and DEVICE has "
        f"{mib(reading.memory_bytes)}; loads take {reading.busy_share:.0%} of the time and a load serves "
        f"{reading.uses_per_load:.1f} requests; raise --device-memory, or serve fewer models here"
    )
