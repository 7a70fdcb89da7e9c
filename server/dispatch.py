"""Requests in flight: blocks lent to workers, submissions pushed, completions taken, workers lost.

Block states: FREE -> FILLING [submit] -> LENT [_push] -> FREE [_finish, after the copy-out]
              LENT -> ABANDONED [deadline, client gone] -> FREE [late completion, link down]

Invariants
 1. A request gets exactly one answer through its future; what comes later is dropped and counted.
 2. A block is given back only by a completion on its own link, or when that link's worker is reaped.
 3. A request that was in a dead worker's batch is tried once more, alone; one that was only queued
    moves on without that counting.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import time
from dataclasses import dataclass, field

from overcommit.runtime import _shm, payload
from overcommit.runtime.blocks import BlockArena
from overcommit.runtime.config import BLOCK_BYTES_MAX, RETRIES_MAX, VERSIONS_MAX
from overcommit.runtime.errors import (
    DeadlineExceeded,
    ModelError,
    NotFound,
    Overloaded,
    OvercommitError,
    PayloadTooLarge,
    ProtocolError,
    Unavailable,
    WorkerLost,
)
from overcommit.runtime.messages import LinkUp, ModelCounters, Route
from overcommit.runtime.router import Router, short_queue

log = logging.getLogger("overcommit.dispatch")
RUN_ALONE = 1


@dataclass(slots=True)
class Link:
    key: int
    submissions: _shm.SubmissionRing
    completions: _shm.CompletionRing
    bell: int
    status: _shm.StatusPage
    memory: mmap.mmap
    page: mmap.mmap
    slots: int
    lent: dict[int, "Pending"] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class Result:
    places: tuple[payload.TensorPlace, ...]
    data: bytes
    queue_ns: int
    compute_ns: int
    batch_size: int


@dataclass(slots=True, eq=False)
class Pending:
    request_id: int
    route: Route
    deadline_ns: int
    in_offset: int
    in_length: int
    out_offset: int
    out_capacity: int
    future: asyncio.Future[Result]
    link: Link | None = None
    retries: int = 0
    flags: int = 0
    began_ns: int = 0


class Dispatch:
    def __init__(self, seat: int, epoch: int, ingress: mmap.mmap, egress: mmap.mmap) -> None:
        self._base = seat << 56 | epoch << 40
        self._epoch = epoch
        self._count = 0
        self._in_view, self._out_view = memoryview(ingress), memoryview(egress)
        self.ingress, self.egress = BlockArena(len(self._in_view)), BlockArena(len(self._out_view))
        self.links: dict[int, Link] = {}
        self._router = Router()
        self.pending: dict[int, Pending] = {}
        self._held: list[Pending] = []
        self._hints: dict[int, int] = {}
        self.requests = self.errors = self.late = self.retried = 0
        self.counters: dict[int, list[int]] = {}

    # --- links ----------------------------------------------------------------------------------
    def rings(self) -> list[_shm.CompletionRing]:
        return [link.completions for link in self.links.values()]

    def link_up(self, message: LinkUp, fds: dict[str, int]) -> None:
        half = message.completion_offset
        memory = mmap.mmap(fds["link"], 2 * half)
        page = mmap.mmap(fds["page"], _shm.STATUS_BYTES, prot=mmap.PROT_READ)
        os.close(fds["link"])
        os.close(fds["page"])
        key = message.seat << 16 | message.epoch
        self.links[key] = Link(
            key,
            _shm.SubmissionRing(memory, 0, True, self._epoch, message.epoch),
            _shm.CompletionRing(memory, half, False, message.epoch, self._epoch),
            fds["peer_doorbell"],
            _shm.StatusPage(page, 0, False),
            memory,
            page,
            message.slot_count,
        )
        self._router.add(key)
        held, self._held = self._held, []
        for pending in held:
            self._push(pending)

    def link_down(self, seat: int, epoch: int) -> None:
        key = seat << 16 | epoch
        link = self.links.get(key)
        if link is None:
            return
        self._drain_link(link)  # what it answered before it died is good
        del self.links[key]
        self._router.remove(key)
        os.close(link.bell)
        _, started_ns, _, _, ids = link.status.read()
        suspects = set(ids) if started_ns else set()
        head = link.submissions.head()
        for pending in list(link.lent.values()):
            ran = pending.request_id in suspects and link.positions[pending.request_id] < head
            pending.link = None
            if pending.future.done():
                self._release(pending)
            elif not ran:
                self._push(pending)
            elif pending.retries < RETRIES_MAX:
                pending.retries += 1
                pending.flags |= RUN_ALONE
                self.retried += 1
                self._push(pending)
            else:
                name = pending.route.name
                self._fail(pending, WorkerLost(f"model '{name}': the worker that ran it died twice"))

    # --- requests -------------------------------------------------------------------------------
    def submit(
        self,
        route: Route,
        tensors: list[tuple[int, str, bytes | memoryview, tuple[int, ...]]],
        out_bytes: int,
        deadline_ns: int,
    ) -> asyncio.Future[Result]:
        places, nbytes = payload.plan([(i, t, len(d), s) for i, t, d, s in tensors])
        if nbytes > BLOCK_BYTES_MAX:
            raise PayloadTooLarge(
                f"model '{route.name}': the tensors need {nbytes} bytes, the limit is "
                f"{BLOCK_BYTES_MAX}; send fewer rows"
            )
        block = self.ingress.try_reserve(nbytes)
        if block is None:
            raise Overloaded("payload memory is full; try again soon", retry_after_s=1)
        want = min(max(out_bytes, self._hints.get(route.slot, 0), 1024), BLOCK_BYTES_MAX)
        out = self.egress.try_reserve(want)
        if out is None:
            self.ingress.release(block[0])
            raise Overloaded("payload memory is full; try again soon", retry_after_s=1)
        view = self._in_view[block[0] : block[0] + nbytes]
        payload.encode(view, places)
        for place, (_, _, data, _) in zip(places, tensors, strict=True):
            view[place.offset : place.offset + place.nbytes] = data
        self._count = (self._count + 1) & ((1 << 40) - 1)
        pending = Pending(
            self._base | self._count,
            route,
            deadline_ns,
            block[0],
            nbytes,
            out[0],
            out[1],
            asyncio.get_running_loop().create_future(),
            began_ns=time.monotonic_ns(),
        )
        self.pending[pending.request_id] = pending
        self.requests += 1
        self._push(pending)
        return pending.future

    def _push(self, pending: Pending) -> None:
        if not self.links:
            self._held.append(pending)
            return
        slot = pending.route.slot
        avoid = [k for k, link in self.links.items() if len(link.lent) >= link.slots]
        key = self._router.choose(slot, short_queue(pending.route.max_batch_size), avoid)
        link = self.links.get(key) if key is not None else None
        if link is None:
            self._fail(pending, Overloaded("every worker's ring is full", retry_after_s=1))
            return
        pending.link = link
        link.lent[pending.request_id] = pending
        link.positions[pending.request_id] = link.submissions.tail()
        pushed = link.submissions.push(
            pending.request_id,
            pending.deadline_ns,
            pending.in_offset,
            pending.out_offset,
            pending.in_length,
            pending.out_capacity,
            _shm.SUBMIT,
            slot,
            pending.flags,
        )
        assert pushed, "outstanding is bounded by the ring"
        self._router.on_submit(link.key, slot)
        if link.submissions.must_wake():
            os.eventfd_write(link.bell, 1)

    # --- completions ----------------------------------------------------------------------------
    def drain(self) -> None:
        for link in list(self.links.values()):
            try:
                self._drain_link(link)
            except (_shm.RingCorrupt, ProtocolError):
                log.exception("a worker broke its ring")

    def _drain_link(self, link: Link) -> None:
        while completions := link.completions.pop(256):
            for completion in completions:
                pending = link.lent.pop(completion[0], None)
                if pending is None:
                    self.late += 1
                    continue
                link.positions.pop(completion[0])
                self._router.on_done(link.key, pending.route.slot)
                self._complete(pending, completion)

    def _complete(self, pending: Pending, completion: _shm.Completion) -> None:
        _, taken_ns, started_ns, finished_ns, length, status, batch, detail = completion
        if pending.future.done():
            self.late += 1
            self._release(pending)
            return
        if length > pending.out_capacity:
            raise ProtocolError(f"a worker answered {length} bytes")
        view = self._out_view[pending.out_offset : pending.out_offset + length]
        name = pending.route.name
        if status == _shm.OK:
            data = bytes(view)  # before the block is given back: the transport keeps views
            try:
                places = payload.decode(memoryview(data))
            except ProtocolError as error:
                self._fail(pending, error)
                return
            self._count_done(pending, True, started_ns - taken_ns, finished_ns - started_ns, batch)
            self._release(pending)
            pending.future.set_result(
                Result(places, data, started_ns - taken_ns, finished_ns - started_ns, batch)
            )
        elif status == _shm.TOO_LARGE and detail <= BLOCK_BYTES_MAX:
            self._hints[pending.route.slot] = detail
            block = self.egress.try_reserve(detail)
            if block is None:
                self._fail(pending, Overloaded("payload memory is full", retry_after_s=1))
                return
            self.egress.release(pending.out_offset)
            pending.out_offset, pending.out_capacity = block
            self._push(pending)
        else:
            self._fail(pending, self._error(name, status, bytes(view).decode(errors="replace"), detail))

    def _error(self, name: str, status: int, text: str, detail: int) -> OvercommitError:
        if status == _shm.EXPIRED:
            return DeadlineExceeded(f"model '{name}': the request's time was over in the queue")
        if status == _shm.OVERLOADED:
            return Overloaded(f"model '{name}': its queue is full; try again", retry_after_s=1)
        if status == _shm.NOT_RESIDENT:
            code, _, message = text.partition("\n")
            kind = {c.code: c for c in OvercommitError.__subclasses__()}.get(code, Unavailable)
            return kind(message, retry_after_s=detail / 1000 if detail else None)
        if status == _shm.TOO_LARGE:
            return PayloadTooLarge(f"model '{name}': the answer needs {detail} bytes")
        return ModelError(f"model '{name}': {text}")

    def _fail(self, pending: Pending, error: OvercommitError) -> None:
        self.errors += 1
        self._count_done(pending, False, 0, 0, 1)
        self._release(pending)
        if not pending.future.done():
            pending.future.set_exception(error)

    def _count_done(self, pending: Pending, ok: bool, queue: int, compute: int, batch: int) -> None:
        row = self.counters.setdefault(pending.route.slot, [0] * 6)
        row[0 if ok else 1] += 1
        row[2] += queue
        row[3] += compute
        row[4] += time.monotonic_ns() - pending.began_ns
        row[5] += 1000 // max(1, batch)

    def _release(self, pending: Pending) -> None:
        self.ingress.release(pending.in_offset)
        self.egress.release(pending.out_offset)
        self.pending.pop(pending.request_id, None)

    def expire(self, now_ns: int) -> None:
        for pending in list(self.pending.values()):
            if now_ns > pending.deadline_ns and not pending.future.done():
                error = DeadlineExceeded(f"model '{pending.route.name}': no answer in time")
                self.errors += 1
                pending.future.set_exception(error)
                if pending in self._held:
                    self._held.remove(pending)
                    self._release(pending)

    def model_counters(self) -> tuple[ModelCounters, ...]:
        return tuple(
            ModelCounters(
                slot=slot,
                success=r[0],
                failure=r[1],
                queue_ns=r[2],
                compute_ns=r[3],
                request_ns=r[4],
                batches=r[5],
            )
            for slot, r in self.counters.items()
        )
