"""Versions on their way out: replaced, removed or unloaded, and still answering what came before that.

    (in service) --[add]--> LEAVING --no worker uses it, and its grace is over [step]--> ASKED
    ASKED --a front end needs it [on_used]--> LEAVING
    ASKED --none does [on_used, on_front_end_gone]--> ended, released: (gone)
    LEAVING | ASKED --no request can be so old [step]--> ended; LEAVING as before, but nobody is served

What workers say in shared memory is not enough: they do not see what lies in their rings while a batch
runs, nor what a front end still receives, holds, or sends again because a worker died.

Invariants
 1. Front ends were told that the route is gone before they are asked about its slot, and messages keep
    their order: who does not need it then never sends another request for it.
 2. Nothing is ended while somebody uses it, but for `limit_ns` after it began to leave.
 3. A slot is released when nobody uses it, ended or not; each is ended once, before that.
 4. One question is on its way.  A front end that does not answer needs all that it was asked about.

Pure.  Called by the catalogue and, with answers, by the supervisor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

from overcommit.runtime.config import CONTROL_MESSAGE_BYTES_MAX, RETIRE_GRACE_S
from overcommit.runtime.front_end_messages import AskUsed, Used
from overcommit.runtime.residents import Usage

ASK_NS: Final = 100_000_000  # from one answer to the next question
ASKED_MAX: Final = CONTROL_MESSAGE_BYTES_MAX // 2 // 5  # slots in one message, 5 bytes each at most


class Front(Protocol):
    """A front end that can be asked."""

    @property
    def incarnation(self) -> tuple[int, int]:
        """Which one it is."""
        ...

    def post(self, message: AskUsed) -> None:
        """Send it."""
        ...


@dataclass(slots=True, eq=False)
class _Leaver:
    not_before_ns: int
    until_ns: int
    is_ended: bool = False


@dataclass(slots=True)
class _Question:
    number: int
    leavers: dict[int, _Leaver]  # by slot, as they were when it was asked
    missing: set[tuple[int, int]]
    used: set[int] = field(default_factory=set)


class Departures:
    """Who leaves, until nobody uses it."""

    def __init__(
        self,
        limit_ns: int,
        usage: Callable[[int], Usage],
        fronts: Callable[[], Iterable[Front]],
        end: Callable[[int, bool, int], None],
        release: Callable[[int], None],
    ) -> None:
        """`end(slot, is_late, now_ns)` takes it out of memory, `release(slot)` frees the slot.

        `fronts` are those that may have requests.  `limit_ns` is what no request outlives.
        """
        self._limit_ns = limit_ns
        self._usage = usage
        self._fronts = fronts
        self._end = end
        self._release = release
        self._leaving: dict[int, _Leaver] = {}
        self._question: _Question | None = None
        self._asked = 0
        self._next_ns = 0

    def __len__(self) -> int:
        return len(self._leaving)

    def add(self, slot: int, now_ns: int) -> None:
        """No route leads to it any more, and front ends have been told so."""
        grace_ns = now_ns + int(RETIRE_GRACE_S * 1e9)
        self._leaving[slot] = _Leaver(grace_ns, grace_ns + self._limit_ns)

    def step(self, now_ns: int) -> None:
        """End what has had its time; ask about what seems to be used by nobody."""
        for slot, leaver in self._leaving.items():
            if now_ns >= leaver.until_ns and not leaver.is_ended:
                leaver.is_ended = True
                self._end(slot, True, now_ns)
        if self._question is not None or now_ns < self._next_ns:
            return
        quiet = {
            slot: leaver
            for slot, leaver in self._leaving.items()
            if now_ns >= leaver.not_before_ns and self._is_quiet(slot)
        }
        if not quiet:
            return
        if len(quiet) > ASKED_MAX:
            quiet = dict(list(quiet.items())[:ASKED_MAX])
        fronts = list(self._fronts())
        self._asked += 1
        missing = {front.incarnation for front in fronts}
        self._question = question = _Question(self._asked, quiet, missing)
        for front in fronts:
            front.post(AskUsed(id=question.number, slots=tuple(quiet)))
        self._settle(question, now_ns)

    def _is_quiet(self, slot: int) -> bool:
        usage = self._usage(slot)
        return not usage.waiting and not usage.leases

    def on_used(self, front: Front, message: Used, now_ns: int) -> None:
        """A front end says which of the slots it still needs."""
        question = self._question
        if question is not None and question.number == message.id:
            question.used.update(message.slots)
            question.missing.discard(front.incarnation)
            self._settle(question, now_ns)

    def on_front_end_gone(self, front: Front, now_ns: int) -> None:
        """It is dead, and its requests with it."""
        question = self._question
        if question is not None:
            question.missing.discard(front.incarnation)
            self._settle(question, now_ns)

    def _settle(self, question: _Question, now_ns: int) -> None:
        if question.missing:
            return
        self._question = None
        for slot, leaver in question.leavers.items():
            if slot in question.used or not self._is_quiet(slot):
                self._leaving[slot] = self._leaving.pop(slot)  # others are asked about first
                self._next_ns = now_ns + ASK_NS
                continue
            del self._leaving[slot]
            if not leaver.is_ended:
                self._end(slot, False, now_ns)
            self._release(slot)
