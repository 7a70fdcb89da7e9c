"""Host memory that bytes pass through: a few stretches as long as a piece, lent to a thread at a time.

Invariants
 1. At most `count` are lent; who comes then waits.
 2. Its pages come with the first use, or when the whole is registered.

Used by the copiers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from overcommit.runtime import _shm
from overcommit.runtime.config import PIECE_BYTES_MAX
from overcommit.runtime.memory import create_memfd


class Stages:
    """See the module; all of them are one range of `nbytes` at `address`."""

    def __init__(self, count: int, each_bytes: int = PIECE_BYTES_MAX) -> None:
        self.nbytes = count * each_bytes
        self._fd = create_memfd("stages", self.nbytes)
        self.address = _shm.reserve(self.nbytes)
        _shm.map_fixed(self.address, self._fd, 0, self.nbytes, True, False)
        self._free = [self.address + number * each_bytes for number in range(count)]
        self._are_free = threading.Condition()

    @contextlib.contextmanager
    def lend(self) -> Iterator[int]:
        """Lend one; waits until one is free."""
        with self._are_free:
            while not self._free:
                self._are_free.wait()
            address = self._free.pop()
        try:
            yield address
        finally:
            with self._are_free:
                self._free.append(address)
                self._are_free.notify()
