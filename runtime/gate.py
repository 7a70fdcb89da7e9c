"""Residency's view of shared memory: the state words, and the leases of every worker.

Owns nothing; joins the residency table with the lease pages that are live now.  It is the real
implementation of `residency.Port`.

Invariants
 1. Only this writes the residency table, from the supervisor's one thread, but for words that a load in
    flight publishes: those are the mover's until it ends (`publishing`).
 2. The uses of a slot are those of the version that is in it: workers' counters go on, what they had said
    when the former one left is taken off.
 3. `try_evict` answers True only if no worker held a lease after the state word said EVICTING.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from overcommit.runtime import _shm
from overcommit.runtime.residents import Usage

Pages = Callable[[], tuple[_shm.LeasePage, ...]]


class SharedGate:
    """Residency's port on the table and on the pages that `pages()` returns."""

    def __init__(self, table: _shm.ResidencyTable, pages: Pages) -> None:
        self._table = table
        self._pages = pages
        # What dead workers had counted: the uses of a version must not shrink when a page goes.
        self._past_uses: dict[int, tuple[int, int]] = {}
        # What all of them had counted when the slot's former version left.
        self._former_uses: dict[int, tuple[int, int]] = {}

    def try_evict(self, slot: int, generation: int) -> bool:
        """Take the version out of use unless a worker holds a lease."""
        return _shm.try_evict(self._table, self._pages(), slot, generation)

    def usage(self, slot: int) -> Usage:
        """Sum the workers' counters for the version in a slot."""
        counted = self._counted(slot)
        former, former_ns = self._former_uses.get(slot, (0, 0))
        last_used_ns = counted.last_used_ns if counted.last_used_ns > former_ns else 0
        return Usage(counted.waiting, counted.uses - former, last_used_ns, counted.leases)

    def _counted(self, slot: int) -> Usage:
        """Sum all that was ever counted in a slot."""
        uses, last_used_ns = self._past_uses.get(slot, (0, 0))
        waiting = leases = 0
        for page in self._pages():
            lease, queued, used, last_ns = page.read(slot)
            leases += lease
            waiting += queued
            uses += used
            last_used_ns = max(last_used_ns, last_ns)
        return Usage(waiting=waiting, uses=uses, last_used_ns=last_used_ns, leases=leases)

    def set_state(self, slot: int, state: int, generation: int) -> None:
        """Publish the state of a version to the workers."""
        self._table.set(slot, state, generation)

    def set_hungry(self, hungry: bool) -> None:
        """Ask workers to ring when they drop a lease."""
        self._table.set_hungry(hungry)

    def keep_uses(self, page: _shm.LeasePage, slots: Iterable[int]) -> None:
        """Remember the counters of a worker that died, before its page goes."""
        for slot in {*slots, *self._former_uses}:
            _, _, uses, last_ns = page.read(slot)
            if uses:
                past, past_ns = self._past_uses.get(slot, (0, 0))
                self._past_uses[slot] = (past + uses, max(past_ns, last_ns))

    def forget(self, slot: int) -> None:
        """The version in this slot has left; whoever comes is somebody else, or begins again."""
        counted = self._counted(slot)
        if counted.uses:
            self._former_uses[slot] = (counted.uses, counted.last_used_ns)
