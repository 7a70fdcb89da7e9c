"""The physical limits of this machine, measured in the run whose figures stand beside them.

 * copy: memory to memory, between two populated memfd mappings, which is what the tiers of a server
   without a GPU are.  Measured with one thread and with one per core; the higher is the limit.
 * read: `O_DIRECT` from weight images on the disk of the cache, in pieces and with as many reads in
   flight as the mover has.  Where the file system refuses `O_DIRECT`, buffered, and said so.
 * compute: FP32 matrix product by PyTorch, as a worker's models use it; in a process of its own, so
   that neither torch nor its threads are in the process that measures.

TCP to the same machine is in `loopback`.

A figure is the best of a few passes: a limit is what the machine can do, not its average.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from overcommit.bench.errors import BenchError
from overcommit.bench.report import Figure
from overcommit.runtime.config import MIB, READ_BYTES, READS_IN_FLIGHT

COPY_BYTES: Final = 256 * MIB
COPY_PASSES: Final = 5
READ_TOTAL_BYTES: Final = 768 * MIB
READ_PASSES: Final = 2
MATRIX_ROWS: Final = 2048
COMPUTE_LIMIT_S: Final = 120.0
_COMPUTE_JOB: Final = """
import sys, time, torch
rows, threads = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
a, b = torch.rand(rows, rows), torch.rand(rows, rows)
best = 0.0
for _ in range(6):
    start = time.perf_counter()
    torch.mm(a, b)
    best = max(best, 2 * rows**3 / (time.perf_counter() - start))
print(best)
"""


@dataclass(slots=True, frozen=True)
class Limits:
    """Bytes a second."""

    copy_one_thread: float
    copy_all_cores: float
    read: float
    read_is_direct: bool

    @property
    def copy(self) -> float:
        """The copy limit."""
        return max(self.copy_one_thread, self.copy_all_cores)


def measure(images: Sequence[Path], before: tuple[float, float] = (0.0, 0.0)) -> Limits:
    """Measure everything; takes a few seconds, and nothing else should run.

    `before` is what `measure_copy` returned earlier in the run: the higher figures count, because
    neighbours on a shared machine can only lower them.
    """
    one, many = measure_copy()
    read, direct = measure_read(images)
    return Limits(max(one, before[0]), max(many, before[1]), read, direct)


def _populated(nbytes: int) -> tuple[mmap.mmap, int]:
    fd = os.memfd_create("overcommit-bench", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, nbytes)
        memory = mmap.mmap(fd, nbytes)
    finally:
        os.close(fd)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(address, 1, nbytes)
    return memory, address


def measure_copy(nbytes: int = COPY_BYTES, passes: int = COPY_PASSES) -> tuple[float, float]:
    """Return bytes a second of a copy with one thread, and with one thread per core."""
    cores = len(os.sched_getaffinity(0))
    source, source_at = _populated(nbytes)
    target, target_at = _populated(nbytes)
    piece = nbytes // cores & -mmap.PAGESIZE

    def copy(start: int, length: int) -> None:
        ctypes.memmove(target_at + start, source_at + start, length)  # without the GIL

    one = max(_rate(nbytes, lambda: copy(0, nbytes)) for _ in range(passes))
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:

        def copy_all() -> None:
            for future in [pool.submit(copy, core * piece, piece) for core in range(cores)]:
                future.result()

        many = max(_rate(piece * cores, copy_all) for _ in range(passes))
    del source, target
    return one, many


def _rate(nbytes: int, work: Callable[[], None]) -> float:
    start_ns = time.perf_counter_ns()
    work()
    return nbytes * 1e9 / (time.perf_counter_ns() - start_ns)


def measure_read(
    images: Sequence[Path], total_bytes: int = READ_TOTAL_BYTES, passes: int = READ_PASSES
) -> tuple[float, bool]:
    """Return bytes a second read from these files, and whether `O_DIRECT` was possible."""
    if not images:
        raise BenchError("there is no weight image to measure the disk with")
    direct = _can_direct(images[0])
    best = 0.0
    for number in range(passes):
        # Each pass begins elsewhere: a disk array's own cache would flatter the second one.
        start = number * len(images) // passes
        best = max(best, _read_pass([*images[start:], *images[:start]], total_bytes, direct))
    return best, direct


def _can_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def _read_pass(images: Sequence[Path], total_bytes: int, direct: bool) -> float:
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    fds = [os.open(path, flags) for path in images]
    buffers = [mmap.mmap(-1, READ_BYTES) for _ in range(READS_IN_FLIGHT)]
    free = list(buffers)
    try:
        for buffer in buffers:
            buffer[:: mmap.PAGESIZE] = b"\1" * (READ_BYTES // mmap.PAGESIZE)
        pieces = [
            (fd, offset)
            for fd in fds
            for offset in range(
                0, os.fstat(fd).st_size // mmap.PAGESIZE * mmap.PAGESIZE, READ_BYTES
            )
        ][: max(1, total_bytes // READ_BYTES)]

        def read(piece: tuple[int, int]) -> int:
            buffer = free.pop()
            try:
                return os.preadv(piece[0], [buffer], piece[1])
            finally:
                free.append(buffer)

        with concurrent.futures.ThreadPoolExecutor(READS_IN_FLIGHT) as pool:
            start_ns = time.perf_counter_ns()
            nbytes = sum(pool.map(read, pieces))
            return nbytes * 1e9 / (time.perf_counter_ns() - start_ns)
    finally:
        for fd in fds:
            os.close(fd)


def measure_compute(threads: int | None = None, rows: int = MATRIX_ROWS) -> float:
    """Return FLOP a second of a square FP32 matrix product, by default with a thread per core."""
    threads = threads or len(os.sched_getaffinity(0))
    command = [sys.executable, "-P", "-c", _COMPUTE_JOB, str(rows), str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=COMPUTE_LIMIT_S, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        raise BenchError(f"the matrix product could not be measured: {error}") from error
    return float(done.stdout)


def figures(limits: Limits, compute: float = 0.0) -> list[Figure]:
    """Say what was measured; the one-thread copy stands beside the limit of all cores."""
    how = "O_DIRECT" if limits.read_is_direct else "buffered: O_DIRECT is refused here"
    copied = limits.copy / 1e9
    found = [
        Figure("memory copy, one thread", limits.copy_one_thread / 1e9, "GB/s", copied),
        Figure("memory copy, all cores", limits.copy_all_cores / 1e9, "GB/s", copied),
        Figure("read of weight images", limits.read / 1e9, "GB/s", copied, how),
    ]
    if compute:
        found.append(Figure("FP32 matrix product, all cores", compute / 1e9, "GFLOP/s"))
    return found
