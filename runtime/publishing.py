"""The mover's hand on the residency table: weights are there for workers as soon as they are there.

A load that brings all that its version lacks says so (`Load.publishes`).  When its last byte is in place
the mover writes the state word and rings the workers that wait; the supervisor hears of it meanwhile, and
is on nobody's way.  Shortly before, while the last piece is copied by another thread, the workers are
rung too: who wakes then finds the word about to change, and watches it instead of being woken.

    LOADING, former generation -> LOADING, `publishes`     [announce]
    LOADING, either            -> RESIDENT, `publishes`    [publish, then LoadDone, then ring]

Invariants
 1. Between Load and LoadDone only the mover writes the word of a load with `publishes`; before and after,
    only the supervisor.  So there is one writer at any time, and the messages hand it over.
 2. RESIDENT is written after the last byte, and before LoadDone.  A mover that dies in between has left
    the word behind: the supervisor finds it, and takes the load for ended.
 3. A load is announced while a step of it is under way that cannot end meanwhile: the mover's lock is held
    for that, or it is the caller's own.  So LOADING is never written over RESIDENT.
 4. A bell that is rung for nothing wakes a worker, and that is all: a seat's bell may be its former one's.
 5. A seat's bell keeps its descriptor, whichever worker's it is: nobody rings one that was closed.

Called by the mover, from any of its threads.
"""

from __future__ import annotations

import contextlib
import os
import time

from overcommit.runtime import _shm
from overcommit.runtime.config import QUIET_NS
from overcommit.runtime.mover_messages import Load


class Publisher:
    """The table, and the bells of the workers by seat, which it owns."""

    def __init__(self, table: _shm.ResidencyTable | None = None) -> None:
        self._table = table
        self._bells: dict[int, int] = {}
        self._published_ns = 0  # when the last one was

    def on_bell(self, seat: int, bell: int) -> None:
        """Another worker may sit there from now on."""
        held = self._bells.setdefault(seat, bell)
        if held != bell:
            # At once: another thread may be about to ring it.
            os.dup2(bell, held, inheritable=False)
            os.close(bell)

    def announce(self, load: Load) -> bool:
        """All bytes but the last are there; True: who sleeps is to be rung, which may take a while.

        On a machine that is busy with loads nobody is told.
        """
        is_busy = time.monotonic_ns() - self._published_ns < QUIET_NS
        if not load.publishes or self._table is None or is_busy:
            return False
        self._table.set(load.slot, _shm.LOADING, load.publishes)
        return True

    def publish(self, load: Load) -> None:
        """All bytes are there; who sleeps is to be rung after LoadDone was sent."""
        if load.publishes and self._table is not None:
            self._table.set(load.slot, _shm.RESIDENT, load.publishes)
            self._published_ns = time.monotonic_ns()

    def ring(self, load: Load) -> None:
        """Wake the workers that wait for it."""
        for seat in load.waiters:
            bell = self._bells.get(seat)
            if bell is not None:
                with contextlib.suppress(
                    BlockingIOError
                ):  # it was rung 2 ** 64 times, and is awake
                    os.eventfd_write(bell, 1)
