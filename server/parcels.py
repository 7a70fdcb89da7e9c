"""The payload memory of a front end, a pair of blocks for each request.

A request needs an ingress and an egress block.  Most fit the smallest: these pairs stay together
when their request is answered, with the `Pending` that describes them, and wait for the next one.
What was written there last is known, so a header that would be the same is not written again.

Invariants
 1. Every reserved block belongs to one `Pending`, which is in use or idle, never both.
 2. An idle pair is of two smallest blocks; idle pairs are given back before memory is called full.
 3. `header` is what stands at the start of the ingress block: workers cannot write there.

Called by the dispatch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from overcommit.runtime.blocks import BlockArena
from overcommit.runtime.config import BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, NEVER_NS
from overcommit.runtime.errors import OvercommitError, Overloaded, PayloadTooLarge
from overcommit.runtime.front_end_messages import Route
from overcommit.server.limits import HINT_FADES, HINT_SHARE, IDLE_BLOCKS_MAX, POPULATE_STEP_BYTES
from overcommit.server.plans import InputPlan
from overcommit.server.worker_link import WorkerLink


def populate(ingress: mmap.mmap) -> None:
    """Touch the pages before requests do: a fresh page costs ten times a warm one."""
    # An old kernel refuses, and short memory shows later, where it can be answered.
    with contextlib.suppress(OSError, ValueError):
        for start in range(0, len(ingress), POPULATE_STEP_BYTES):
            ingress.madvise(23, start, min(POPULATE_STEP_BYTES, len(ingress) - start))


class Reply(Protocol):
    """Who waits for an answer; exactly one of the two is called, once."""

    def succeed(self, view: memoryview) -> None:
        """The model answered: its block, which is somebody else's after the call."""

    def fail(self, error: OvercommitError) -> None:
        """There will be no answer."""


@dataclass(slots=True, eq=False)
class Pending:
    """One request, from `open` to `close`, and its blocks.  `reply` None: answered."""

    request_id: int
    route: Route
    in_offset: int
    in_length: int
    out_offset: int
    out_capacity: int
    reply: Reply | None
    began_ns: int
    deadline_ns: int = NEVER_NS  # until it is sent
    link: WorkerLink | None = None
    position: int = 0  # in the link's submission ring
    retries: int = 0
    regrown: int = 0
    flags: int = 0
    is_small: bool = False  # both blocks are of the smallest size
    header: bytes = b""  # that stands in the ingress block


class Parcels:
    """Both arenas, and who has which block."""

    def __init__(self, ingress: mmap.mmap, egress: mmap.mmap) -> None:
        self._in_view, self._out_view = memoryview(ingress), memoryview(egress)
        self.ingress, self.egress = BlockArena(len(self._in_view)), BlockArena(len(self._out_view))
        self._idle: list[Pending] = []
        self.hints: dict[int, int] = {}  # slot -> bytes that its next answers may need

    def open(
        self, request_id: int, route: Route, plan: InputPlan, reply: Reply, now_ns: int
    ) -> Pending:
        """Reserve the blocks of a request and write its header.

        Raises PayloadTooLarge, and Overloaded when memory is full.
        """
        nbytes, guess = plan.nbytes, plan.out_bytes
        if self.hints:
            guess = max(guess, self._expected(route.slot))
        if self._idle and nbytes <= BLOCK_BYTES_MIN and guess <= BLOCK_BYTES_MIN:
            pending = self._idle.pop()
            pending.request_id, pending.route, pending.in_length = request_id, route, nbytes
            pending.reply, pending.began_ns, pending.deadline_ns = reply, now_ns, NEVER_NS
            pending.retries = pending.regrown = pending.flags = 0
        else:
            (at, _), (out_at, capacity) = self._reserve(route, nbytes, guess)
            pending = Pending(request_id, route, at, nbytes, out_at, capacity, reply, now_ns)
            pending.is_small = nbytes <= BLOCK_BYTES_MIN and capacity == BLOCK_BYTES_MIN
        header = plan.header
        if pending.header is not header:
            at = pending.in_offset
            self._in_view[at : at + len(header)] = header
            pending.header = header
        return pending

    def _reserve(
        self, route: Route, in_bytes: int, out_bytes: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        if in_bytes > BLOCK_BYTES_MAX:
            raise PayloadTooLarge(
                f"model '{route.name}': the tensors need {in_bytes} bytes, the limit is "
                f"{BLOCK_BYTES_MAX}; send fewer rows"
            )
        out_bytes = min(max(out_bytes, BLOCK_BYTES_MIN), BLOCK_BYTES_MAX)
        for _ in range(2):
            block = self.ingress.try_reserve(in_bytes)
            out = self.egress.try_reserve(out_bytes)
            if block is not None and out is not None:
                return block, out
            if block is not None:
                self.ingress.release(block[0])
            if out is not None:
                self.egress.release(out[0])
            self._release_idle()
        raise Overloaded(
            f"model '{route.name}': payload memory is full; try again, or raise --payload-memory",
            retry_after_s=1,
        )

    def _release_idle(self) -> None:
        for pending in self._idle:
            self._give_back(pending)
        self._idle.clear()

    def fill(self, pending: Pending, plan: InputPlan, data: Sequence[bytes | memoryview]) -> None:
        """Copy the tensors of an open request in."""
        view, at = self._in_view, pending.in_offset
        for place, each in zip(plan.places, data, strict=True):
            start = at + place.offset
            view[start : start + place.nbytes] = each

    def space(self, pending: Pending, plan: InputPlan) -> list[memoryview]:
        """Where the tensors of an open request go, for somebody who receives them there."""
        at = pending.in_offset
        return [
            self._in_view[at + place.offset : at + place.offset + place.nbytes]
            for place in plan.places
        ]

    def request(self, pending: Pending) -> memoryview:
        """The ingress block, as far as it is used."""
        return self._in_view[pending.in_offset : pending.in_offset + pending.in_length]

    def answer(self, pending: Pending, length: int) -> memoryview:
        """The first bytes of the egress block."""
        return self._out_view[pending.out_offset : pending.out_offset + length]

    def try_regrow(self, pending: Pending, nbytes: int) -> bool:
        """Exchange the egress block for one of this size; False when memory is full."""
        pending.regrown += 1
        self.hints[pending.route.slot] = nbytes
        block = self.egress.try_reserve(nbytes)
        if block is None:
            return False
        self.egress.release(pending.out_offset)
        pending.out_offset, pending.out_capacity = block
        pending.is_small = False
        return True

    def try_exchange(self, pending: Pending, request_id: int) -> Pending | None:
        """Give a request other blocks of the same size and content, and another id; None: memory is full.

        Return who has its former ones, under its former id and without a reply: a worker still has them.
        """
        try:
            (at, _), (out_at, capacity) = self._reserve(
                pending.route, pending.in_length, pending.out_capacity
            )
        except Overloaded:
            return None
        former = dataclasses.replace(pending, reply=None, deadline_ns=NEVER_NS)
        view, length = self._in_view, pending.in_length
        view[at : at + length] = view[pending.in_offset : pending.in_offset + length]
        pending.request_id, pending.link = request_id, None
        pending.in_offset, pending.out_offset, pending.out_capacity = at, out_at, capacity
        pending.is_small = length <= BLOCK_BYTES_MIN and capacity == BLOCK_BYTES_MIN
        return former

    def _expected(self, slot: int) -> int:
        """Return what an answer may need by the last ones: a guess that takes no other's room."""
        hint = self.hints.get(slot, 0)
        total = len(self._out_view)
        return hint if self.egress.used_bytes + hint <= HINT_SHARE * total else 0

    def learn(self, pending: Pending, length: int) -> None:
        """An answer had so many bytes: what the next ones are expected to need fades towards that."""
        slot = pending.route.slot
        hint = self.hints.get(slot)
        if hint is not None and length < hint:
            hint -= (hint - length) // HINT_FADES
            if hint <= BLOCK_BYTES_MIN:
                del self.hints[slot]
            else:
                self.hints[slot] = hint

    def close(self, pending: Pending) -> None:
        """The request is over, and nobody else can write to its blocks any more."""
        pending.reply = None
        if pending.is_small and len(self._idle) < IDLE_BLOCKS_MAX:
            self._idle.append(pending)
        else:
            self._give_back(pending)

    def _give_back(self, pending: Pending) -> None:
        self.ingress.release(pending.in_offset)
        self.egress.release(pending.out_offset)

    @property
    def blocks_used(self) -> int:
        """Blocks of requests; those of idle pairs are free for all but other sizes."""
        return self.ingress.blocks_used + self.egress.blocks_used - 2 * len(self._idle)

    def check(self, requests: int) -> None:
        """Assert that every block belongs to one of so many requests, or to an idle pair."""
        pairs = requests + len(self._idle)
        assert self.ingress.blocks_used == pairs == self.egress.blocks_used
