"""A worker's side of its links: the rings and the payload memory of every front end.

Owns per link the two ring ends, the mappings of the front end's ingress (read-only) and egress
memory, what registers them with a GPU (`payload_pins`), and the front end's doorbell.

Invariants
 1. Whatever a front end wrote is checked on a private copy before it is used: the ring's counters
    and sequence by the ring, ids, kinds and bounds here.
 2. A link that lied once is dropped and never read or written again; other links go on.
 3. Every submission that `pop` returned as a job is completed at most once, on its own link.
 4. A doorbell is rung at most once per `ring_bells`, and only when its front end sleeps.

Called by the worker's loop and its runner.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import time
from typing import TYPE_CHECKING, Any, Final

from overcommit.runtime import _shm
from overcommit.runtime.config import NEVER_NS, POP_MAX
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.lanes import LEVEL_SHIFT, RUN_ALONE, Job
from overcommit.runtime.messages import LinkUp

if TYPE_CHECKING:
    from overcommit.runtime.payload_pins import PayloadPins

log = logging.getLogger("overcommit.worker")


Near = tuple[list[Any], ...]  # each by slot
_SLOT_COLUMN: Final = 8  # of a submission


def link_key(seat: int, epoch: int) -> int:
    """Name a front-end incarnation: the upper 24 bits of all its request ids."""
    return seat << 16 | (epoch & 0xFFFF)


class Link:
    """One front-end incarnation.  Takes over the descriptors of its `LinkUp`."""

    def __init__(
        self, message: LinkUp, fds: dict[str, int], epoch: int, pins: PayloadPins | None = None
    ) -> None:
        self.key = link_key(message.seat, message.epoch)
        self.payload_bytes = message.payload_bytes
        self.bell = fds["peer_doorbell"]
        try:
            link_bytes = message.completion_offset + _shm.ring_bytes(message.slot_count)
            self._memory = mmap.mmap(fds["link"], link_bytes)
            protection = mmap.PROT_READ if pins is None else pins.protection
            self._in = mmap.mmap(fds["ingress"], self.payload_bytes, prot=protection)
            self._out = mmap.mmap(fds["egress"], self.payload_bytes)
        finally:
            for name in ("link", "ingress", "egress"):
                os.close(fds[name])  # a mapping does not need its descriptor
        self.ingress = memoryview(self._in)
        self.egress = memoryview(self._out)
        # A GPU's way to both; None where there is none.
        self.pin = None if pins is None else pins.pin(self.ingress, self.egress)
        self.submissions = _shm.SubmissionRing(self._memory, 0, False, message.epoch, epoch)
        self.completions = _shm.CompletionRing(
            self._memory, message.completion_offset, True, epoch, message.epoch
        )

    def pop(self, now_ns: int, near: Near = ()) -> tuple[list[Job], list[int]]:
        """Take up to POP_MAX submissions: the jobs, and the ids to cancel.

        What `near` holds in their slots is fetched into the cache meanwhile.

        Raises ProtocolError, and then nothing of the link may be used any more.
        """
        try:
            popped = self.submissions.pop(POP_MAX)
        except _shm.RingCorrupt as error:
            raise ProtocolError(f"its submission ring is corrupt: {error}") from error
        if len(popped) > 1:
            _shm.prefetch(popped, _SLOT_COLUMN, near)
        jobs: list[Job] = []
        cancelled: list[int] = []
        limit = self.payload_bytes
        for request_id, deadline_ns, _, in_offset, out_offset, *rest in popped:
            in_length, out_capacity, kind, slot, flags = rest
            if request_id >> 40 != self.key:
                raise ProtocolError(f"request id {request_id:#x} is not its own")
            if kind == _shm.CANCEL:
                cancelled.append(request_id)
                continue
            if kind != _shm.SUBMIT:
                raise ProtocolError(f"a submission is of kind {kind}")
            if in_offset + in_length > limit or out_offset + out_capacity > limit:
                raise ProtocolError(f"a block of request {request_id:#x} is outside its memory")
            job = Job(
                *(request_id, slot, self.key, deadline_ns or NEVER_NS, now_ns),
                *(in_offset, in_length, out_offset, out_capacity),
            )
            if flags:
                job.alone = bool(flags & RUN_ALONE)
                job.level = flags >> LEVEL_SHIFT
            jobs.append(job)
        return jobs, cancelled

    def close(self) -> None:
        """Unmap everything and close the doorbell.  No device works on its memory any more."""
        if self.pin is not None:
            self.pin.close()
        self.ingress.release()
        self.egress.release()
        del self.submissions, self.completions  # they hold the mapping
        for mapping in (self._memory, self._in, self._out):
            # A view may live on, in the traceback of what broke the link: it goes with the last.
            with contextlib.suppress(BufferError):
                mapping.close()
        os.close(self.bell)


class Links:
    """All links of a worker."""

    def __init__(self, epoch: int, pins: PayloadPins | None = None) -> None:
        self._epoch = epoch
        self._pins = pins
        self._links: dict[int, Link] = {}
        self._touched: set[int] = set()
        self.broken: list[int] = []  # lied while being answered; the loop drops them
        self.rings: tuple[_shm.SubmissionRing, ...] = ()  # to arm and to spin on

    def __len__(self) -> int:
        return len(self._links)

    def add(self, message: LinkUp, fds: dict[str, int]) -> None:
        """Take up a link; one that is not what it says is left alone and logged."""
        try:
            link = Link(message, fds, self._epoch, self._pins)
        except (OSError, ValueError, _shm.RingCorrupt):
            log.exception("the link with front end %d cannot be used", message.seat)
            os.close(fds["peer_doorbell"])
            return
        if link.key in self._links:
            self.drop(link.key)
        self._links[link.key] = link
        self.rings = tuple(link.submissions for link in self._links.values())

    def drop(self, key: int) -> bool:
        """Let go of a link; False when there is none.  Its jobs are the caller's to drop."""
        link = self._links.pop(key, None)
        self._touched.discard(key)
        self.rings = tuple(link.submissions for link in self._links.values())
        if link is None:
            return False
        link.close()
        return True

    def all(self) -> tuple[Link, ...]:
        """The links there are now; safe to drop some while looking at them."""
        return tuple(self._links.values())

    def of(self, job: Job) -> Link:
        """The link that a job came from."""
        return self._links[job.link]

    # --- answers --------------------------------------------------------------------------------
    def complete(
        self,
        job: Job,
        status: int,
        times_ns: tuple[int, int],
        out_length: int = 0,
        batch_size: int = 0,
        detail: int = 0,
    ) -> None:
        """Push the completion of a job; `times_ns` is when its batch started and finished.

        The ring is as long as the front end may have requests outstanding, so it is full only when
        the front end broke that rule: its link is then given up.
        """
        link = self._links.get(job.link)
        if link is None or job.link in self.broken:
            return
        started_ns, finished_ns = times_ns
        if not link.completions.push(
            job.request_id,
            job.taken_ns,
            started_ns,
            finished_ns,
            out_length,
            status,
            batch_size,
            detail,
        ):
            log.error("link %#x: its completion ring is full", job.link)
            self.broken.append(job.link)
            return
        self._touched.add(job.link)

    def fail(self, job: Job, status: int, text: str, *, detail: int = 0) -> None:
        """Complete a job that gave no result; the text is cut to what its egress block holds."""
        link = self._links.get(job.link)
        if link is None:
            return
        data = text.encode()
        if len(data) > job.out_capacity:
            data = data[: job.out_capacity].decode(errors="ignore").encode()
        link.egress[job.out_offset : job.out_offset + len(data)] = data
        now_ns = time.monotonic_ns()
        self.complete(job, status, (now_ns, now_ns), out_length=len(data), detail=detail)

    def ring_bells(self) -> None:
        """Wake every front end that was answered and sleeps."""
        for key in self._touched:
            link = self._links[key]
            if link.completions.must_wake():
                os.eventfd_write(link.bell, 1)
        self._touched.clear()
