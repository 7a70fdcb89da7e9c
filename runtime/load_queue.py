"""Whose turn it is: the loads under way, foreground before prefetch, and in turns among equals.

Invariants
 1. A prefetch load reads only while no foreground load has reads running or to come, and copies only
    while no foreground load has a copy to take.  So a foreground load waits for what is in flight:
    PREFETCH_READS_IN_FLIGHT pieces on the disk, one piece per thread that copies.
 2. Among loads of one urgency steps are taken in turn, and a step is bounded: none starves another.
 3. A load leaves when it is over, and then only.

Pure but for the loads' own clock; not thread-safe.  Called by the mover, under its lock.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Final

from overcommit.runtime.loading import LoadState, Outcome, Step
from overcommit.runtime.mover_messages import Urgency

Taken = tuple[LoadState, Step]
_URGENCIES: Final[tuple[Urgency, ...]] = ("foreground", "prefetch")


class LoadQueue:
    """The loads under way."""

    def __init__(self) -> None:
        self._rounds: dict[Urgency, collections.deque[LoadState]] = {
            urgency: collections.deque() for urgency in _URGENCIES
        }
        self._by_job: dict[int, LoadState] = {}

    def __len__(self) -> int:
        return len(self._by_job)

    def add(self, state: LoadState) -> None:
        """A load joins at the end of its round."""
        self._by_job[state.load.job] = state
        self._rounds[state.urgency].append(state)

    def try_take_read(self) -> Taken | None:
        """Take a step that reads the disk; None when no load has one to take now."""
        taken = self._take("foreground", LoadState.take_read)
        if taken is None and self.may_prefetch_read:
            taken = self._take("prefetch", LoadState.take_read)
        return taken

    @property
    def may_prefetch_read(self) -> bool:
        """Whether prefetch loads may have the disk, if there are any."""
        if not self._rounds["prefetch"]:
            return False
        return not any(state.wants_disk for state in self._rounds["foreground"])

    def try_take_copy(self) -> Taken | None:
        """Take a step that needs no disk; None when no load has one to take now."""
        for urgency in _URGENCIES:
            if (taken := self._take(urgency, LoadState.take_copy)) is not None:
                return taken
        return None

    def _take(self, urgency: Urgency, take: Callable[[LoadState], Step | None]) -> Taken | None:
        round_ = self._rounds[urgency]
        for _ in range(len(round_)):
            state = round_[0]
            round_.rotate(-1)
            if (step := take(state)) is not None:
                return state, step
        return None

    def finish(self, state: LoadState, step: Step, outcome: Outcome) -> bool:
        """A step of this load ended; True when the whole load has, and has left."""
        if state.finish(step, outcome):
            self._leave(state)
        return state.is_over

    def cancel(self, job: int) -> LoadState | None:
        """Stop a load; return it if that was its end.  One that is not here is over already."""
        state = self._by_job.get(job)
        if state is None or not state.cancel():
            return None
        self._leave(state)
        return state

    def promote(self, job: int) -> None:
        """Requests wait for this load now."""
        state = self._by_job.get(job)
        if state is not None and state.urgency == "prefetch":
            self._rounds["prefetch"].remove(state)
            state.urgency = "foreground"
            self._rounds["foreground"].append(state)

    def _leave(self, state: LoadState) -> None:
        self._rounds[state.urgency].remove(state)
        del self._by_job[state.load.job]
