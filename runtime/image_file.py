"""An image's or a part's file as a loader reads it: straight into an arena, with O_DIRECT, checked by pieces.

Where the payload starts is worked out from the file's size, which is its header and its payload and
nothing else; so a short image comes in one read, header and all, and no read waits for another.
What the header says is then held against that guess; where they differ, the file is not what the
load expects, and `read_stored` finds out why.

Of a packed payload the pieces differ in length; its header says how long each is.

Invariants
 1. `open` comes first, once, in one thread; `read` and `check` may then run in several.
 2. An image is good only if its header fits its file and the load, and then, if asked, every piece
    its digest.

Called by `loading`.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import zlib
from collections.abc import Sequence
from typing import Final

from overcommit.runtime import _shm
from overcommit.runtime.config import IMAGE_ALIGN_BYTES, READ_BYTES
from overcommit.runtime.container import (
    HEADER_BYTES_MAX,
    Stored,
    check_head,
    parse_stored,
    read_stored,
)
from overcommit.runtime.errors import ImageError

Span = tuple[int, int]  # address, length
_SCRATCH_BYTES: Final = 1 << 20  # kept by each thread; a longer header gets memory of its own

_kept = threading.local()


class ImageFile:
    """One image file that holds `nbytes` of payload, raw or packed."""

    def __init__(self, path: str, nbytes: int, *, is_packed: bool = False) -> None:
        self.path = path
        self.nbytes = nbytes
        self.is_packed = is_packed
        self.piece_bytes: tuple[int, ...] = ()  # of packed ones, once it is open
        self._start = 0  # of the payload
        self._digests: tuple[int, ...] = ()
        self._lock = threading.Lock()  # guards _buffered_fd
        self._direct_fd = -1
        self._buffered_fd = -1

    @property
    def is_direct(self) -> bool:
        """Whether every read so far went past the page cache."""
        return self._direct_fd >= 0 and self._buffered_fd < 0

    def open(self, verify: bool, spans: Sequence[Span] = ()) -> None:
        """Open it and read its header, and the whole payload into `spans` if any are given.

        `verify` keeps the digests for `check`.  Raises ImageError, OSError.
        """
        size = self._open()
        self._start = size - self.nbytes
        is_likely = 0 < self._start <= HEADER_BYTES_MAX and not self._start % IMAGE_ALIGN_BYTES
        if not is_likely:
            raise self._explain()
        head = _scratch(self._start)
        self._read([head, *_views(spans)], 0)
        try:
            if verify or self.is_packed:
                stored, start = parse_stored(self.path, head, size)
                self._digests = stored.piece_digests
                self.piece_bytes = stored.piece_bytes
                is_likely = self._fits(stored)
            else:
                start, _ = check_head(self.path, head)
        except ImageError as error:
            raise self._explain() from error
        if start != self._start or not is_likely:
            raise self._explain()

    def read(self, spans: Sequence[Span], start: int) -> None:
        """Read what begins at this byte of the payload.  Raises ImageError, OSError."""
        self._read(_views(spans), self._start + start)

    def check(self, spans: Sequence[Span], piece: int) -> None:
        """Hold a piece against its digest.  Raises ImageError."""
        crc = 0
        for address, length in spans:
            crc = zlib.crc32(_shm.view(address, length, False), crc)
        if crc != self._digests[piece]:
            place = f"piece {piece}"
            if not self.is_packed:
                place += f" (bytes {piece * READ_BYTES} and on)"
            raise ImageError(
                f"{self.path} is damaged: {place} fails its digest; delete the file to pack it again"
            )

    def close(self) -> None:
        """Close the file; no read may be running."""
        for fd in (self._direct_fd, self._buffered_fd):
            if fd >= 0:
                os.close(fd)
        self._direct_fd = self._buffered_fd = -1

    # --- inside ---------------------------------------------------------------------------------
    def _open(self) -> int:
        """Open the file; return its size."""
        try:
            fd = self._direct_fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd = self._fall_back()
        return os.fstat(fd).st_size

    def _fits(self, stored: Stored) -> bool:
        return stored.stored_bytes == self.nbytes and bool(stored.piece_bytes) is self.is_packed

    def _explain(self) -> ImageError:
        """Say what is wrong with a file that is not what the load expects."""
        stored, _ = read_stored(self.path)  # raises what it finds
        return ImageError(
            f"{self.path} holds {stored.stored_bytes} bytes, {self.nbytes} were expected; "
            f"the image was replaced while the server ran"
        )

    def _fall_back(self) -> int:
        """Read through the page cache from here on: this file system refuses O_DIRECT."""
        with self._lock:
            if self._buffered_fd < 0:
                self._buffered_fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            return self._buffered_fd

    def _read(self, views: list[memoryview], at: int) -> None:
        fd = self._direct_fd if self._buffered_fd < 0 else self._buffered_fd
        while views:
            try:
                got = os.preadv(fd, views, at)
            except OSError as error:
                # Some file systems take the flag at open and refuse at the first read; and a read
                # that stopped inside a page cannot be continued with O_DIRECT.
                if error.errno != errno.EINVAL or fd != self._direct_fd:
                    raise
                fd = self._fall_back()
                continue
            if got == 0:
                raise ImageError(f"{self.path} is cut off at byte {at}")
            at += got
            views = _after(views, got)


def _views(spans: Sequence[Span]) -> list[memoryview]:
    return [_shm.view(address, length, True) for address, length in spans]


def _after(views: list[memoryview], nbytes: int) -> list[memoryview]:
    """Return what is left of the views when their first `nbytes` are done."""
    for index, view in enumerate(views):
        if nbytes < len(view):
            return [view[nbytes:], *views[index + 1 :]]
        nbytes -= len(view)
    return []


def _scratch(nbytes: int) -> memoryview:
    """Return page-aligned memory for a header, this thread's until it asks again."""
    if nbytes > _SCRATCH_BYTES:
        return memoryview(mmap.mmap(-1, nbytes))
    memory = getattr(_kept, "memory", None)
    if memory is None:
        memory = _kept.memory = mmap.mmap(-1, _SCRATCH_BYTES)
    return memoryview(memory)[:nbytes]
