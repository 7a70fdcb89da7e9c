"""How bytes get to DEVICE: by the CPU where it is host memory, by the GPU's copy engine where not.

What a load needs of either is this protocol; `MEMCPY` is the one for host memory, `cuda_copy` has the
other.  Called by the mover's threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Final, Protocol

from overcommit.runtime import _shm
from overcommit.runtime.image_file import Span
from overcommit.runtime.mover_messages import Urgency


class Copier(Protocol):
    """Copies from HOST to DEVICE.  Thread safe."""

    @property
    def is_remote(self) -> bool:
        """Whether the CPU cannot touch DEVICE, so that reads for it need a stage."""
        ...

    def copy(self, sources: list[Span], targets: list[Span], urgency: Urgency) -> None:
        """Copy between two lists of spans that are equally long in sum, cut differently.

        Returns when the last byte is there.  Raises DriverError.
        """

    def stage(self) -> AbstractContextManager[int]:
        """Lend READ_BYTES of host memory that are fast to copy from; waits until some are free."""
        ...

    def pin(self, address: int, nbytes: int) -> None:
        """This piece of HOST has its pages now: make it fast to copy from."""


class Memcpy:
    """DEVICE is host memory."""

    is_remote: bool = False

    def copy(self, sources: list[Span], targets: list[Span], urgency: Urgency) -> None:
        for target, source, nbytes in pairs(sources, targets):
            _shm.copy(target, source, nbytes)

    def stage(self) -> AbstractContextManager[int]:
        raise AssertionError("what is read for DEVICE is read into it")

    def pin(self, address: int, nbytes: int) -> None:
        """Any page is as good as another."""


MEMCPY: Final = Memcpy()


def pairs(sources: Iterable[Span], targets: Iterable[Span]) -> Iterator[tuple[int, int, int]]:
    """Yield (target, source, bytes) for two lists that are equally long in sum, cut differently."""
    to = iter(targets)
    to_at, to_left = 0, 0
    for from_at, from_left in sources:
        while from_left:
            if not to_left:
                to_at, to_left = next(to)
            part = min(from_left, to_left)
            yield to_at, from_at, part
            from_at, from_left = from_at + part, from_left - part
            to_at, to_left = to_at + part, to_left - part
