"""What the machine can do with these very bytes in these very places: the limit of an activation.

The raw figures are measured in the server's own arenas, at the extents of the model that was just
activated, and put there what is there already.  Other memory will not do: how fast a disk reads into
a buffer depends on the buffer, repeatably (bench/LOG.md), so that an activation was "faster than the
disk" when the limit came from elsewhere.

 * copy: from HOST to DEVICE with the mover's own copy and number of threads, each with one long run;
   nothing of it is in a cache, as nothing is when a version comes back after others.
 * read: the image's file with `O_DIRECT` into HOST; block size and depth are the best of a sweep.

Called by the scenario `activation`.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

from overcommit.bench.errors import BenchError
from overcommit.runtime import _shm
from overcommit.runtime.config import MIB, PAGE_BYTES
from overcommit.runtime.container import read_stored
from overcommit.runtime.copier import MEMCPY
from overcommit.runtime.loading import COPY_THREADS
from overcommit.runtime.places import Base, Places

BLOCKS: Final = (2 * MIB, 8 * MIB, 16 * MIB)
DEPTHS: Final = (4, 8, 16)
SWEEP_BYTES: Final = 512 * MIB
TOUCHED_BYTES: Final = 256 * MIB
OTHER_BYTES: Final = 128 * MIB  # read before a copy, so that the caches hold nothing of it


@dataclass(slots=True, frozen=True)
class Reading:
    """How a file is read."""

    block: int
    depth: int


class Raw:
    """The arenas of a server, mapped here too, and threads to measure with."""

    def __init__(self, supervisor: int) -> None:
        self._fds = {name: _memfd_of(supervisor, name) for name in ("device", "host")}
        self._bases = {name: self._map(name) for name in self._fds}
        self._pool = concurrent.futures.ThreadPoolExecutor(max(DEPTHS))
        self._other = np.ones(OTHER_BYTES // 8)

    def _map(self, name: str) -> Base:
        fd = self._fds[name]
        nbytes = os.fstat(fd).st_size
        address = _shm.reserve(nbytes)
        _shm.map_fixed(address, fd, 0, nbytes, True, False)
        _shm.populate(address, nbytes, True)
        return Base(name, address, nbytes)

    def __enter__(self) -> Raw:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        for base in self._bases.values():
            _shm.release(base.address, base.nbytes)
        for fd in self._fds.values():
            os.close(fd)

    def copy(self, record: dict[str, Any]) -> float:
        """Return the seconds that a copy of this activation's bytes takes, to the same places.

        Caches are filled with other bytes before.
        """
        self._other.max()
        nbytes = int(record["nbytes"])
        host, device = (self._places(record, name) for name in ("host", "device"))
        threads = COPY_THREADS if nbytes >= COPY_THREADS * MIB else 1
        share = -(-nbytes // threads // PAGE_BYTES) * PAGE_BYTES

        def work(start: int) -> None:
            length = min(share, nbytes - start)
            MEMCPY.copy(host.spans(start, length), device.spans(start, length), "foreground")

        return self._time(work, range(0, nbytes, share), threads)

    def read(self, path: Path, record: dict[str, Any], how: Reading, nbytes: int = 0) -> float:
        """Return the seconds that reading this activation's bytes takes, to the same places."""
        nbytes = nbytes or int(record["nbytes"])
        host = self._places(record, "host")
        _, payload = read_stored(path)
        fd = _open(path)
        try:

            def work(start: int) -> None:
                length = min(how.block, nbytes - start)
                views = [_shm.view(at, part, True) for at, part in host.spans(start, length)]
                if os.preadv(fd, views, payload + start) != length:
                    raise BenchError(f"a read of {path} at {start:,} came back short")

            return self._time(work, range(0, nbytes, how.block), how.depth)
        finally:
            os.close(fd)

    def _places(self, record: dict[str, Any], name: str) -> Places:
        extents = tuple((offset, length) for offset, length in record[name])
        return Places(self._bases[name], extents, int(record["nbytes"]))

    def best_reading(self, path: Path, record: dict[str, Any]) -> Reading:
        """Return how this activation's file is read fastest."""
        nbytes = min(int(record["nbytes"]), SWEEP_BYTES)
        ways = [Reading(block, depth) for block, depth in itertools.product(BLOCKS, DEPTHS)]
        return min(
            ways, key=lambda way: min(self.read(path, record, way, nbytes) for _ in range(2))
        )

    def touch(self) -> float:
        """Return the seconds that the first touch of a fresh mapping takes, for each byte."""
        nbytes = min(TOUCHED_BYTES, self._bases["host"].nbytes)
        fresh = _shm.reserve(nbytes)
        try:
            _shm.map_fixed(fresh, self._fds["host"], 0, nbytes, False, False)
            began = time.perf_counter()
            sum(_shm.view(fresh, nbytes, False)[::PAGE_BYTES])
            return (time.perf_counter() - began) / nbytes
        finally:
            _shm.release(fresh, nbytes)

    def _time(self, work: Callable[[int], None], starts: Sequence[int], threads: int) -> float:
        left = iter(starts)

        def take() -> None:
            for start in left:  # one at a time: advancing a range's iterator keeps the GIL
                work(start)

        began = time.perf_counter()
        if threads == 1:
            take()
        else:
            for future in [self._pool.submit(take) for _ in range(threads)]:
                future.result()
        return time.perf_counter() - began


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise BenchError(f"{path} cannot be read with O_DIRECT: {error.strerror}") from error


def _memfd_of(pid: int, name: str) -> int:
    """Open a process's memfd of this name, as the kernel shows it."""
    folder = Path(f"/proc/{pid}/fd")
    for entry in folder.iterdir():
        target = os.readlink(entry)
        if target.startswith("/memfd:") and target.split()[0].endswith(name):
            return os.open(entry, os.O_RDWR | os.O_CLOEXEC)
    raise BenchError(f"process {pid} has no memory named {name}")
