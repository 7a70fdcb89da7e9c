"""A worker's wishes: from jobs that wait for a version to a lane that runs.

Joins the lanes with what the supervisor says about residency and with the loader's results.  Jobs
that wait for a version need two things, in any order: the weights placed (asked from the
supervisor) and the program loaded (by the helper thread).  With both, the version is bound, and its
lane runs.

Invariants
 1. For each slot one `Activate` is on its way whenever jobs wait for a version that is not placed;
    a second one only says that a job has come whose deadline is earlier than all before it.
 2. A lane is runnable in the batcher exactly if its version is bound and placed.
 3. Jobs wait only for what can still come: when it fails or is forgotten they are answered.
 4. A job whose deadline is before the time at which its version is expected does not wait: it is
    answered, and the version still comes, for when it is asked again.
 5. What is coming runs when Placed says so, or when the state word is RESIDENT for the generation that
    Coming told: no other load of the version has that one, so the bytes lie where they were to come.  The
    word maps nothing (`bound`): what is not mapped ahead any more waits for its Placed.
 6. The page says how many jobs wait for a version before the supervisor is asked for it.

Called by the worker's loop.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from overcommit.runtime import _shm
from overcommit.runtime.batcher import Batcher
from overcommit.runtime.bound import Version, Versions
from overcommit.runtime.config import ATTACHES_UNSAID_MAX, NEVER_NS, QUIET_NS, VERSIONS_MAX
from overcommit.runtime.control import ControlSocket
from overcommit.runtime.delay_lane import queue_of
from overcommit.runtime.door import Door
from overcommit.runtime.driver import DriverError
from overcommit.runtime.errors import ImageError, Unavailable
from overcommit.runtime.lanes import Job, limits_of
from overcommit.runtime.links import Links
from overcommit.runtime.priority_lane import PriorityLane
from overcommit.runtime.runner import Runner
from overcommit.runtime.sequence_lane import lane_of
from overcommit.runtime.worker_messages import (
    Activate,
    ActivationFailed,
    Attach,
    Attaches,
    BindFailed,
    Coming,
    Expected,
    Placed,
    VersionInfo,
)

LOOK_NS: Final = 2_000  # between two looks at a state word that is about to change

log = logging.getLogger("overcommit.worker")


class Wishes:
    """What is asked for, and what becomes of it."""

    def __init__(
        self,
        control: ControlSocket,
        batcher: Batcher,
        versions: Versions,
        runner: Runner,
        links: Links,
        leases: _shm.LeasePage,
        door: Door,
        table: _shm.ResidencyTable,
        supervisor_bell: int,
    ) -> None:
        self._table = table
        self._supervisor_bell = supervisor_bell
        self._control = control
        self._batcher = batcher
        self._versions = versions
        self._runner = runner
        self._links = links
        self._leases = leases
        self._asked: dict[int, int] = {}  # slot -> when
        self._asked_ns = 0  # when anything was asked for, or heralded, last
        self._attaching: dict[int, tuple[int, int, int]] = {}  # slot -> asked, placed, mapped
        self._attaches: deque[Attach] = deque(maxlen=ATTACHES_UNSAID_MAX)
        self._door = door
        self._told: dict[int, int] = {}  # slot -> the earliest deadline that was told
        self._noted: dict[int, int] = {}  # what the page says, where that is not 0
        self.warm_ups: deque[Version] = deque()
        self.unsaid: set[int] = set()  # slots that got jobs since the page was told
        # By slot: mapped ahead, not resident when looked at last.
        self.coming: dict[int, Coming] = {}

    def herald(self, rings: Sequence[_shm.SubmissionRing]) -> None:
        """A request has woken this worker: if its version is not there, wake who will be asked for it.

        A process that sleeps takes as long to wake up as a worker to see what a request is about.
        """
        now_ns = time.monotonic_ns()
        if now_ns - self._asked_ns < QUIET_NS:
            return
        for ring in rings:
            slot = ring.peek()
            is_new = 0 <= slot < VERSIONS_MAX and slot not in self._told
            if is_new and self._table.get(slot)[0] == _shm.ABSENT:
                self._asked_ns = now_ns  # so often it is not done, whatever becomes of the request
                os.eventfd_write(self._supervisor_bell, 1)
                return

    def want(self, slot: int, deadline_ns: int = NEVER_NS) -> None:
        """Jobs wait for this version: get its weights placed and its program loaded."""
        version = self._versions.get(slot)
        if version is not None:
            self._versions.open(version)
            if version.generation is not None:
                return
        told_ns = self._told.get(slot)
        if told_ns is None or (deadline_ns < told_ns and not self._door.has_expectation(slot)):
            earliest_ns, latest_ns = self._batcher.deadlines(slot)
            self._asked_ns = time.monotonic_ns()
            self._asked.setdefault(slot, self._asked_ns)
            self._told[slot] = earliest_ns
            self.note_waiting(slot)
            self._send(Activate(slot=slot, earliest_ns=earliest_ns, latest_ns=latest_ns))

    def lose(self, version: Version, now_ns: int) -> None:
        """The lease was refused: the version was evicted, or moved, since it was placed."""
        slot = version.info.slot
        version.generation = None
        self._batcher.set_runnable(slot, False, now_ns)
        if self._batcher.waiting(slot):
            self.want(slot)

    def _end_wish(self, slot: int) -> None:
        """What was asked is answered."""
        self._told.pop(slot, None)
        self._door.settle(slot)

    def _answer(self, slot: int) -> tuple[int, int]:
        """The weights are there: end the wish, and return when it was asked for, and now."""
        now_ns = time.monotonic_ns()
        self._end_wish(slot)
        return self._asked.pop(slot, now_ns), now_ns

    def note_waiting(self, slot: int) -> None:
        """Tell the page how many jobs wait for this version."""
        waiting = self._batcher.waiting(slot)
        if self._noted.get(slot, 0) != waiting:
            if waiting:
                self._noted[slot] = waiting
            else:
                del self._noted[slot]
            self._leases.set_waiting(slot, waiting)

    def say_waiting(self, taken: Sequence[int]) -> None:
        """Tell the page of the jobs that came and wait; these slots' are taken."""
        unsaid = self.unsaid
        unsaid.difference_update(taken)
        if unsaid:
            for slot in unsaid:
                self.note_waiting(slot)
            unsaid.clear()

    def note_all_waiting(self, slots: Sequence[int]) -> None:
        """`note_waiting` for the versions of a batch; most have nothing waiting and said so."""
        if not (self._noted or len(self._batcher)):
            return
        noted, waiting = self._noted.get, self._batcher.waiting
        for slot in slots:
            if waiting(slot) != noted(slot, 0):
                self.note_waiting(slot)

    # --- from the supervisor --------------------------------------------------------------------
    def on_info(self, info: VersionInfo, now_ns: int) -> list[Job]:
        """A version is known now; return the jobs that waited for that, to check and queue them."""
        jobs = self._batcher.drain(info.slot, now_ns)
        version = self._versions.learn(info)
        limits = limits_of(info.config)
        lane = queue_of(info.slot, limits)
        if info.config.batching.priority_levels:
            lane = PriorityLane(info.slot, limits, info.config.batching)
        if version.sequences is not None:
            lane = lane_of(info.slot, limits, info.config, version.sequences)
            jobs.sort(key=lambda job: job.order)  # as they came
        self._batcher.configure(info.slot, limits, lane)
        if not jobs:  # else the page goes on saying that they wait: they come back at once
            self.note_waiting(info.slot)
        return jobs

    def on_coming(self, coming: Coming, now_ns: int) -> None:
        """A version's bytes are on their way: map where they will be, while they come."""
        version = self._versions.get(coming.slot)
        if version is None or version.generation is not None or version.failing(now_ns) is not None:
            return
        try:
            if self._versions.prepare(coming):
                self.coming[coming.slot] = coming
        except (OSError, ValueError) as error:
            # It is tried again, and answered, when the version is placed.
            log.warning("%s cannot be mapped ahead: %s", version.title, error)

    def take_arrived(self, now_ns: int) -> None:
        """Run what was mapped ahead and is resident now; its Placed says nothing new."""
        for slot, coming in list(self.coming.items()):
            if self._table.get(slot) == (_shm.RESIDENT, coming.generation):
                del self.coming[slot]
                version = self._versions.arrive(coming)
                if version is not None:
                    asked_ns, arrived_ns = self._answer(slot)
                    self._attaching[slot] = (asked_ns, arrived_ns, arrived_ns)
                    self._try_bind(version, now_ns)

    def watch(self, rings: Sequence[_shm.Ring], until_ns: int) -> bool:
        """Wait without sleep for what is about to arrive, or for a ring; False if neither came."""
        near = [coming for coming in self.coming.values() if self._is_near(coming)]
        while near and time.monotonic_ns() < until_ns:
            if not all(map(self._is_near, near)) or _shm.spin(rings, LOOK_NS):
                return True
        return False

    def _is_near(self, coming: Coming) -> bool:
        return self._table.get(coming.slot) == (_shm.LOADING, coming.generation)

    def on_placed(self, placed: Placed, now_ns: int) -> None:
        """A version is resident: map it where it lies, and run it if its program is there."""
        version = self._versions.get(placed.slot)
        if version is not None and version.generation == placed.generation:
            return  # the word had said so
        self.coming.pop(placed.slot, None)
        asked_ns, placed_ns = self._answer(placed.slot)
        if version is None or version.failing(now_ns) is not None:
            return
        try:
            self._versions.place(placed)
            self._attaching[placed.slot] = (asked_ns, placed_ns, time.monotonic_ns())
        except (OSError, ValueError, DriverError) as error:
            if isinstance(error, DriverError) and error.is_sticky:
                raise  # nothing works here any more; the next worker starts afresh
            self._break(version, error, now_ns)
            return
        self._try_bind(version, now_ns)

    def on_expected(self, expected: Expected, now_ns: int) -> None:
        """It will be resident at the earliest then; who has less time is answered now."""
        slot = expected.slot
        if slot not in self._told:
            return  # it was placed, or failed, meanwhile
        self._door.expect(slot, expected.ready_ns, expected.likely_ns)
        if not self._door.judges or expected.ready_ns <= now_ns:
            return  # nobody is refused, and who is taken out and put in again loses his place
        late = self._batcher.take_before(slot, expected.ready_ns, now_ns)
        version = self._versions.get(slot)
        title = "the model" if version is None else version.title
        for job in late:
            if not self._door.refuses_absent(job, title, now_ns):
                self._batcher.add(job, now_ns)
        if late:
            self.note_waiting(slot)

    def on_activation_failed(self, failed: ActivationFailed, now_ns: int) -> None:
        """It cannot be made resident now."""
        self._asked.pop(failed.slot, None)
        self.coming.pop(failed.slot, None)
        self._end_wish(failed.slot)
        version = self._versions.get(failed.slot)
        if version is None or not version.is_runnable:
            wait_ms = int((failed.retry_after_s or 0) * 1000)
            self._refuse_all(failed.slot, failed.code, failed.message, wait_ms, now_ns)

    def on_withdrawn(self, slot: int) -> None:
        """The supervisor saw nobody wait; a job may have come meanwhile."""
        self._asked.pop(slot, None)
        self._end_wish(slot)
        if self._batcher.waiting(slot):
            self.want(slot)

    def on_forget(self, slot: int, now_ns: int) -> None:
        """The version was removed or unloaded."""
        self._asked.pop(slot, None)
        self._attaching.pop(slot, None)
        self.coming.pop(slot, None)
        self._told.pop(slot, None)
        self._door.forget(slot)
        version = self._versions.get(slot)
        title = "the model" if version is None else version.title
        text = f"{title} was removed or unloaded while the request waited"
        self._refuse_all(slot, Unavailable.code, text, 0, now_ns)
        self._versions.forget(slot)
        self._batcher.remove(slot)

    # --- from the loader ------------------------------------------------------------------------
    def take_opened(self, now_ns: int) -> None:
        """Take the programs that have been loaded."""
        while (taken := self._versions.take_opened()) is not None:
            version, error = taken
            if error is not None:
                self._break(version, error, now_ns)
            else:
                if not gc.isenabled():
                    gc.freeze()  # what was imported stays: the collector need not look at it
                self._try_bind(version, now_ns)

    def _try_bind(self, version: Version, now_ns: int) -> None:
        """Bind as soon as program and weights are both there, and let the lane run."""
        slot = version.info.slot
        if version.model is None:
            self._versions.open(version)
            if version.opened is None or version.generation is None:
                self._batcher.set_runnable(slot, False, now_ns)
                return
            try:
                if not self._runner.try_prepare(version, lambda: self._versions.bind(version)):
                    self.lose(version, now_ns)
                    return
            except Exception as error:  # the batch boundary: a model's own code may run here
                self._break(version, error, now_ns)
                return
            self._batcher.set_family(slot, version.family)
            if version.info.config.warmup:
                self._runner.try_warm_up(version)  # they are meant to come before a client's
            elif version.info.config.warm_up:
                self.warm_ups.append(version)
        if self._versions.must_check(version) and not self._is_right(version, now_ns):
            return
        self._batcher.set_runnable(slot, version.is_runnable, now_ns)
        self._note_attach(version)
        for gone in self._versions.make_room(self._batcher.is_busy):
            self._batcher.set_runnable(gone, False, now_ns)

    def _is_right(self, version: Version, now_ns: int) -> bool:
        """Hold the weights against their digest; False, and it is said, where it cannot run."""
        try:
            if self._runner.try_prepare(version, lambda: self._versions.check(version)):
                return True
            self.lose(version, now_ns)
        except ImageError as error:
            self._break(version, error, now_ns)
        return False

    def _note_attach(self, version: Version) -> None:
        stages = self._attaching.pop(version.info.slot, None)
        if stages is not None and version.generation is not None:
            asked_ns, placed_ns, mapped_ns = stages
            self._attaches.append(
                Attach(
                    slot=version.info.slot,
                    generation=version.generation,
                    asked_ns=asked_ns,
                    placed_ns=placed_ns,
                    mapped_ns=mapped_ns,
                    ready_ns=time.monotonic_ns(),
                )
            )

    def tell_attaches(self) -> None:
        """Tell the supervisor what was mapped since the last time."""
        if self._attaches:
            self._send(Attaches(attaches=tuple(self._attaches)))
            self._attaches.clear()

    def _break(self, version: Version, error: Exception, now_ns: int) -> None:
        """The version cannot be started here: say so to everybody who waits for it."""
        slot = version.info.slot
        failure = self._versions.fail(version, error, now_ns)
        log.error("%s", failure.message, exc_info=error)
        self._batcher.set_runnable(slot, False, now_ns)
        self._send(BindFailed(slot=slot, message=failure.message))
        wait_ms = (failure.until_ns - now_ns) // 1_000_000
        self._refuse_all(slot, failure.code, failure.message, wait_ms, now_ns)

    # --- answers --------------------------------------------------------------------------------
    def refuse(self, job: Job, code: str, message: str, wait_ms: int) -> None:
        """Answer a job whose version cannot run now."""
        self._links.fail(job, _shm.NOT_RESIDENT, f"{code}\n{message}", detail=wait_ms)

    def _refuse_all(self, slot: int, code: str, message: str, wait_ms: int, now_ns: int) -> None:
        for job in self._batcher.drain(slot, now_ns):
            self.refuse(job, code, message, wait_ms)
        self.note_waiting(slot)

    def _send(self, message: Activate | Attaches | BindFailed) -> None:
        try:
            self._control.send(message)
        except OSError as error:
            raise EOFError("the supervisor is gone") from error
