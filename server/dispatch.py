"""Requests in flight: blocks lent to workers, submissions pushed, completions taken, workers lost.

A request's blocks:

    FREE -[open]-> FILLING -[send]-> LENT -[completion, copied out]-> FREE
    FILLING -[abandon, deadline]-> FREE
    LENT -[abandon, deadline, detour]-> ABANDONED -[late completion, link down]-> FREE

A request that no worker can take at the moment is HELD (`held.py`): filled, lent to nobody.

Invariants
 1. A request gets exactly one answer through its reply; what comes later is dropped and counted.
 2. A block is given back only by a completion on its own link, or when that link's worker is reaped.
 3. A request that was in a dead worker's batch is tried once more, alone; one that was only queued
    moves on without that counting.  One of a sequence goes on only where its START does.
 4. One that waits at an occupied worker (`detours`) leaves its blocks there, abandoned, and goes to
    another in new ones: whichever answer comes for the former is late.
 5. While requests are held, no worker's link leaves `_avoid`: whoever comes later finds them first.
"""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Callable, Mapping
from typing import Final

from overcommit.runtime import _shm
from overcommit.runtime.config import BLOCK_BYTES_MAX, NEVER_NS, RETRIES_MAX
from overcommit.runtime.errors import OvercommitError, ProtocolError, WorkerLost
from overcommit.runtime.front_end_messages import Route, SeatNews
from overcommit.runtime.lanes import LEVEL_SHIFT, RUN_ALONE
from overcommit.runtime.messages import LinkUp
from overcommit.runtime.router import Router, short_queue
from overcommit.server import failures, sequences
from overcommit.server.detours import Detours
from overcommit.server.held import Held, Where
from overcommit.server.limits import REGROWS_MAX, WAKE_REQUESTS
from overcommit.server.parcels import Parcels, Pending, Reply
from overcommit.server.plans import InputPlan
from overcommit.server.sequences import Tracks
from overcommit.server.tallies import Tallies
from overcommit.server.worker_link import WorkerLink, link_key

log = logging.getLogger("overcommit.dispatch")

_COUNT_MASK: Final = (1 << 40) - 1


class Dispatch:
    """All requests in flight of one front-end incarnation."""

    def __init__(
        self,
        seat: int,
        epoch: int,
        ingress: mmap.mmap,
        egress: mmap.mmap,
        call_soon: Callable[[Callable[[], None]], object],
        seats: int = 1,
    ) -> None:
        """`seats`: of a site's workers, whether somebody sits there or not."""
        self._call_soon = call_soon
        self._to_wake: set[WorkerLink] = set()
        self._unheard = 0  # requests pushed since the last wake-up
        self._base = seat << 56 | epoch << 40
        self._epoch = epoch
        self._count = 0
        self.parcels = Parcels(ingress, egress)
        self.links: dict[int, WorkerLink] = {}
        self._router = Router()
        self._avoid: set[int] = set()  # links that are crowded, or broken
        self.tracks = Tracks(seats, self._router.home_site)
        self.pending: dict[int, Pending] = {}
        self._held = Held()
        self._detours = Detours(self.parcels, self._next_id)
        self.requests = self.errors = self.late = self.retried = 0
        self.tallies = Tallies()
        # Somebody may end a worker that lied: it was not only to us that it could.
        self.on_broken: Callable[[int], None] = lambda key: None

    # --- links ----------------------------------------------------------------------------------
    def rings(self) -> list[_shm.CompletionRing]:
        """Completion rings to arm."""
        return [link.completions for link in self.links.values() if not link.is_broken]

    def link_up(self, message: LinkUp, fds: dict[str, int]) -> None:
        """A worker is there: use it, and send it what was held."""
        link = WorkerLink.take(message, fds, self._epoch)
        self.links[link.key] = link
        self._router.add(link.key, message.site)
        self._push_held()

    def spread(self, homes: Mapping[int, tuple[int, ...]]) -> None:
        """These versions, by slot, are served by other sites than before."""
        self._router.spread(homes)
        self._push_held()

    def hear(self, news: SeatNews) -> None:
        """Seats are broken: others have their sequences.  Workers are occupied: others are asked."""
        self.tracks.broken = frozenset(news.broken)
        self._router.occupy({link_key(each.seat, each.epoch): each.slot for each in news.occupied})
        for pending in self._detours.take_out(self.links, self.pending, self._router.among):
            self._push(pending)
        self._push_held()

    def _next_id(self) -> int:
        self._count = (self._count + 1) & _COUNT_MASK
        return self._base | self._count

    def _push_held(self) -> None:
        for pending in self._held.take_all():
            self._push(pending)

    def link_down(self, seat: int, epoch: int) -> None:
        """A worker is dead and reaped: settle what it held."""
        key = link_key(seat, epoch)
        link = self.links.get(key)
        if link is None:
            return
        if not link.is_broken:
            self._drain_or_break(link)  # what it answered before it died is good
        del self.links[key]
        self._router.remove(key)
        self._avoid.discard(key)
        os.close(link.bell)
        batch = link.batch()
        head = link.submissions.head()
        mine = [each for each in self.pending.values() if each.link is link]
        lost = sequences.lost_with(self.parcels, mine, head)
        for pending in mine:
            pending.link = None
            if pending.reply is None:
                self._release(pending)
            elif pending.request_id in lost:
                self._fail(pending, lost[pending.request_id])
            elif pending.position >= head or not batch.may_have(pending.request_id):
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
    def open(self, route: Route, plan: InputPlan, reply: Reply, now_ns: int) -> Pending:
        """Reserve the blocks of a request and write its header.

        Raises PayloadTooLarge and Overloaded before anything is reserved; later errors go to
        `reply`.
        """
        self._count = (self._count + 1) & _COUNT_MASK
        request_id = self._base | self._count
        pending = self.parcels.open(request_id, route, plan, reply, now_ns)
        self.pending[request_id] = pending
        self.requests += 1
        return pending

    def send(self, pending: Pending, deadline_ns: int) -> None:
        """Send a filled request to a worker."""
        pending.deadline_ns = deadline_ns
        self._push(pending)

    @staticmethod
    def urge(pending: Pending, level: int) -> None:
        """Say of an open request how urgent it is."""
        pending.flags |= level << LEVEL_SHIFT

    def abandon(self, pending: Pending) -> None:
        """The client is gone; the blocks come back with the completion."""
        if pending.reply is None:
            return
        pending.reply = None
        link = pending.link
        if link is None:
            self._release(pending)
        elif not link.is_broken:
            link.cancel(pending.request_id, pending.route.slot)

    def _push(self, pending: Pending, key: int | None = None) -> None:
        """Send to a worker, to this one if it is given; what none can take is held."""
        route = pending.route
        slot = route.slot
        if key is None:
            if route.sequence:
                key = self._seat(pending)[1]
            else:
                key = self._router.only
                if key is None:
                    key = self._router.choose(slot, short_queue(route.max_batch_size), self._avoid)
            if key is None or key in self._avoid:
                key = None if self._where(pending) in self._held else self._find_room(pending)
                if key is None:
                    self._hold(pending)
                    return
        link = self.links[key]
        # Recorded as lent before it can be seen: there is no instant at which a block is nobody's.
        pending.link = link
        pending.position = link.submissions.tail()
        link.lent += 1
        if link.lent >= link.crowded:
            self._avoid.add(key)
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
            self._take_back(link, pending)  # it is full of cancels
            self._hold(pending)
            return
        # A wake-up costs a worker as much as a small batch, so requests that come together share
        # one; but it should begin while the rest of them is still being read.
        self._to_wake.add(link)
        self._unheard += 1
        if self._unheard == 1:
            self._call_soon(self._wake)
        elif self._unheard >= WAKE_REQUESTS:
            self._wake()

    def _seat(self, pending: Pending) -> tuple[int, int | None]:
        """The seat whose worker has a sequence, and its link, which may not be there."""
        key = sequences.ask_of(self.parcels, pending).key
        slot = pending.route.slot
        link = self.tracks.link_for(slot, key, self.links)
        return self.tracks.seat_of(slot, key), None if link is None else link.key

    def _where(self, pending: Pending) -> Where:
        route = pending.route
        return route.slot, self._seat(pending)[0] if route.sequence else -1

    def _find_room(self, pending: Pending) -> int | None:
        """The worker that has most room for one more of this version; None: no worker has any."""
        slot = pending.route.slot
        keys = self._router.among(slot)
        if pending.route.sequence:
            key = self._seat(pending)[1]
            keys = () if key is None else (key,)
        lent = self._router.outstanding
        links = [self.links[key] for key in keys if not self.links[key].is_broken]
        roomy = [each for each in links if lent(each.key, slot) < each.lent_max - each.lent]
        return min(roomy, key=lambda each: each.lent).key if roomy else None

    def _hold(self, pending: Pending) -> None:
        slot = pending.route.slot
        lent = sum(self._router.outstanding(key, slot) for key in self.links)
        problem = self._held.add(self._where(pending), pending, lent)
        if problem is not None:
            self._fail(pending, problem)

    def _hand_over(self) -> None:
        """Push what was held and has room now."""
        while self._held and (taken := self._held.take(self._find_room)) is not None:
            self._push(*taken)

    def _wake(self) -> None:
        """Wake the workers that sleep over what was pushed."""
        for link in self._to_wake:
            if link.key in self.links and link.submissions.must_wake():
                os.eventfd_write(link.bell, 1)
        self._to_wake.clear()
        self._unheard = 0

    def _take_back(self, link: WorkerLink, pending: Pending) -> None:
        link.lent -= 1
        if self._avoid and link.lent < link.crowded and not (self._held or link.is_broken):
            self._avoid.discard(link.key)
        self._router.on_done(link.key, pending.route.slot)
        pending.link = None

    def expire(self, now_ns: int) -> None:
        """Answer what is out of time; blocks that are lent stay so until the completion."""
        late = [each for each in self.pending.values() if each.deadline_ns <= now_ns]
        for pending in late:
            self._give_up(pending, failures.too_late(pending.route.name))
        self._hand_over()

    def end(self) -> None:
        """Answer all that is in flight: this process ends before their answers."""
        for pending in list(self.pending.values()):
            self._give_up(pending, failures.stopping(pending.route.name))

    def _give_up(self, pending: Pending, error: OvercommitError) -> None:
        reply, pending.reply = pending.reply, None
        pending.deadline_ns = NEVER_NS
        if pending.link is None:
            self._release(pending)
        if reply is not None:
            self.tallies.count_failure(pending.route.slot, pending.began_ns)
            self.errors += 1
            reply.fail(error)

    # --- completions ----------------------------------------------------------------------------
    def drain(self) -> None:
        """Take every completion that is there."""
        for link in list(self.links.values()):
            if not link.is_broken:
                self._drain_or_break(link)

    def _drain_or_break(self, link: WorkerLink) -> None:
        try:
            self._drain_link(link)
        except (_shm.RingCorrupt, ProtocolError):
            # Never go on with a ring that lied once.  What is lent there stays lent until the
            # supervisor has reaped the worker.
            log.exception("a worker broke the rules of its ring; it gets no more requests")
            link.is_broken = True
            self._avoid.add(link.key)
            self.on_broken(link.key)

    def _drain_link(self, link: WorkerLink) -> None:
        while completions := link.completions.pop(256):
            now_ns = time.monotonic_ns()
            for completion in completions:
                pending = self.pending.get(completion[0])
                if pending is None or pending.link is not link:
                    self.late += 1
                    continue
                self._take_back(link, pending)
                self._complete(pending, completion, now_ns)
        if self._held:
            self._hand_over()

    def _complete(self, pending: Pending, completion: _shm.Completion, now_ns: int) -> None:
        _, taken_ns, started_ns, finished_ns, length, status, batch, detail = completion
        route = pending.route
        if pending.reply is None:
            if detail and status == _shm.OK:
                self.tallies.count_batch(route.slot, finished_ns - started_ns, batch, detail)
            self.late += 1
            self._release(pending)
            return
        if length > pending.out_capacity:
            self._fail(pending, ProtocolError("a worker's answer is longer than its block"))
            raise ProtocolError(f"a worker answered {length} bytes into {pending.out_capacity}")
        view = self.parcels.answer(pending, length)
        if status == _shm.OK:
            if self.parcels.hints:
                self.parcels.learn(pending, length)
            self.tallies.count(
                route.slot,
                now_ns - pending.began_ns,
                started_ns - taken_ns,
                finished_ns - started_ns,
                batch,
                detail,
            )
            reply, pending.reply = pending.reply, None
            try:
                reply.succeed(view)
            except Exception:  # the request boundary: others wait for their completions
                log.exception("an answer of model '%s' could not be given on", route.name)
                reply.fail(failures.internal())
            finally:
                self._release(pending)
        elif (
            status == _shm.TOO_LARGE and detail <= BLOCK_BYTES_MAX and pending.regrown < REGROWS_MAX
        ):
            if not self.parcels.try_regrow(pending, detail):
                self._fail(pending, failures.memory_full(route.name, detail))
                return
            if route.sequence:
                sequences.say_again(self.parcels, pending)
            self._push(pending)
        else:
            text = bytes(view).decode(errors="replace")
            self._fail(pending, failures.error_of(route, status, text, detail))

    def _fail(self, pending: Pending, error: OvercommitError) -> None:
        self.errors += 1
        self.tallies.count_failure(pending.route.slot, pending.began_ns)
        reply = pending.reply
        self._release(pending)
        if reply is not None:
            reply.fail(error)

    def _release(self, pending: Pending) -> None:
        """Give both blocks back: nobody else can write to them any more."""
        if self._held:
            self._held.discard(pending.request_id)
        del self.pending[pending.request_id]
        self.parcels.close(pending)

    def check(self) -> None:
        """Assert that every block belongs to exactly one request, or to an idle pair."""
        self.parcels.check(len(self.pending))
