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

import heapq
import logging
import mmap
import os
import time
from dataclasses import dataclass, field
from typing import Final, Protocol

from overcommit.runtime import _shm, payload
from overcommit.runtime.blocks import BlockArena
from overcommit.runtime.config import BLOCK_BYTES_MAX, RETRIES_MAX
from overcommit.runtime.errors import (
    BadRequest,
    DeadlineExceeded,
    ModelError,
    OvercommitError,
    Overloaded,
    PayloadTooLarge,
    ProtocolError,
    Unavailable,
    WorkerLost,
)
from overcommit.runtime.messages import LinkUp, ModelCounters, Route
from overcommit.runtime.router import Router, short_queue
from overcommit.server.deadlines import Deadlines
from overcommit.server.inference import Prepared
from overcommit.server.limits import HELD_REQUESTS_MAX, REGROWS_MAX

log = logging.getLogger("overcommit.dispatch")

RUN_ALONE: Final = 1  # submission flag: a suspect, run in a batch of its own
OUT_BYTES_MIN: Final = 1024


class Reply(Protocol):
    """Who waits for an answer; exactly one of the two is called, once."""

    def succeed(self, result: Result) -> None:
        """The model answered."""

    def fail(self, error: OvercommitError) -> None:
        """There will be no answer."""


@dataclass(slots=True)
class Link:
    """The rings to one worker incarnation, and what it holds of ours.  Owns `bell`."""

    key: int
    submissions: _shm.SubmissionRing
    completions: _shm.CompletionRing
    bell: int
    status: _shm.StatusPage
    memory: mmap.mmap
    page: mmap.mmap
    slots: int
    lent: dict[int, Pending] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    is_broken: bool = False  # it lied once; nothing goes there any more


@dataclass(slots=True)
class Result:
    """A model's outputs, copied out of the egress block."""

    places: tuple[payload.TensorPlace, ...]
    data: bytes


@dataclass(slots=True, eq=False)
class Pending:
    """One request from its submission to the return of its blocks.  `reply` None: answered."""

    request_id: int
    route: Route
    deadline_ns: int
    in_offset: int
    in_length: int
    out_offset: int
    out_capacity: int
    reply: Reply | None
    link: Link | None = None
    retries: int = 0
    regrown: int = 0
    flags: int = 0
    began_ns: int = 0


class Dispatch:
    """All requests in flight of one front-end incarnation."""

    def __init__(self, seat: int, epoch: int, ingress: mmap.mmap, egress: mmap.mmap) -> None:
        self._base = seat << 56 | epoch << 40
        self._epoch = epoch
        self._count = 0
        self._in_view, self._out_view = memoryview(ingress), memoryview(egress)
        self.ingress, self.egress = BlockArena(len(self._in_view)), BlockArena(len(self._out_view))
        self.links: dict[int, Link] = {}
        self._router = Router()
        self.pending: dict[int, Pending] = {}
        self._held: dict[int, Pending] = {}
        self._deadlines = Deadlines()
        self._hints: dict[int, int] = {}
        self.requests = self.errors = self.late = self.retried = 0
        self._counters: dict[int, list[int]] = {}

    # --- links ----------------------------------------------------------------------------------
    def rings(self) -> list[_shm.CompletionRing]:
        """Completion rings to arm."""
        return [link.completions for link in self.links.values()]

    def link_up(self, message: LinkUp, fds: dict[str, int]) -> None:
        """A worker is there: use it, and send it what was held."""
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
        held, self._held = self._held, {}
        for pending in held.values():
            self._push(pending)

    def link_down(self, seat: int, epoch: int) -> None:
        """A worker is dead and reaped: settle what it held."""
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
            consumed = link.positions[pending.request_id] < head
            # A batch longer than the status page can list makes everything it may hold a suspect.
            listed = len(ids) < _shm.STATUS_BATCH_MAX
            ran = consumed and bool(started_ns) and (pending.request_id in suspects or not listed)
            pending.link = None
            if pending.reply is None:
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
                self._fail(
                    pending, WorkerLost(f"model '{name}': the worker that ran it died twice")
                )

    # --- requests -------------------------------------------------------------------------------
    def submit(self, prepared: Prepared, deadline_ns: int, reply: Reply) -> Pending:
        """Copy a request in and send it to a worker.

        Raises PayloadTooLarge and Overloaded before anything is lent; later errors go to `reply`.
        """
        route = prepared.route
        places, nbytes = payload.plan([(i, t, len(d), s) for i, t, d, s in prepared.tensors])
        if nbytes > BLOCK_BYTES_MAX:
            raise PayloadTooLarge(
                f"model '{route.name}': the tensors need {nbytes} bytes, the limit is "
                f"{BLOCK_BYTES_MAX}; send fewer rows"
            )
        guess = max(prepared.out_bytes, self._hints.get(route.slot, 0), OUT_BYTES_MIN)
        block = self.ingress.try_reserve(nbytes)
        out = self.egress.try_reserve(min(guess, BLOCK_BYTES_MAX))
        if block is None or out is None:
            if block is not None:
                self.ingress.release(block[0])
            if out is not None:
                self.egress.release(out[0])
            raise Overloaded(
                f"model '{route.name}': payload memory is full; try again, or raise "
                f"--payload-memory",
                retry_after_s=1,
            )
        view = self._in_view[block[0] : block[0] + nbytes]
        payload.encode(view, places)
        for place, (_, _, data, _) in zip(places, prepared.tensors, strict=True):
            view[place.offset : place.offset + place.nbytes] = data
        self._count = (self._count + 1) & ((1 << 40) - 1)
        pending = Pending(
            request_id=self._base | self._count,
            route=route,
            deadline_ns=deadline_ns,
            in_offset=block[0],
            in_length=nbytes,
            out_offset=out[0],
            out_capacity=out[1],
            reply=reply,
            began_ns=time.monotonic_ns(),
        )
        self.pending[pending.request_id] = pending
        self._deadlines.add(pending)
        self.requests += 1
        self._push(pending)
        return pending

    def abandon(self, pending: Pending) -> None:
        """The client is gone; the blocks come back with the completion."""
        if pending.reply is None:
            return
        pending.reply = None
        self._deadlines.remove(pending)
        link = pending.link
        if link is None:
            self._release(pending)
        elif not link.is_broken:
            # Best effort: a full ring only means that the answer is computed for nobody.
            link.submissions.push(
                pending.request_id, 0, 0, 0, 0, 0, _shm.CANCEL, pending.route.slot, 0
            )

    def _push(self, pending: Pending) -> None:
        """Send to a worker; with no worker, hold until one comes or the time is over."""
        slot = pending.route.slot
        full = [
            key
            for key, link in self.links.items()
            if link.is_broken or len(link.lent) * 2 >= link.slots
        ]
        key = self._router.choose(slot, short_queue(pending.route.max_batch_size), full)
        if key is None or key in full:
            if self.links and len(full) == len(self.links) and not self._has_broken():
                self._fail(pending, Overloaded("every worker's ring is full", retry_after_s=1))
            elif len(self._held) >= HELD_REQUESTS_MAX:
                self._fail(pending, Overloaded("no worker is ready", retry_after_s=1))
            else:
                self._held[pending.request_id] = pending
            return
        link = self.links[key]
        position = link.submissions.tail()
        # Recorded as lent before it can be seen: there is no instant at which a block is nobody's.
        pending.link = link
        link.lent[pending.request_id] = pending
        link.positions[pending.request_id] = position
        self._router.on_submit(key, slot)
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
        if not pushed:
            self._take_back(link, pending)
            self._fail(pending, Overloaded("the worker's ring is full", retry_after_s=1))
        elif link.submissions.must_wake():
            os.eventfd_write(link.bell, 1)

    def _has_broken(self) -> bool:
        return any(link.is_broken for link in self.links.values())

    def _take_back(self, link: Link, pending: Pending) -> None:
        del link.lent[pending.request_id]
        del link.positions[pending.request_id]
        self._router.on_done(link.key, pending.route.slot)
        pending.link = None

    def expire(self, now_ns: int) -> None:
        """Answer what is out of time; blocks that are lent stay so until the completion."""
        for item in self._deadlines.expire(now_ns):
            assert isinstance(item, Pending)
            reply, item.reply = item.reply, None
            if item.link is None:
                self._release(item)
            if reply is not None:
                self._count_done(item, False, 0, 0, 1)
                self.errors += 1
                name = item.route.name
                reply.fail(DeadlineExceeded(f"model '{name}': no answer within the request's time"))

    # --- completions ----------------------------------------------------------------------------
    def drain(self) -> None:
        """Take every completion that is there."""
        for link in list(self.links.values()):
            if link.is_broken:
                continue
            try:
                self._drain_link(link)
            except (_shm.RingCorrupt, ProtocolError):
                # Never go on with a ring that lied once.  What is lent there stays lent until the
                # supervisor has reaped the worker.
                log.exception("a worker broke the rules of its ring; it gets no more requests")
                link.is_broken = True

    def _drain_link(self, link: Link) -> None:
        while completions := link.completions.pop(256):
            for completion in completions:
                pending = link.lent.get(completion[0])
                if pending is None:
                    self.late += 1
                    continue
                self._take_back(link, pending)
                self._complete(pending, completion)

    def _complete(self, pending: Pending, completion: _shm.Completion) -> None:
        _, taken_ns, started_ns, finished_ns, length, status, batch, detail = completion
        if pending.reply is None:
            self.late += 1
            self._release(pending)
            return
        if length > pending.out_capacity:
            self._fail(pending, ProtocolError("a worker's answer is longer than its block"))
            raise ProtocolError(f"a worker answered {length} bytes into {pending.out_capacity}")
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
            reply = pending.reply
            self._release(pending)
            reply.succeed(Result(places, data))
        elif (
            status == _shm.TOO_LARGE and detail <= BLOCK_BYTES_MAX and pending.regrown < REGROWS_MAX
        ):
            pending.regrown += 1
            self._hints[pending.route.slot] = detail
            block = self.egress.try_reserve(detail)
            if block is None:
                self._fail(pending, Overloaded("payload memory is full", retry_after_s=1))
                return
            self.egress.release(pending.out_offset)
            pending.out_offset, pending.out_capacity = block
            self._push(pending)
        else:
            self._fail(
                pending, self._error(name, status, bytes(view).decode(errors="replace"), detail)
            )

    def _error(self, name: str, status: int, text: str, detail: int) -> OvercommitError:
        if status == _shm.EXPIRED:
            return DeadlineExceeded(f"model '{name}': the request's time was over in the queue")
        if status == _shm.OVERLOADED:
            return Overloaded(f"model '{name}': its queue is full; try again", retry_after_s=1)
        if status == _shm.NOT_RESIDENT:
            code, _, message = text.partition("\n")
            kind = {c.code: c for c in OvercommitError.__subclasses__()}.get(code, Unavailable)
            return kind(message, retry_after_s=detail / 1000 if detail else None)
        if status == _shm.BAD_REQUEST:
            return BadRequest(f"model '{name}': {text}")
        if status == _shm.TOO_LARGE:
            return PayloadTooLarge(f"model '{name}': the answer needs {detail} bytes")
        return ModelError(f"model '{name}': {text}")

    def _fail(self, pending: Pending, error: OvercommitError) -> None:
        self.errors += 1
        self._count_done(pending, False, 0, 0, 1)
        reply = pending.reply
        self._release(pending)
        if reply is not None:
            reply.fail(error)

    def _count_done(self, pending: Pending, ok: bool, queue: int, compute: int, batch: int) -> None:
        row = self._counters.setdefault(pending.route.slot, [0] * 6)
        row[0 if ok else 1] += 1
        row[2] += queue
        row[3] += compute
        row[4] += time.monotonic_ns() - pending.began_ns
        row[5] += 1000 // max(1, batch)

    def _release(self, pending: Pending) -> None:
        """Give both blocks back: nobody else can write to them any more."""
        pending.reply = None
        self._deadlines.remove(pending)
        self._held.pop(pending.request_id, None)
        del self.pending[pending.request_id]
        self.ingress.release(pending.in_offset)
        self.egress.release(pending.out_offset)

    def check(self) -> None:
        """Assert that every block belongs to exactly one request."""
        assert self.ingress.blocks_used == len(self.pending) == self.egress.blocks_used

    def model_counters(self, limit: int) -> tuple[ModelCounters, ...]:
        """Totals per version, of those with the most requests."""
        rows = list(self._counters.items())
        if len(rows) > limit:
            rows = heapq.nlargest(limit, rows, key=lambda item: item[1][0] + item[1][1])
        return tuple(
            ModelCounters(
                slot=slot,
                success=row[0],
                failure=row[1],
                queue_ns=row[2],
                compute_ns=row[3],
                request_ns=row[4],
                batches=row[5],
            )
            for slot, row in rows
        )
