"""One load: bytes of an image from disk into an arena, and on into another.

A load is cut into steps: its image is opened, then pieces of READ_BYTES are moved.  A piece is read
straight into the arena with O_DIRECT (no page cache, no bounce), checked against its digest, and
copied on to DEVICE while other threads read later pieces.

State machine of a load

    QUEUED ---[take, disk]---> OPENING --[finish]--> RUNNING --[finish, the last piece]--> DONE
    QUEUED ---[take, host]-------------------------> RUNNING
    OPENING | RUNNING --[finish, with an error]--> FAILING --[finish, the last that ran]--> FAILED

Invariants
 1. A step is taken by one thread, once.  A load is DONE or FAILED only when no step of it runs:
    only then may its extents be used for anything else.
 2. A load that is DONE has had every byte read, checked if asked, and copied.
 3. `take` and `finish` are called under the mover's lock; `run` is called without it, by several
    threads at once, and changes nothing that another thread reads but the fall-back descriptor.
 4. Extents are checked against the arenas before the first step: a wrong one fails its load, it
    does not kill the mover.
"""

from __future__ import annotations

import bisect
import contextlib
import enum
import errno
import itertools
import os
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from overcommit.runtime import _shm
from overcommit.runtime.config import READ_BYTES
from overcommit.runtime.errors import ImageError
from overcommit.runtime.image import read_header
from overcommit.runtime.messages import Extents, Load, LoadDone

OPEN: Final = -1  # the step before piece 0
Span = tuple[int, int]  # address or offset, length


class State(enum.Enum):
    """Where a load is."""

    QUEUED = enum.auto()
    OPENING = enum.auto()
    RUNNING = enum.auto()
    FAILING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


@dataclass(slots=True, frozen=True)
class Base:
    """An arena as it is mapped here."""

    name: str
    address: int
    nbytes: int


class Places:
    """Where the bytes of one image lie in one arena."""

    def __init__(self, base: Base | None, extents: Extents, nbytes: int) -> None:
        """Raise ImageError for extents that leave the arena or are too short for the image."""
        if base is None:
            raise ImageError("the load names an arena that this server does not have")
        for offset, length in extents:
            if offset < 0 or length <= 0 or offset + length > base.nbytes:
                raise ImageError(
                    f"extent ({offset}, {length}) is not inside the {base.name} arena "
                    f"of {base.nbytes} bytes"
                )
        self._base = base.address
        self._extents = extents
        # _ends[i]: how many bytes of the image the extents up to and with i hold.
        self._ends = list(itertools.accumulate(length for _, length in extents))
        if not extents or self._ends[-1] < nbytes:
            raise ImageError(f"the {base.name} extents are too short for {nbytes} bytes")

    def spans(self, start: int, nbytes: int) -> list[Span]:
        """Return (address, length) of what holds bytes [start, start + nbytes) of the image."""
        spans = []
        index = bisect.bisect_right(self._ends, start)
        while nbytes:
            offset, length = self._extents[index]
            inside = start - (self._ends[index] - length)
            part = min(nbytes, length - inside)
            spans.append((self._base + offset + inside, part))
            start, nbytes, index = start + part, nbytes - part, index + 1
        return spans


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


@dataclass(slots=True)
class Outcome:
    """What one step did."""

    error: str = ""
    read_bytes: int = 0
    read: Wall = field(default_factory=Wall)
    copy: Wall = field(default_factory=Wall)


class LoadState:
    """One load under way."""

    def __init__(self, load: Load, device: Base | None, host: Base | None) -> None:
        """Raise ImageError when the message cannot be served."""
        self.load = load
        self.state = State.QUEUED
        self.total = Outcome()
        self.pieces = -(-load.nbytes // READ_BYTES)
        if load.nbytes <= 0:
            raise ImageError(f"a load of {load.nbytes} bytes")
        self._host = None if load.host is None else Places(host, load.host, load.nbytes)
        self._device = None if load.device is None else Places(device, load.device, load.nbytes)
        if self._device is None and (self._host is None or load.source == "host"):
            raise ImageError(f"a load from {load.source} to nowhere")
        if self._host is None and load.source == "host":
            raise ImageError("a load from host that does not say where there")
        self._next_piece = 0
        self._running = 0
        self._digests: tuple[int, ...] = ()
        self._payload_offset = 0
        self._fds_lock = threading.Lock()
        self._direct_fd = -1
        self._buffered_fd = -1

    def __repr__(self) -> str:
        return f"<LoadState job {self.load.job} {self.state.name} {self._next_piece}/{self.pieces}>"

    # --- under the mover's lock -----------------------------------------------------------------
    def take(self) -> int | None:
        """Take the next step, OPEN or a piece; None when there is none to take now."""
        if self.state is State.QUEUED and self.load.source == "disk":
            self.state = State.OPENING
            self._running += 1
            return OPEN
        if self.state is State.QUEUED:
            self.state = State.RUNNING
        if self.state is not State.RUNNING or self._next_piece == self.pieces:
            return None
        self._next_piece += 1
        self._running += 1
        return self._next_piece - 1

    def finish(self, outcome: Outcome) -> bool:
        """A step ended; True when the whole load has."""
        self._running -= 1
        self.total.error = self.total.error or outcome.error
        self.total.read_bytes += outcome.read_bytes
        self.total.read.add(outcome.read)
        self.total.copy.add(outcome.copy)
        if self.total.error:
            self.state = State.FAILING if self._running else State.FAILED
        elif self.state is State.OPENING:
            self.state = State.RUNNING
        elif self._next_piece == self.pieces and not self._running:
            self.state = State.DONE
        return self.state in (State.DONE, State.FAILED)

    def close(self) -> LoadDone:
        """Release the file; say how it went."""
        assert not self._running
        is_direct = self._direct_fd >= 0 and self._buffered_fd < 0
        for fd in (self._direct_fd, self._buffered_fd):
            if fd >= 0:
                os.close(fd)
        self._direct_fd = self._buffered_fd = -1
        return LoadDone(
            job=self.load.job,
            ok=self.state is State.DONE,
            message=self.total.error,
            read_bytes=self.total.read_bytes,
            read_ns=self.total.read.ended_ns - self.total.read.began_ns,
            copy_ns=self.total.copy.ended_ns - self.total.copy.began_ns,
            direct=is_direct,
        )

    # --- in an I/O thread -----------------------------------------------------------------------
    def run(self, step: int) -> Outcome:
        """Do one step."""
        outcome = Outcome()
        try:
            if step == OPEN:
                self._open()
            else:
                self._run_piece(step, outcome)
        except ImageError as error:
            outcome.error = error.message
        except OSError as error:
            outcome.error = f"{self.load.path} cannot be read: {error.strerror}"
        return outcome

    def _open(self) -> None:
        path = self.load.path
        header, self._payload_offset = read_header(path)
        if header.nbytes != self.load.nbytes:
            raise ImageError(
                f"{path} holds {header.nbytes} bytes, {self.load.nbytes} were expected; "
                f"the image was replaced while the server ran"
            )
        self._digests = header.piece_digests
        try:
            self._direct_fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fall_back()

    def _fall_back(self) -> int:
        """Read through the page cache from here on: this file system refuses O_DIRECT."""
        with self._fds_lock:
            if self._buffered_fd < 0:
                self._buffered_fd = os.open(self.load.path, os.O_RDONLY | os.O_CLOEXEC)
            return self._buffered_fd

    def _run_piece(self, piece: int, outcome: Outcome) -> None:
        load = self.load
        start = piece * READ_BYTES
        nbytes = min(READ_BYTES, load.nbytes - start)
        if load.source == "disk":
            places = self._host or self._device
            assert places is not None
            spans = places.spans(start, nbytes)
            with outcome.read.measure():
                self._read(spans, start)
            outcome.read_bytes = nbytes
            if load.verify:
                self._check(spans, piece)
        if self._host is not None and self._device is not None:
            with outcome.copy.measure():
                copy(self._host.spans(start, nbytes), self._device.spans(start, nbytes))

    def _read(self, spans: list[Span], start: int) -> None:
        views = [_shm.view(address, length, True) for address, length in spans]
        at = self._payload_offset + start
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
                raise ImageError(f"{self.load.path} is cut off at byte {at}")
            at += got
            views = _after(views, got)

    def _check(self, spans: list[Span], piece: int) -> None:
        crc = 0
        for address, length in spans:
            crc = zlib.crc32(_shm.view(address, length, False), crc)
        if crc != self._digests[piece]:
            raise ImageError(
                f"{self.load.path} is damaged: piece {piece} (bytes {piece * READ_BYTES} and on) "
                f"fails its digest; delete the file to pack it again"
            )


def copy(sources: list[Span], targets: list[Span]) -> None:
    """Copy between two lists of spans that are equally long in sum, cut differently."""
    to = iter(targets)
    to_at, to_left = 0, 0
    for from_at, from_left in sources:
        while from_left:
            if not to_left:
                to_at, to_left = next(to)
            part = min(from_left, to_left)
            _shm.copy(to_at, from_at, part)
            from_at, from_left = from_at + part, from_left - part
            to_at, to_left = to_at + part, to_left - part


def _after(views: list[memoryview], nbytes: int) -> list[memoryview]:
    """Return what is left of the views when their first `nbytes` are done."""
    for index, view in enumerate(views):
        if nbytes < len(view):
            return [view[nbytes:], *views[index + 1 :]]
        nbytes -= len(view)
    return []
