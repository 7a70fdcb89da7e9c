"""The GPU's own decoder of packed weights: `kernels.unpack` by cupy, on streams of the driver's.

cupy uses the primary context, which is the mover's too.  Nothing of this has run on a GPU.

Imported where the driver is the real one and cupy is there: by the mover, and by the probe.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from overcommit.kernels import _unpack, cuda
from overcommit.kernels.unpack import SOURCE, pack
from overcommit.runtime.config import MIB
from overcommit.runtime.driver import DriverError, Result, Stream

SAMPLE_BYTES: Final = 8 * MIB
ROUNDS: Final = 8


class CudaUnpacker:
    """`Unpacker` of one GPU."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._cupy = cuda.cupy()
        self._kept: list[Any] = []
        try:
            with self._cupy.cuda.Device(device):
                self._kernel = cuda.function(SOURCE, "unpack")
        except Exception as error:  # NVRTC's, the driver's, cupy's own
            raise DriverError("compiling unpack", Result.UNKNOWN, str(error)[:200]) from error

    def allocate(self, nbytes: int) -> int:
        """Return device memory; see `Unpacker`."""
        with self._cupy.cuda.Device(self._device):
            memory = self._cupy.cuda.alloc(nbytes)
        self._kept.append(memory)
        return int(memory.ptr)

    def launch(self, packed: int, target: int, first: int, count: int, stream: Stream) -> None:
        """Decode; see `Unpacker`."""
        arguments = (np.uint64(packed), np.uint64(target), np.uint32(first))
        try:
            with self._cupy.cuda.Device(self._device), self._cupy.cuda.ExternalStream(int(stream)):
                self._kernel((count,), (_unpack.STREAMS,), arguments)
        except (self._cupy.cuda.driver.CUDADriverError, RuntimeError) as error:
            raise DriverError("cuLaunchKernel", Result.UNKNOWN, str(error)[:200]) from error

    def gain(self) -> float:
        """Compare the time of a raw copy with that of a packed one or of decoding, the longer."""
        cupy = self._cupy
        weights = random.Random(1)
        values = [struct.pack("<f", weights.gauss(0, 0.02))[2:] for _ in range(MIB // 2)]
        raw = b"".join(values) * (SAMPLE_BYTES // MIB)
        packed = pack(raw)
        with cupy.cuda.Device(self._device):
            from_raw, from_packed = _pinned(cupy, raw), _pinned(cupy, packed)
            staged = cupy.empty(len(packed), np.uint8)
            target, decoded = cupy.empty(len(raw), np.uint8), cupy.zeros(len(raw), np.uint8)
            stream = cupy.cuda.Stream(non_blocking=True)
            blocks = len(raw) // _unpack.BLOCK_BYTES

            def copy(to: Any, source: Any, nbytes: int) -> None:
                to.data.copy_from_host_async(source.ptr, nbytes, stream)

            def unpack() -> None:
                self.launch(staged.data.ptr, decoded.data.ptr, 0, blocks, Stream(stream.ptr))

            raw_s = _best_s(lambda: copy(target, from_raw, len(raw)), stream)
            packed_s = _best_s(lambda: copy(staged, from_packed, len(packed)), stream)
            unpack_s = _best_s(unpack, stream)
            if cupy.asnumpy(decoded).tobytes() != raw:
                return 0.0
        return raw_s / max(packed_s, unpack_s)


def _pinned(cupy: Any, data: bytes) -> Any:
    memory = cupy.cuda.alloc_pinned_memory(len(data))
    np.frombuffer(memory, np.uint8, len(data))[:] = np.frombuffer(data, np.uint8)
    return memory


def _best_s(work: Callable[[], None], stream: Any) -> float:
    """Return the least time of ROUNDS runs, the first of which, that compiles, does not count."""
    best = float("inf")
    for number in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        stream.synchronize()
        if number:
            best = min(best, time.perf_counter() - began)
    return best
