"""Which workers are in one batch for so long that others had better get what comes for them.

A hung model holds its worker until that is found to be stuck, 100 s and more.  Long before, after a few times
what its batches take (`vigil`), the worker counts as occupied: front ends send to others what is for other
versions, and come back when it moves.  What is for the version of that batch keeps going there: if it
hangs, one worker after the other would.

Called by the house: for `seat_news`, status and metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from overcommit.runtime.children import Child


@dataclass(slots=True, frozen=True)
class Occupation:
    """A worker incarnation that is occupied, by which version's batch (None: by none), for how long."""

    seat: int
    epoch: int
    slot: int | None
    still_ns: int

    @property
    def still_s(self) -> int:
        """Whole seconds."""
        return self.still_ns // 1_000_000_000


def occupations(workers: Iterable[Child], usual_ns: Callable[[int], int]) -> list[Occupation]:
    """Look who is occupied; `usual_ns(slot)` is how long batches of a version take, 0: unknown."""
    found: list[Occupation] = []
    for worker in workers:
        vigil = worker.vigil
        if vigil is None:
            continue
        slot = vigil.slot
        if vigil.is_occupied(0 if slot is None else usual_ns(slot)):
            found.append(Occupation(*worker.incarnation, slot, vigil.still_ns))
    return found
