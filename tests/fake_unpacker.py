"""What decodes packed weights on the fake device: work on a stream, over memory that the fake maps.

By the CPU's decoder, or by a kernel that a test hands in: the CUDA source, compiled for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from overcommit.kernels import _unpack
from overcommit.runtime import _shm
from overcommit.runtime.config import PIECE_BYTES_MAX
from overcommit.runtime.driver import DriverError, Result, Stream
from overcommit.runtime.packed import BLOCK_BYTES, Head

if TYPE_CHECKING:
    from fake_driver import FakeDriver

Kernel = Callable[[int, int, int, int], None]  # packed, target, first, count


def by_cpu(packed: int, target: int, first: int, count: int) -> None:
    """Decode as the mover would."""
    piece = _shm.view(packed, PIECE_BYTES_MAX, False)
    nbytes = min(count * BLOCK_BYTES, Head.parse(piece).nbytes - first * BLOCK_BYTES)
    _unpack.decode(piece, _shm.view(target, nbytes, True), first, count)


class FakeUnpacker:
    """`Unpacker` of a fake driver."""

    def __init__(self, driver: FakeDriver, kernel: Kernel = by_cpu, gain: float = 0.0) -> None:
        self._driver = driver
        self._gain = gain
        self.kernel = kernel
        self.launches: list[tuple[int, int]] = []  # (first, count)

    def allocate(self, nbytes: int) -> int:
        return self._driver.plain_alloc(nbytes)

    def launch(self, packed: int, target: int, first: int, count: int, stream: Stream) -> None:
        driver = self._driver
        driver.check_launch(target, 1)
        self.launches.append((first, count))

        def work() -> None:
            if not driver.may_write(target):
                raise DriverError("unpack", Result.ILLEGAL_ADDRESS)
            self.kernel(packed, target, first, count)

        driver.enqueue(stream, work)

    def gain(self) -> float:
        return self._gain
