"""The pressure on DEVICE: looked at once a second, reported, and damped.

Joins the judge of thrashing and the book of demand with what really happens: reads the counters of the
versions on DEVICE and the activations, tells residency how long a version stays at least, tells the front
ends (health) and the log when thrashing begins and ends.

Invariants
 1. It changes nothing but the order of eviction, and that only with the setting `damping`.
 2. A look costs at most LOOKED_AT_MAX readings of counters, however many versions there are.

Called by the supervisor, from its one thread.
"""

from __future__ import annotations

import itertools
import logging
from typing import Final

from overcommit.runtime.activation import Activations
from overcommit.runtime.config import Settings
from overcommit.runtime.displacement import Demand
from overcommit.runtime.fleet import Child, Fleet
from overcommit.runtime.front_end_messages import Pressure as Message
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
        fleet: Fleet,
    ) -> None:
        self._damps = settings.damping
        self._residency = residency
        self._activations = activations
        self._gate = gate
        self._fleet = fleet
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
        uses = {slot: self._gate.usage(slot).uses for slot in slots}
        self._demand.look(uses, now_ns)
        look = Look(now_ns, self._residency.forecast.busy_ns(now_ns), loads, uses)
        reading = self._thrashing.take(look, self._residency.unique_bytes)
        if self._damps and reading.stay_ns != former.stay_ns:
            self._residency.set_stay(reading.stay_ns)
        if reading.is_thrashing != former.is_thrashing:
            self._announce(reading)

    def greet(self, front: Child) -> None:
        """A front end is new: it must know the state."""
        front.post(self._message())

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
            "remedy": remedy(reading) if reading.is_thrashing else "",
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
        for front in self._fleet.of_kind("front_end"):
            front.post(self._message())

    def _message(self) -> Message:
        reading = self.reading
        return Message(thrashing=remedy(reading) if reading.is_thrashing else "")


def remedy(reading: Reading) -> str:
    """Say what is wrong, by how much, and what helps."""
    return (
        f"the models in use need {mib(reading.working_set_bytes)} and DEVICE has "
        f"{mib(reading.memory_bytes)}; loads take {reading.busy_share:.0%} of the time and a load serves "
        f"{reading.uses_per_load:.1f} requests; raise device_memory_bytes, or serve fewer models here"
    )
