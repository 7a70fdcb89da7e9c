"""What engines keep outside the arena: prepacked weights, models of libraries with memory of their own.

The budgets count what lies in the arena.  Some libraries copy from there into structures of their
own, and such a copy stays when the version is evicted.  Here it is counted, and bounded for the
process: what was used longest ago is dropped, and made again from the mapping when it is wanted.

Invariants
 1. All copies together take at most PRIVATE_BYTES_MAX, by what their makers say of them.
 2. A copy is made while the version is leased (in `run` or `bind`), so its weights are there.
 3. A copy whose owner is gone counts no more.

Called by engines, in a worker's one thread and in the packer's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from overcommit.runtime.config import PRIVATE_BYTES_MAX

Kept = TypeVar("Kept")


class Ledger:
    """The copies of one process, the one used longest ago first."""

    def __init__(self, bytes_max: int = PRIVATE_BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        self.nbytes = 0
        # Weak: a model that is let go of takes its copy along.
        self._sizes: dict[int, tuple[weakref.ref[PrivateCopy[object]], int]] = {}

    def enter(self, copy: PrivateCopy[object], nbytes: int) -> None:
        """Count a copy; others go to make room."""
        for key, (other, size) in list(self._sizes.items()):
            if self.nbytes + nbytes <= self.bytes_max:
                break
            owner = other()
            if owner is not None:
                owner.drop()
            self.leave(key, size)
        key = id(copy)
        self._sizes[key] = (weakref.ref(copy), nbytes)
        self.nbytes += nbytes
        weakref.finalize(copy, self.leave, key, nbytes).atexit = False

    def leave(self, key: int, nbytes: int) -> None:
        """A copy is gone."""
        if self._sizes.pop(key, None) is not None:
            self.nbytes -= nbytes

    def touch(self, copy: PrivateCopy[object]) -> None:
        """A copy is used."""
        entry = self._sizes.pop(id(copy), None)
        if entry is not None:
            self._sizes[id(copy)] = entry


ledger = Ledger()


class PrivateCopy(Generic[Kept]):
    """Something of `nbytes` that `make` makes again if it was dropped."""

    def __init__(self, nbytes: int, make: Callable[[], Kept], books: Ledger = ledger) -> None:
        self.nbytes = nbytes
        self._make = make
        self._books = books
        self._kept: Kept | None = None

    @property
    def fits(self) -> bool:
        """Whether the process may hold it at all."""
        return self.nbytes <= self._books.bytes_max

    @property
    def is_held(self) -> bool:
        """Whether it is there now."""
        return self._kept is not None

    def get(self) -> Kept:
        """Return it; made now if it is not there.  Raises what `make` raises."""
        if self._kept is None:
            kept = self._make()
            self._books.enter(self, self.nbytes)  # type: ignore[arg-type]
            self._kept = kept
        else:
            self._books.touch(self)  # type: ignore[arg-type]
        return self._kept

    def drop(self) -> None:
        """Let go of it; the ledger's business."""
        self._kept = None
