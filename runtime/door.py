"""Who is refused at a worker's door, because the answer would come after the request's time.

Two waits are foreseen: for the compute of what waits before a request (`backlog.py`), and, where a
version is not resident, for its weights: the supervisor says by when they are there at the earliest
(`Expected`).  A request that cannot be answered in time is answered at once, 503, with the time after
which the same request would be served.

Invariants
 1. Nobody is refused on a guess: where no cost was measured, everybody may wait.
 2. A request that is retried after a worker's death is not refused: it has had its share of bad luck.
 3. While nothing is congested, this costs one comparison a request, in the worker's loop.
 4. Those who are told to come back when weights are there do not all come at once: SPACING_NS apart,
    as long as the place is kept (`wish_queue.GRACE_NS`).

Called by the worker's loop.
"""

from __future__ import annotations

from typing import Final

from overcommit.runtime import _shm, refusals
from overcommit.runtime.backlog import Promises
from overcommit.runtime.batcher import Batcher
from overcommit.runtime.errors import Overloaded
from overcommit.runtime.lanes import Job
from overcommit.runtime.links import Links

SPACING_NS: Final = 250_000  # between those who come back for the same weights
SPREAD_NS: Final = 15_000_000  # all of them come within this


class Door:
    """The judge of new jobs; closed by a setting, it lets everybody in."""

    def __init__(self, batcher: Batcher, links: Links, *, judges: bool) -> None:
        self._batcher = batcher
        self._links = links
        self.judges = judges
        self._promises: dict[int, Promises] = {}
        # slot -> when it is resident: least, likely
        self._expected: dict[int, tuple[int, int]] = {}
        self._told: dict[int, int] = {}  # slot -> how many were told to come back for these weights

    # --- weights --------------------------------------------------------------------------------
    def expect(self, slot: int, ready_ns: int, likely_ns: int) -> None:
        """The version's weights will not be there before `ready_ns`, and likely at the other."""
        self._expected[slot] = ready_ns, likely_ns

    def has_expectation(self, slot: int) -> bool:
        """Whether it is known when the weights will be there."""
        return slot in self._expected

    def settle(self, slot: int) -> None:
        """The weights are there, or will not come."""
        self._expected.pop(slot, None)
        self._told.pop(slot, None)

    def forget(self, slot: int) -> None:
        """The version is gone."""
        self.settle(slot)
        self._promises.pop(slot, None)

    def refuses_absent(self, job: Job, title: str, now_ns: int) -> bool:
        """Answer a job whose deadline is before its version's weights; False if it may wait."""
        ready_ns, likely_ns = self._expected.get(job.slot, (0, 0))
        if ready_ns <= max(now_ns, job.deadline_ns) or not self.judges or job.alone:
            return False
        told = self._told.get(job.slot, 0)
        self._told[job.slot] = told + 1
        back_ns = likely_ns - now_ns + told * SPACING_NS % SPREAD_NS
        text = refusals.not_in_time(title, _ms(back_ns), _ms(job.deadline_ns - now_ns))
        self._refuse(job, text, back_ns)
        return True

    # --- compute --------------------------------------------------------------------------------
    def refuses(self, job: Job, title: str, now_ns: int) -> bool:
        """Answer a job that would be done too late; False if it may wait.

        To be asked when it might be: there are jobs before it that could take as long.
        """
        if not self.judges or job.alone:
            return False
        foreseen = self._batcher.foresight.of(job, now_ns)
        if foreseen is None:
            return False
        wait_ns, cost_ns = foreseen
        left_ns = job.deadline_ns - now_ns
        promises = self._promises.get(job.slot)
        if promises is None:
            if wait_ns <= left_ns:
                return False
            promises = self._promises[job.slot] = Promises()
        back_ns = promises.judge(wait_ns, cost_ns, left_ns, now_ns)
        if not back_ns:
            if not len(promises):
                del self._promises[job.slot]
            return False
        waiting = self._batcher.waiting(job.slot)
        text = refusals.queue_too_long(title, waiting, _ms(wait_ns), _ms(left_ns), _ms(back_ns))
        self._refuse(job, text, back_ns)
        return True

    def _refuse(self, job: Job, text: str, back_ns: float) -> None:
        self._links.fail(job, _shm.NOT_RESIDENT, f"{Overloaded.code}\n{text}", detail=_ms(back_ns))


def _ms(time_ns: float) -> int:
    """Whole milliseconds, rounded up: who comes back earlier would be too early."""
    return max(1, -int(-time_ns // 1_000_000))
