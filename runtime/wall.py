"""Wall time that several steps take together, by the clock that all processes share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class Wall:
    """Wall time from the first beginning of a stage to its last end."""

    began_ns: int = 0
    ended_ns: int = 0

    def add(self, other: Wall) -> None:
        """Widen by another one."""
        if other.ended_ns:
            self.began_ns = min(self.began_ns or other.began_ns, other.began_ns)
            self.ended_ns = max(self.ended_ns, other.ended_ns)

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Time the body."""
        self.began_ns = time.monotonic_ns()
        yield
        self.ended_ns = time.monotonic_ns()
