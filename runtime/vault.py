"""The supervisor's descriptors of a CUDA arena's chunks: what keeps weights when processes die.

The supervisor has no CUDA.  The mover makes the chunks, exports them and sends the descriptors; the
supervisor keeps them and hands them to every worker and to the next mover, CONTROL_FDS_MAX at a time.
A child asks for the next ones by saying how many it has, so that no more than one message of them is
ever under way to a child: descriptors in flight count against the process's limit.

Invariants
 1. Chunks are held in the order of their numbers, each once: what does not continue them is closed.
 2. A descriptor is open from the moment it came until `close`.

Called by `fleet`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from overcommit.runtime.config import CONTROL_FDS_MAX
from overcommit.runtime.errors import ProtocolError


class Vault:
    """Descriptors of `count` chunks, as far as they have come."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._fds: list[int] = []

    def __len__(self) -> int:
        return len(self._fds)

    @property
    def is_full(self) -> bool:
        """Whether every chunk is held."""
        return len(self._fds) == self.count

    def accept(self, first: int, fds: Sequence[int]) -> None:
        """Take over what the mover made.  Raises ProtocolError, and then they are closed."""
        if first != len(self._fds) or first + len(fds) > self.count:
            for fd in fds:
                os.close(fd)
            raise ProtocolError(
                f"chunks {first} to {first + len(fds)} came where {len(self._fds)} of "
                f"{self.count} are held"
            )
        self._fds += fds

    def resize(self, count: int) -> None:
        """There are so many from now on; let go of the others."""
        self.count = count
        while len(self._fds) > self.count:
            os.close(self._fds.pop())

    def after(self, first: int) -> Sequence[int]:
        """Return the descriptors of the next chunks for who has `first` of them; they stay ours."""
        return self._fds[first : first + CONTROL_FDS_MAX]

    def close(self) -> None:
        """Let go of everything."""
        while self._fds:
            os.close(self._fds.pop())
