"""Batches that a GPU works on while the worker goes on: one of a lane, each on a stream, several at once.

    batch --try_start--> IN THE AIR --[its event has fired: take_landed]--> answered
             |   \\--[the engine raised]--> answered, at once
             \\--[no lease]--> back to its lane

Invariants
 1. The lease is held from `try_start` until the work is done, whatever comes of it.
 2. The status page names all requests in the air, under the slot of the batch that was begun first: if
    the process dies, they are the suspects, and who is retried runs alone.  So they are not more than it
    can name.
 3. A batch that runs by itself begins only when nothing is in the air: the page is its own then.
 4. Each job gets exactly one completion, after the device has written its block.
 5. What a flight holds on to (a version's mapping and model, a link's memory) stays: who wants to let go
    of it waits with `wait_for`.

Called by a worker's loop, where DEVICE is a GPU.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overcommit.runtime import _shm
from overcommit.runtime.bound import Version
from overcommit.runtime.device_limits import FLIGHT_NAP_NS, FLIGHT_SPIN_NS, FLIGHTS_MAX
from overcommit.runtime.lanes import Batch
from overcommit.runtime.launch import Work

if TYPE_CHECKING:
    from overcommit.runtime.runner import Runner


@dataclass(slots=True, eq=False)
class Flight:
    """One batch; `work` is None once it is answered."""

    version: Version
    batch: Batch
    started_ns: int
    begun_ns: int = 0  # when the device had all of its work
    work: Work | None = None
    cost_ns: int = 0
    ended_ns: int = 0


class Flights:
    """The batches of one worker that are in the air."""

    def __init__(self, runner: Runner, status: _shm.StatusPage) -> None:
        self._runner = runner
        self._status = status
        self._flights: deque[Flight] = deque()
        self._landed: list[Flight] = []
        self._landed_ns = 0  # the last time: the device was another's before

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def is_full(self) -> bool:
        """Whether no further batch may be begun."""
        return len(self._flights) >= FLIGHTS_MAX

    def has(self, slot: int) -> bool:
        """Whether a batch of this version is in the air."""
        return any(flight.batch.slot == slot for flight in self._flights)

    # --- begin ----------------------------------------------------------------------------------
    def try_start(self, version: Version, batch: Batch) -> Flight | None:
        """Begin a batch; None, and nothing done, when its weights are not resident.

        One that failed is answered already, and has no work.  Raises DeviceLost.
        """
        assert version.starter is not None, "only what a device runs is begun"
        while self._flights and self._named() + len(batch.jobs) > _shm.STATUS_BATCH_MAX:
            self._land(self._flights.popleft())
        if not self._runner.try_hold(version):
            return None
        flight = Flight(version, batch, time.monotonic_ns())
        self._flights.append(flight)
        self.tell(_shm.PHASE_COPY_IN)
        try:
            flight.work = version.starter(self._runner.blocks_of(version, batch.jobs))
        except Exception as error:  # the batch boundary
            self._flights.remove(flight)
            self.wait_for(None)  # it is run again by itself
            try:
                self._runner.fail_batch(version, batch.jobs, error)
            finally:
                self._runner.let_go(version, len(batch.jobs))
            self._note(flight)
            return flight
        flight.begun_ns = time.monotonic_ns()
        self.tell(_shm.PHASE_COMPUTE)
        return flight

    def tell(self, phase: int = _shm.PHASE_COMPUTE) -> None:
        """Say on the page what is in the air."""
        if not self._flights:
            self._status.end()
            return
        first = self._flights[0]
        ids = [job.request_id for flight in self._flights for job in flight.batch.jobs]
        self._status.begin(first.batch.slot, phase, first.started_ns, ids)

    def _named(self) -> int:
        return sum(len(flight.batch.jobs) for flight in self._flights)

    # --- end ------------------------------------------------------------------------------------
    def take_landed(self) -> list[Flight]:
        """Answer what is done; return what was answered since the last time.  Raises DeviceLost."""
        done = [flight for flight in self._flights if flight.work and flight.work.is_done()]
        for flight in done:
            self._flights.remove(flight)
            self._land(flight)
        landed, self._landed = self._landed, []
        return landed

    def wait_for(self, slot: int | None) -> None:
        """Wait until nothing of this version, or nothing at all, is in the air; `take_landed` has them."""
        for flight in list(self._flights):
            if slot is None or flight.batch.slot == slot:
                self._flights.remove(flight)
                self._land(flight)

    def nap_ns(self, now_ns: int) -> int:
        """Return how long who has nothing to do may sleep; 0: he should ask again at once."""
        return 0 if now_ns - self._flights[-1].begun_ns < FLIGHT_SPIN_NS else FLIGHT_NAP_NS

    def _land(self, flight: Flight) -> None:
        assert flight.work is not None, "it was begun"
        version, jobs = flight.version, flight.batch.jobs
        try:
            try:
                needs = flight.work.finish()
            except Exception as error:  # the batch boundary
                self.wait_for(None)
                self._runner.fail_batch(version, jobs, error)
            else:
                times_ns = (flight.started_ns, flight.begun_ns)
                self._runner.answer_flight(jobs, needs, times_ns)
        finally:
            self._runner.let_go(version, len(jobs))
        self._note(flight)
        self._landed.append(flight)
        self.tell()

    def _note(self, flight: Flight) -> None:
        flight.work = None
        flight.ended_ns = time.monotonic_ns()
        # What the device did for others at the same time is theirs.
        flight.cost_ns = flight.ended_ns - max(flight.started_ns, self._landed_ns)
        self._landed_ns = flight.ended_ns
