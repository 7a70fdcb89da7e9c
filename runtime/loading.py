"""One load: bytes of an image from disk into an arena, and on into another.

A load is cut into pieces of READ_BYTES.  A piece is read straight into the arena with O_DIRECT (no
page cache, no bounce), checked against its digest, and copied on to DEVICE while later pieces are
being read.

State machine of a load

    QUEUED --first piece taken [take]--> RUNNING
    RUNNING --last piece done [finish_piece]--> DONE
    QUEUED | RUNNING --a piece failed [fail]--> FAILED, when its running pieces have ended

Invariants
 1. A piece is taken by one thread, once; a load is over when no piece is running and none is left,
    or when one failed and none is running.  Only then may its extents be used for anything else.
 2. A load that is DONE has had every byte read, checked if asked, and copied.

Called by the mover's I/O threads, under the mover's lock for `take`, `finish_piece` and `fail`.
"""

from __future__ import annotations

import errno
import os
import time
import zlib
from dataclasses import dataclass, field

from overcommit.runtime import _shm
from overcommit.runtime.config import PAGE_BYTES, READ_BYTES
from overcommit.runtime.errors import ImageError
from overcommit.runtime.image import read_header
from overcommit.runtime.messages import Extents, Load, LoadDone


def cut(extents: Extents, start: int, nbytes: int) -> list[tuple[int, int]]:
    """Return the arena pieces (offset, length) that hold bytes [start, start + nbytes) of an image."""
    pieces = []
    at = 0
    end = start + nbytes
    for offset, length in extents:
        low, high = max(start, at), min(end, at + length)
        if low < high:
            pieces.append((offset + low - at, high - low))
        at += length
    if sum(length for _, length in pieces) != nbytes:
        raise ImageError(f"extents of {at} bytes do not hold bytes {start} to {end} of the image")
    return pieces


def open_direct(path: str) -> tuple[int, bool]:
    """Open for O_DIRECT reads; where the file system refuses, buffered.  Returns (fd, direct)."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False


@dataclass(slots=True)
class LoadState:
    """One load under way.  `host` and `device` are the addresses of the mapped arenas."""

    load: Load
    host: int
    device: int
    next_piece: int = 0
    running: int = 0
    read_bytes: int = 0
    read_first_ns: int = 0
    read_last_ns: int = 0
    copy_ns: int = 0
    direct: bool = False
    error: str = ""
    fd: int = -1
    payload_offset: int = 0
    digests: tuple[int, ...] = ()
    pieces: int = field(init=False)

    def __post_init__(self) -> None:
        self.pieces = -(-self.load.nbytes // READ_BYTES)

    # --- under the mover's lock -----------------------------------------------------------------
    def take(self) -> int | None:
        """Take the next piece; None when there is none to take."""
        if self.error or self.next_piece >= self.pieces:
            return None
        self.next_piece += 1
        self.running += 1
        return self.next_piece - 1

    def finish_piece(self) -> bool:
        """A piece ended; True when the whole load has."""
        self.running -= 1
        return self.running == 0 and (bool(self.error) or self.next_piece >= self.pieces)

    def fail(self, message: str) -> None:
        """Remember the first error."""
        self.error = self.error or message

    # --- in an I/O thread -----------------------------------------------------------------------
    def open(self) -> None:
        """Open the image and read its header.  Raises ImageError, OSError."""
        header, self.payload_offset = read_header(self.load.path)
        if header.nbytes != self.load.nbytes:
            raise ImageError(
                f"{self.load.path} holds {header.nbytes} bytes, {self.load.nbytes} were expected; "
                f"the image was replaced while the server ran"
            )
        self.digests = header.piece_digests
        self.fd, self.direct = open_direct(self.load.path)

    def run_piece(self, piece: int) -> None:
        """Read, check and copy one piece.  Raises ImageError, OSError."""
        load = self.load
        start = piece * READ_BYTES
        nbytes = min(READ_BYTES, load.nbytes - start)
        if load.source == "disk":
            base, extents = (
                (self.host, load.host) if load.host is not None else (self.device, load.device)
            )
            assert extents is not None
            targets = cut(extents, start, nbytes)
            began_ns = time.monotonic_ns()
            self._read(base, targets, start, nbytes)
            self.read_first_ns = min(self.read_first_ns or began_ns, began_ns)
            self.read_last_ns = time.monotonic_ns()
            self.read_bytes += nbytes
            if load.verify:
                self._check(base, targets, piece)
        if load.device is not None and load.host is not None:
            began_ns = time.monotonic_ns()
            self._copy(cut(load.host, start, nbytes), cut(load.device, start, nbytes))
            self.copy_ns += time.monotonic_ns() - began_ns

    def _read(self, base: int, targets: list[tuple[int, int]], start: int, nbytes: int) -> None:
        views = [_shm.view(base + offset, length, True) for offset, length in targets]
        done = 0
        while done < nbytes:
            try:
                got = os.preadv(self.fd, views, self.payload_offset + start + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                # Some file systems take the flag at open and refuse at the first read.
                self.direct = False
                os.set_blocking(self.fd, True)
                buffered = os.open(self.load.path, os.O_RDONLY | os.O_CLOEXEC)
                os.dup2(buffered, self.fd, inheritable=False)
                os.close(buffered)
                continue
            if got == 0:
                raise ImageError(f"{self.load.path} is cut off at byte {start + done}")
            done += got
            if got % PAGE_BYTES and self.direct and done < nbytes:
                raise ImageError(f"{self.load.path}: a read stopped inside a page")
            views = _after(views, got)

    def _check(self, base: int, targets: list[tuple[int, int]], piece: int) -> None:
        crc = 0
        for offset, length in targets:
            crc = zlib.crc32(_shm.view(base + offset, length, False), crc)
        if crc != self.digests[piece]:
            raise ImageError(
                f"{self.load.path} is damaged: piece {piece} (bytes {piece * READ_BYTES} and on) "
                f"fails its digest; delete the file to pack it again"
            )

    def _copy(self, sources: list[tuple[int, int]], targets: list[tuple[int, int]]) -> None:
        source = [(self.host + offset, length) for offset, length in sources]
        target = [(self.device + offset, length) for offset, length in targets]
        while source and target:
            (from_at, from_left), (to_at, to_left) = source[0], target[0]
            nbytes = min(from_left, to_left)
            _shm.copy(to_at, from_at, nbytes)
            source[0] = (from_at + nbytes, from_left - nbytes)
            target[0] = (to_at + nbytes, to_left - nbytes)
            if not source[0][1]:
                source.pop(0)
            if not target[0][1]:
                target.pop(0)

    def close(self) -> LoadDone:
        """Release the file; say how it went."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        return LoadDone(
            job=self.load.job,
            ok=not self.error,
            message=self.error,
            read_bytes=self.read_bytes,
            read_ns=self.read_last_ns - self.read_first_ns,
            copy_ns=self.copy_ns,
            direct=self.direct,
        )


def _after(views: list[memoryview], nbytes: int) -> list[memoryview]:
    while views and nbytes >= len(views[0]):
        nbytes -= len(views[0])
        views = views[1:]
    return [views[0][nbytes:], *views[1:]] if views and nbytes else views
