"""A worker: takes submissions from every front end, runs them in batches, answers.

One thread does everything on the way of a request and blocks only in `_shm.wait`; the helper thread
of `bound.py` reads headers and imports programs.  One turn of the loop:

    control messages -> rings -> lanes -> a batch, or a few short ones -> completions -> doorbells

and only when a turn finds nothing to do: idle work (warm-up, garbage), arm, look again, sleep.

The way of a job:

    ring  --_admit-->  lane  --Batcher.next-->  batch  --Runner.try_run-->  completion

    refused by _admit: bad tensors, lane full, version known to be broken
    answered from its lane: expired, cancelled, activation failed, version forgotten
    back to its lane: the lease was refused, so the version is asked for again

Invariants
 1. Every job gets exactly one completion, or its link is gone.
 2. What one front end or one model does costs others nothing but compute time: a broken link is
    dropped alone, a version that cannot run holds up no other.

Run by `worker_process`.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
import time
from typing import Final

from overcommit.runtime import _shm
from overcommit.runtime.arena import MemfdRanges, Ranges
from overcommit.runtime.batcher import Batcher
from overcommit.runtime.bound import Loader, Opener, Version, Versions
from overcommit.runtime.config import ARRIVAL_SPIN_NS, HEARTBEAT_NS, POP_MAX, POPS_MAX, VERSIONS_MAX
from overcommit.runtime.control import ControlSocket
from overcommit.runtime.door import Door
from overcommit.runtime.errors import BadRequest, Overloaded, ProtocolError, WorkerLost
from overcommit.runtime.flight_deck import deck_of
from overcommit.runtime.flights import Flights
from overcommit.runtime.garbage import Garbage
from overcommit.runtime.heap import Heap
from overcommit.runtime.lanes import Batch, Job
from overcommit.runtime.links import Link, Links, link_key
from overcommit.runtime.messages import Chunks, LinkDown, LinkUp, LogLevel, Ready, Start, Stop
from overcommit.runtime.mixing import Families
from overcommit.runtime.payload_pins import PayloadPins
from overcommit.runtime.runner import Runner
from overcommit.runtime.wishes import Wishes
from overcommit.runtime.worker_messages import (
    ActivationFailed,
    Coming,
    Expected,
    Forget,
    Placed,
    VersionInfo,
    Withdrawn,
)

log = logging.getLogger("overcommit.worker")

CONTROL_PERIOD_NS: Final = 200_000  # how often a busy worker looks at its control socket
# Batches of one turn.  A bell costs as much as a small batch: answers share it.
BATCHES_MAX: Final = 8
BATCHES_NS: Final = 100_000
RETRY_MS: Final = 1000  # after which who found no slot for its sequence may try again


class Worker:
    """The loop, and what it joins.  Takes over the descriptors of its `Start`."""

    def __init__(
        self,
        control: ControlSocket,
        start: Start,
        fds: dict[str, int],
        open_program: Opener,
        ranges: Ranges | None = None,
        pins: PayloadPins | None = None,
    ) -> None:
        self.control = control
        self._doorbell = fds["doorbell"]
        page_bytes = _shm.STATUS_BYTES + _shm.lease_page_bytes(VERSIONS_MAX)
        table_bytes = _shm.table_bytes(VERSIONS_MAX)
        page = mmap.mmap(fds["page"], page_bytes)
        table = mmap.mmap(fds["residency"], table_bytes, prot=mmap.PROT_READ)
        self._table = _shm.ResidencyTable(table, 0, VERSIONS_MAX, False)
        self._leases = _shm.LeasePage(page, _shm.STATUS_BYTES, VERSIONS_MAX, True)
        self._status = _shm.StatusPage(page, 0, True)
        spin_ns = start.settings.spin_ns
        self._spin_ns = _shm.default_spin_ns() if spin_ns is None else spin_ns
        self.batcher = Batcher()
        self.links = Links(start.epoch, pins)
        self.versions = Versions(
            MemfdRanges(fds["device"]) if ranges is None else ranges,
            Loader(open_program, self._ring_own_bell),
            Families(self._ring_own_bell),
            died_ns=time.monotonic_ns() if start.epoch > 1 else 0,
        )
        self._runner = Runner(
            *(self.links, self._table, self._leases, self._status, fds["supervisor_bell"])
        )
        self.door = Door(self.batcher, self.links, judges=start.settings.admission)
        self.wishes = Wishes(
            *(control, self.batcher, self.versions, self._runner, self.links, self._leases),
            *(self.door, self._table, fds["supervisor_bell"]),
        )
        flights = None if pins is None else Flights(self._runner, self._status)
        self.deck = deck_of(flights, self.batcher, self.versions, self.wishes)
        self._heartbeat_ns = self._control_ns = 0
        self.garbage = Garbage(time.monotonic_ns())
        self._heap = Heap()
        self._was_helped = False
        self.is_stopping = False

    def _ring_own_bell(self) -> None:
        """Called by helper threads when they have done something."""
        self._was_helped = True
        os.eventfd_write(self._doorbell, 1)

    def close(self) -> None:
        """The doorbell is about to be closed: helper threads that are still at work leave it alone."""
        self.versions.loader.close()
        self.versions.families.close()

    # --- the loop -------------------------------------------------------------------------------
    def run(self) -> None:
        """Serve until told to stop.  Raises EOFError when the supervisor is gone."""
        try:
            self.control.send(Ready(pid=os.getpid()))
        except OSError as error:
            raise EOFError("the supervisor is gone") from error
        while True:
            did = self.turn()
            if self.is_stopping:
                if self.deck is not None:
                    self.deck.clear(None, time.monotonic_ns())
                return
            if not did:
                self.sleep()

    def turn(self) -> bool:
        """Do what there is to do, a few batches at most; False when there was nothing."""
        now_ns = time.monotonic_ns()
        if now_ns - self._heartbeat_ns >= HEARTBEAT_NS:
            self._heartbeat_ns = now_ns
            self._status.heartbeat(now_ns)
            self.wishes.tell_attaches()
            # Later than their time: a request may have come while this worker was busy.
            self.versions.end_idle_sequences(now_ns - HEARTBEAT_NS)
        if self._was_helped or now_ns - self._control_ns >= CONTROL_PERIOD_NS:
            self._was_helped = False
            self._control_ns = now_ns
            self._take_control(now_ns)
            self.wishes.take_opened(now_ns)
            self.versions.families.take_recorded()
        if self.wishes.coming:
            self.wishes.take_arrived(now_ns)
        did = self._take_submissions(now_ns)
        did = (self.deck is not None and self.deck.land(now_ns)) or did
        for _ in range(BATCHES_MAX):
            if not self._run_batch(now_ns):
                break
            did = True
            # More of them only while they are short: what comes in meanwhile should join a batch.
            if time.monotonic_ns() - now_ns > BATCHES_NS:
                break
        self.links.ring_bells()
        self._drop_broken(now_ns)
        self.garbage.look_if_due(now_ns, self.versions.released, is_idle=False)
        return did

    def sleep(self) -> None:
        """Idle work first; then wait for a doorbell, a message, the next due lane or heartbeat."""
        if self._idle_work():
            return
        nap_ns = None if self.deck is None else self.deck.nap_ns(time.monotonic_ns())
        if nap_ns == 0:
            return
        rings = self.links.rings
        if self.wishes.coming and self.wishes.watch(rings, time.monotonic_ns() + ARRIVAL_SPIN_NS):
            return
        if self._spin_ns and rings and _shm.spin(rings, self._spin_ns):
            return
        if not _shm.arm(rings):
            return
        now_ns = time.monotonic_ns()
        until_ns = min(self._heartbeat_ns + HEARTBEAT_NS, self.batcher.wake_ns() or sys.maxsize)
        if nap_ns is not None:
            until_ns = min(until_ns, now_ns + nap_ns)
        woken = _shm.wait(self._doorbell, self.control.fileno(), max(0, until_ns - now_ns))
        _shm.disarm(rings)
        if woken & _shm.DOORBELL:
            self.wishes.herald(rings)
        if woken & _shm.CONTROL:
            self._control_ns = 0  # a look for nothing costs as much as a small batch

    # --- rings -> lanes -------------------------------------------------------------------------
    def _take_submissions(self, now_ns: int) -> bool:
        did = False
        near = (self.versions.by_slot, self.batcher.turns)
        for link in self.links.all():
            try:
                for _ in range(POPS_MAX):  # what stays in a ring has to wait for a whole batch
                    jobs, cancelled = link.pop(now_ns, near)
                    for job in jobs:
                        self._admit(job, link, now_ns)
                    self.wishes.unsaid.update([job.slot for job in jobs])
                    did = did or bool(jobs)
                    for request_id in cancelled:
                        self._cancel(request_id, now_ns)
                    if len(jobs) + len(cancelled) < POP_MAX:
                        break
            except ProtocolError as error:
                log.error("link %#x broke the protocol and is dropped: %s", link.key, error.message)
                self._drop_link(link.key, now_ns)
        return did

    def _admit(self, job: Job, link: Link, now_ns: int) -> None:
        """Check a job and queue it, or answer it at once.  Raises ProtocolError."""
        if job.request_id in self.batcher:
            raise ProtocolError(f"request {job.request_id:#x} was submitted twice")
        version = self.versions.get(job.slot)
        if version is not None:
            failure = version.failure and version.failing(now_ns)
            if failure is not None:
                wait_ms = (failure.until_ns - now_ns) // 1_000_000
                self.wishes.refuse(job, failure.code, failure.message, wait_ms)
                return
            block = link.ingress[job.in_offset : job.in_offset + job.in_length]
            try:
                form = version.signature.read(block)
            except BadRequest as error:
                self.links.fail(job, _shm.BAD_REQUEST, error.message)
                return
            except WorkerLost as error:  # the one before this one, with the job's sequence
                self.wishes.refuse(job, error.code, error.message, 0)
                return
            job.form = form
            job.shape_key = form.key
            # A request without rows takes a place in its batch too.
            job.rows = max(1, form.rows)
            job.row_bytes = form.row_bytes
            # The bound is crude and cheap; who is beyond it is looked at.
            if version.model is not None and version.generation is not None:  # is_runnable
                bound_ns = now_ns + self.batcher.slowest_ns * len(self.batcher)
                if bound_ns > job.deadline_ns and self.door.refuses(job, version.title, now_ns):
                    return
            elif self.door.refuses_absent(job, version.title, now_ns):
                return
        if not self.batcher.add(job, now_ns):
            room_ms = self.batcher.foresight.batch_ns(job.slot) // 1_000_000
            self.links.complete(job, _shm.OVERLOADED, (now_ns, now_ns), detail=room_ms)
        elif version is None or not version.is_runnable:
            self.wishes.want(job.slot, job.deadline_ns)

    def _readmit(self, job: Job, now_ns: int) -> None:
        """Check a job that came before its version was known."""
        try:
            self._admit(job, self.links.of(job), now_ns)
            self.wishes.unsaid.add(job.slot)
        except ProtocolError as error:
            log.error("link %#x broke the protocol and is dropped: %s", job.link, error.message)
            self.links.broken.append(job.link)

    def _cancel(self, request_id: int, now_ns: int) -> None:
        # What is not found here runs or has been answered: its completion is on its way.
        job = self.batcher.cancel(request_id, now_ns)
        if job is not None:
            self.links.complete(job, _shm.CANCELLED, (now_ns, now_ns))
            self.wishes.note_waiting(job.slot)

    # --- lanes -> batches -----------------------------------------------------------------------
    def _run_batch(self, now_ns: int) -> bool:
        deck = self.deck
        batch = None if deck is not None and deck.is_full else self.batcher.next(now_ns)
        for job in self.batcher.take_expired():
            self._expire(job, now_ns)
        if batch is None:
            self.wishes.say_waiting(())
            return False
        slots = [batch.slot]
        slots += [slot for slot, _ in batch.others]
        self.wishes.say_waiting(slots)  # what this batch takes need not be said
        self.links.ring_bells()  # who was refused or has expired need not wait for this batch
        if batch.others:
            self._run_mixed(batch, slots, now_ns)
            return True
        version = self._runnable(batch.slot)
        if deck is not None and deck.try_start(version, batch, now_ns):
            return True
        start_ns = time.monotonic_ns()
        if self._runner.try_run(version, batch.jobs):
            end_ns = time.monotonic_ns()
            self.batcher.finish(batch, end_ns - start_ns, end_ns)
            self.versions.on_run(batch.slot)
        else:
            self.batcher.put_back(batch, now_ns)
            self.wishes.lose(version, now_ns)
        self.wishes.note_waiting(batch.slot)
        return True

    def _expire(self, job: Job, now_ns: int) -> None:
        version = self.versions.get(job.slot)
        sequences = None if version is None else version.sequences
        refusal = None if sequences is None else sequences.refused.pop(job.request_id, None)
        if refusal is None:
            self.links.complete(job, _shm.EXPIRED, (now_ns, now_ns))
        else:
            self.wishes.refuse(job, Overloaded.code, refusal, RETRY_MS)
        self.wishes.note_waiting(job.slot)

    def _run_mixed(self, batch: Batch, slots: list[int], now_ns: int) -> None:
        """Run a batch of several versions; those that are not resident any more run later."""
        jobs = [batch.jobs]
        jobs += [mine for _, mine in batch.others]
        parts = list(zip(self.versions.of(slots), jobs, strict=True))
        start_ns = time.monotonic_ns()
        lost = self._runner.run_mixed(parts, slots)
        end_ns = time.monotonic_ns()
        if lost:
            lost_slots = {version.info.slot for version in lost}
            self.batcher.finish(batch, end_ns - start_ns, end_ns, lost_slots)
            for version in lost:
                self.wishes.lose(version, now_ns)
            self.versions.on_runs([slot for slot in slots if slot not in lost_slots])
        else:
            self.batcher.finish(batch, end_ns - start_ns, end_ns)
            self.versions.on_runs(slots)
        self.wishes.note_all_waiting(slots)

    def _runnable(self, slot: int) -> Version:
        version = self.versions.get(slot)
        assert version is not None, "only runnable lanes are due"
        return version

    # --- control --------------------------------------------------------------------------------
    def _take_control(self, now_ns: int) -> None:
        while (received := self.control.try_receive()) is not None:
            self._on_message(*received, now_ns)

    def _on_message(self, message: object, fds: dict[str, int], now_ns: int) -> None:
        if self.deck is not None:
            # Whatever it says of a version, its batch lands first; of links and chunks, every batch.
            self.deck.clear(getattr(message, "slot", None), now_ns)
        if isinstance(message, Placed):
            self.wishes.on_placed(message, now_ns)
        elif isinstance(message, Coming):
            self.wishes.on_coming(message, now_ns)
        elif isinstance(message, VersionInfo):
            for job in self.wishes.on_info(message, now_ns):
                self._readmit(job, now_ns)
        elif isinstance(message, Expected):
            self.wishes.on_expected(message, now_ns)
        elif isinstance(message, ActivationFailed):
            self.wishes.on_activation_failed(message, now_ns)
        elif isinstance(message, Withdrawn):
            self.wishes.on_withdrawn(message.slot)
        elif isinstance(message, Forget):
            self.wishes.on_forget(message.slot, now_ns)
        elif isinstance(message, LinkUp):
            self.links.add(message, fds)
        elif isinstance(message, LinkDown):
            self._drop_link(link_key(message.seat, message.epoch), now_ns)
        elif isinstance(message, Chunks):
            self.control.send(self.versions.ranges.change(message, fds))
        elif isinstance(message, LogLevel):
            logging.getLogger().setLevel(message.level)
        elif isinstance(message, Stop):
            self.is_stopping = True

    # --- links that go --------------------------------------------------------------------------
    def _drop_broken(self, now_ns: int) -> None:
        while self.links.broken:
            self._drop_link(self.links.broken.pop(), now_ns)

    def _drop_link(self, key: int, now_ns: int) -> None:
        if self.deck is not None:
            self.deck.clear(None, now_ns)  # a device may write to its memory
        for slot in {job.slot for job in self.batcher.drop_link(key, now_ns)}:
            self.wishes.note_waiting(slot)
        self.links.drop(key)

    # --- idle -----------------------------------------------------------------------------------
    def _idle_work(self) -> bool:
        """Do one thing that can wait; False when there is none."""
        if len(self.batcher):
            return False
        while self.wishes.warm_ups:
            version = self.wishes.warm_ups.popleft()
            if version.is_runnable and not version.has_run:
                self._runner.try_warm_up(version)
                return True
        now_ns = time.monotonic_ns()
        if self._heap.trim_if_due(self.batcher.finished, now_ns):
            return True
        return self.garbage.look_if_due(now_ns, self.versions.released, is_idle=True)
