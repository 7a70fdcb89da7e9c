"""Two processes and a link between them, for `micro`."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from overcommit.bench.errors import BenchError
from overcommit.bench.link_peer import FAR_EPOCH, NEAR_EPOCH, NO_LINK, RING_SLOTS
from overcommit.runtime import _shm

WATCHDOG_NS = 60_000_000_000
Run = Callable[[int], None]


@contextmanager
def _far_side(link: int, mine: int, theirs: int) -> Iterator[None]:
    """Run the peer; takes over the descriptors."""
    life, hold = os.pipe()
    owned = [fd for fd in (link, mine, theirs, life) if fd != NO_LINK]
    try:
        with subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "overcommit.bench.link_peer"),
                *(str(fd) for fd in (link, theirs, mine, life)),
            ],
            pass_fds=owned,
        ) as process:
            try:
                yield
            finally:
                process.kill()
    finally:
        for fd in (*owned, hold):
            os.close(fd)


@contextmanager
def bells() -> Iterator[Run]:
    """Yield what rings another process's bell and waits for its own."""
    mine, theirs = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
    quiet, hold = os.pipe()

    def run(count: int) -> None:
        for _ in range(count):
            os.eventfd_write(theirs, 1)
            if not _shm.wait(mine, quiet, WATCHDOG_NS):
                raise BenchError("the far side of the doorbells does not ring back")

    try:
        with _far_side(NO_LINK, mine, theirs):
            yield run
    finally:
        os.close(quiet)
        os.close(hold)


@contextmanager
def link() -> Iterator[Run]:
    """Yield what pushes a submission and takes its completion."""
    half = _shm.ring_bytes(RING_SLOTS)
    fd = os.memfd_create("overcommit-bench-link", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * half)
    memory = mmap.mmap(fd, 2 * half)
    _shm.create_ring(memory, 0, RING_SLOTS, 1, NEAR_EPOCH, FAR_EPOCH)
    _shm.create_ring(memory, half, RING_SLOTS, 2, FAR_EPOCH, NEAR_EPOCH)
    give = _shm.SubmissionRing(memory, 0, True, NEAR_EPOCH, FAR_EPOCH)
    take = _shm.CompletionRing(memory, half, False, FAR_EPOCH, NEAR_EPOCH)
    mine, theirs = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
    quiet, hold = os.pipe()

    def run(count: int) -> None:
        for number in range(count):
            give.push(number, 0, 0, 0, 0, 0, _shm.SUBMIT, 0, 0)
            if give.must_wake():
                os.eventfd_write(theirs, 1)
            while not take.pop(RING_SLOTS):
                if _shm.arm([take]):
                    if not _shm.wait(mine, quiet, WATCHDOG_NS):
                        raise BenchError("the far side of the link does not answer")
                    _shm.disarm([take])

    try:
        with _far_side(fd, mine, theirs):
            yield run
    finally:
        os.close(quiet)
        os.close(hold)
