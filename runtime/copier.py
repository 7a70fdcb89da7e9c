"""How bytes get to DEVICE: by the CPU where it is host memory, by the GPU's copy engine where not.

Packed pieces are decoded on the way: by who copies, or by the GPU.

What a load needs of either is this protocol; `MEMCPY` is the one for host memory, `cuda_copy` has the
other.  Called by the mover's threads.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Final, Protocol

from overcommit.runtime import _shm
from overcommit.runtime.config import PIECE_BYTES_MAX, READS_IN_FLIGHT
from overcommit.runtime.image_file import Span
from overcommit.runtime.mover_messages import Urgency
from overcommit.runtime.packed import decode
from overcommit.runtime.staging import Stages


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

    def fetch(self, sources: list[Span], targets: list[Span], urgency: Urgency) -> None:
        """Copy from DEVICE to HOST; otherwise as `copy`."""

    def unpack(
        self, sources: list[Span], targets: list[Span], first: int, urgency: Urgency
    ) -> None:
        """Decode blocks of the packed piece at `sources`, from block `first` on, to `targets`.

        Returns when the last byte is there.  Raises ImageError, DriverError.
        """

    def read_back(
        self, targets: list[Span], urgency: Urgency
    ) -> AbstractContextManager[list[Span]]:
        """Yield where the CPU can read what is on DEVICE there, a piece at most; for checks."""
        ...

    def stage(self) -> AbstractContextManager[int]:
        """Lend PIECE_BYTES_MAX of host memory that are fast to copy from; waits until some are free."""
        ...

    def pin(self, address: int, nbytes: int) -> None:
        """This piece of HOST has its pages now: make it fast to copy from."""


class Memcpy:
    """DEVICE is host memory."""

    is_remote: bool = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: Stages | None = None  # with the first load that needs one

    def copy(self, sources: list[Span], targets: list[Span], urgency: Urgency) -> None:
        for target, source, nbytes in pairs(sources, targets):
            _shm.copy(target, source, nbytes)

    def fetch(self, sources: list[Span], targets: list[Span], urgency: Urgency) -> None:
        self.copy(sources, targets, urgency)

    def unpack(
        self, sources: list[Span], targets: list[Span], first: int, urgency: Urgency
    ) -> None:
        if len(sources) == 1:
            decode(sources[0], targets, first)
            return
        with self.stage() as address:
            decode(joined(sources, address), targets, first)

    def read_back(
        self, targets: list[Span], urgency: Urgency
    ) -> AbstractContextManager[list[Span]]:
        return contextlib.nullcontext(targets)

    def stage(self) -> AbstractContextManager[int]:
        with self._lock:
            if self._stages is None:
                self._stages = Stages(READS_IN_FLIGHT)
            return self._stages.lend()

    def pin(self, address: int, nbytes: int) -> None:
        """Any page is as good as another."""


MEMCPY: Final = Memcpy()


def joined(sources: Iterable[Span], address: int) -> Span:
    """Copy spans to where they lie one behind the other, PIECE_BYTES_MAX at most; return that."""
    at = address
    for source, nbytes in sources:
        assert at + nbytes <= address + PIECE_BYTES_MAX, "longer than a piece"
        _shm.copy(at, source, nbytes)
        at += nbytes
    return address, at - address


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
