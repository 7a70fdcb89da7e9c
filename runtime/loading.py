"""One load: bytes of an image from disk into an arena, and on into another.

A load is cut into steps.  From disk: its file is opened, then pieces of READ_BYTES are read straight
into the arena with O_DIRECT (no page cache, no bounce), and each piece that was read is settled by
another thread, checked against its digest and copied on to DEVICE, while later ones are read.  An
image of one piece takes one step: nothing could overlap, and every hand-over costs.  From HOST: ranges
are copied, long ones first, so that all who copy end together.  Where the CPU cannot touch DEVICE, a
piece that has no place on HOST is read into a stage, and settled by who read it.

Bytes [start, start + nbytes) of a step are always raw ones.  Of a packed payload a step is a piece, or
blocks of one; it is read and kept as it is stored, and decoded to DEVICE.  Without a place on HOST it is
read into a stage, whatever DEVICE is.

State machine of a load

    QUEUED ---[take_read, long]-----> OPENING --[finish]--> RUNNING
    QUEUED ---[take_read, short]----> RUNNING
    QUEUED ---[take_copy, host or device]--> RUNNING
    RUNNING --[finish, nothing is left and none runs]-----> DONE
    QUEUED | OPENING | RUNNING --[cancel | finish, with an error]--> FAILING
    FAILING --[cancel | finish, the last that ran]--> FAILED

Invariants
 1. A step is taken by one thread, once.  A load is DONE or FAILED only when no step of it runs:
    only then may its extents be used for anything else.
 2. A load that is DONE has had every byte read, checked if asked, and copied.
 3. `take_*`, `finish` and `cancel` are called under the mover's lock; `run` is called without it,
    by several threads at once, and changes nothing but what its file guards itself.
 4. Extents are checked against the arenas before the first step: a wrong one fails its load, it
    does not kill the mover.
 5. What was decoded from a piece is held against the piece's digest, if the load is checked; then
    steps are whole pieces.
 6. At most READS_IN_FLIGHT reads of a load run, PREFETCH_READS_IN_FLIGHT of one nobody waits for.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from overcommit.runtime import _shm
from overcommit.runtime.config import (
    COPY_BYTES_MAX,
    COPY_BYTES_MIN,
    COPY_THREADS_MAX,
    PAGE_BYTES,
    PIECE_BYTES_MAX,
    READ_BYTES,
    READS_IN_FLIGHT,
    UNPACK_STEP_BYTES,
)
from overcommit.runtime.container import unreadable
from overcommit.runtime.copier import MEMCPY, Copier
from overcommit.runtime.errors import ImageError
from overcommit.runtime.image_file import ImageFile, Span
from overcommit.runtime.mover_messages import CANCELLED, Load, LoadDone, Urgency
from overcommit.runtime.packed import BLOCK_BYTES, Head, Pieces, check_decoded, find_pieces
from overcommit.runtime.places import Base, Places
from overcommit.runtime.prefetch_limits import PREFETCH_READS_IN_FLIGHT
from overcommit.runtime.wall import Wall

# Where DEVICE is host memory; more threads than cores copy no faster.
COPY_THREADS: Final = min(COPY_THREADS_MAX, len(os.sched_getaffinity(0)))


class State(enum.Enum):
    """Where a load is."""

    QUEUED = enum.auto()
    OPENING = enum.auto()
    RUNNING = enum.auto()
    FAILING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


class Work(enum.Enum):
    """What a step does."""

    OPEN = enum.auto()  # the file
    WHOLE = enum.auto()  # open, read and settle an image of one piece
    READ = enum.auto()  # a piece
    SETTLE = enum.auto()  # check a piece that was read, copy it on
    COPY = enum.auto()  # a range of the host copy


READING = frozenset((Work.OPEN, Work.WHOLE, Work.READ))


@dataclass(slots=True, frozen=True)
class Step:
    """A piece of work on bytes [start, start + nbytes) of the image."""

    work: Work
    start: int = 0
    nbytes: int = 0


@dataclass(slots=True)
class Outcome:
    """What one step did."""

    error: str = ""
    read_bytes: int = 0
    read: Wall = field(default_factory=Wall)
    copy: Wall = field(default_factory=Wall)
    all: Wall = field(default_factory=Wall)


class LoadState:
    """One load under way."""

    def __init__(
        self, load: Load, device: Base | None, host: Base | None, copier: Copier = MEMCPY
    ) -> None:
        """Raise ImageError when the message cannot be served."""
        self.load = load
        self._copier = copier
        self.state = State.QUEUED
        self.urgency: Urgency = load.urgency
        self.total = Outcome()
        self.done_bytes = 0
        self._received_ns = time.monotonic_ns()
        if load.nbytes <= 0:
            raise ImageError(f"a load of {load.nbytes} bytes")
        stored = load.packed_bytes or load.nbytes
        self._host = None if load.host is None else Places(host, load.host, stored)
        self._device = None if load.device is None else Places(device, load.device, load.nbytes)
        if self._device is None and (self._host is None or load.source == "host"):
            raise ImageError(f"a load from {load.source} to nowhere")
        if self._host is None and load.source == "host":
            raise ImageError("a load from host that does not say where there")
        if load.source == "device" and (None in (self._host, self._device) or load.packed_bytes):
            raise ImageError("a copy from device to host needs places of raw bytes on both")
        self._file = ImageFile(load.path, stored, is_packed=self._is_packed)
        self._pieces = self._find_pieces(stored)  # of a packed payload, once its file is open
        self._next = 0  # the first byte that nobody has taken yet
        self._read: collections.deque[Step] = collections.deque()  # SETTLE steps to take
        self._running = 0
        self._reads = 0  # of those that run

    def _find_pieces(self, stored: int) -> Pieces | None:
        if not self._is_packed:
            return None
        if self.load.source == "host":
            assert self._host is not None
            return find_pieces(self._host.spans(0, stored), self.load.nbytes)
        return Pieces((stored,)) if self.load.nbytes <= READ_BYTES else None

    def __repr__(self) -> str:
        return (
            f"<LoadState job {self.load.job} {self.urgency} {self.state.name} "
            f"{self.done_bytes}/{self.load.nbytes}>"
        )

    @property
    def is_over(self) -> bool:
        """DONE or FAILED."""
        return self.state in (State.DONE, State.FAILED)

    @property
    def is_near_end(self) -> bool:
        """Whether one step runs and none is left to take."""
        is_taken = self._next == self.load.nbytes and not self._read
        return is_taken and self._running == 1 and self.state is State.RUNNING

    @property
    def wants_disk(self) -> bool:
        """Whether reads run or are left to take, now or later."""
        if self.load.source != "disk" or self.state is State.FAILING:
            return self._reads > 0
        return self._reads > 0 or self._next < self.load.nbytes

    # --- under the mover's lock -----------------------------------------------------------------
    def take_read(self) -> Step | None:
        """Take the next step that reads the disk; None when there is none to take now."""
        if self.load.source != "disk":
            return None
        if self.state is State.QUEUED:
            if self.load.nbytes <= READ_BYTES:
                self.state = State.RUNNING
                return self._take(Work.WHOLE, self.load.nbytes)
            self.state = State.OPENING
            return self._take(Work.OPEN, 0)
        is_prefetch = self.urgency == "prefetch"
        limit = PREFETCH_READS_IN_FLIGHT if is_prefetch else READS_IN_FLIGHT
        left = self.load.nbytes - self._next
        if self.state is not State.RUNNING or not left or self._reads >= limit:
            return None
        return self._take(Work.READ, min(READ_BYTES, left))

    def take_copy(self) -> Step | None:
        """Take the next step that needs no disk; None when there is none to take now."""
        if self._read and self.state is State.RUNNING:
            self._running += 1
            return self._read.popleft()
        if self.load.source == "disk" or self.state not in (State.QUEUED, State.RUNNING):
            return None
        self.state = State.RUNNING
        left = self.load.nbytes - self._next
        if not left:
            return None
        # Guided self-scheduling: a share of what is left, so that nobody waits long for the last.
        share = -(-left // (2 * COPY_THREADS) // PAGE_BYTES) * PAGE_BYTES
        if self._pieces is not None:
            return self._take(Work.COPY, min(left, self._run_of_blocks(self._pieces, share)))
        return self._take(Work.COPY, min(left, max(COPY_BYTES_MIN, min(COPY_BYTES_MAX, share))))

    def _run_of_blocks(self, pieces: Pieces, share: int) -> int:
        """Return what to decode next: what is left of a piece, or part of it where that is as cheap."""
        rest = READ_BYTES - self._next % READ_BYTES
        assert self._host is not None
        is_whole = self.load.verify or self._copier.is_remote
        if is_whole or len(self._host.spans(*pieces.of(self._next))) > 1:
            return rest
        return min(rest, max(UNPACK_STEP_BYTES, share // UNPACK_STEP_BYTES * UNPACK_STEP_BYTES))

    def _take(self, work: Work, nbytes: int) -> Step:
        step = Step(work, self._next, nbytes)
        self._next += nbytes
        self._running += 1
        self._reads += work in READING
        return step

    def finish(self, step: Step, outcome: Outcome) -> bool:
        """A step ended; True when the whole load has."""
        self._running -= 1
        self._reads -= step.work in READING
        self.total.error = self.total.error or outcome.error
        self.total.read_bytes += outcome.read_bytes
        self.total.read.add(outcome.read)
        self.total.copy.add(outcome.copy)
        self.total.all.add(outcome.all)
        if self.total.error:
            self._fail()
            return self.is_over
        if step.work is Work.READ and self._has_to_settle:
            self._read.append(Step(Work.SETTLE, step.start, step.nbytes))
        else:
            self.done_bytes += step.nbytes
        if self.state is State.OPENING:
            self.state = State.RUNNING
        elif self.done_bytes == self.load.nbytes:
            assert not self._running
            self.state = State.DONE
        return self.is_over

    def cancel(self) -> bool:
        """Take no more steps; True when the whole load has ended by that."""
        self.total.error = self.total.error or CANCELLED
        self._fail()
        return self.is_over

    def _fail(self) -> None:
        self.state = State.FAILING if self._running else State.FAILED

    def close(self) -> LoadDone:
        """Release the file; say how it went."""
        assert not self._running
        is_direct = self._file.is_direct
        self._file.close()
        return LoadDone(
            job=self.load.job,
            ok=self.state is State.DONE,
            message=self.total.error,
            read_bytes=self.total.read_bytes,
            read_began_ns=self.total.read.began_ns,
            read_ns=self.total.read.ended_ns - self.total.read.began_ns,
            copy_began_ns=self.total.copy.began_ns,
            copy_ns=self.total.copy.ended_ns - self.total.copy.began_ns,
            direct=is_direct,
            received_ns=self._received_ns,
            began_ns=self.total.all.began_ns,
            ended_ns=self.total.all.ended_ns,
        )

    # --- in a thread of the mover ---------------------------------------------------------------
    def run(self, step: Step) -> Outcome:
        """Do one step."""
        outcome = Outcome()
        with outcome.all.measure():
            try:
                self._run(step, outcome)
            except ImageError as error:
                outcome.error = error.message
            except OSError as error:
                outcome.error = unreadable(self.load.path, error)
        return outcome

    def rehearse(self) -> None:
        """Do all of a copy's first step but the copy; only for a load that nobody has begun."""
        step = self.take_copy()
        if step is None:
            return
        outcome = Outcome()
        with outcome.all.measure(), self._near(step), outcome.copy.measure():
            assert self._device is not None, "a load from HOST goes to DEVICE"
            self._device.spans(step.start, step.nbytes)

    def _run(self, step: Step, outcome: Outcome) -> None:
        if step.work is Work.OPEN:
            with outcome.read.measure():
                self._file.open(self.load.verify)
            if self._is_packed:
                self._pieces = self._pieces_of_file()
            return
        if self.load.source == "device":
            assert self._device is not None
            assert self._host is not None
            where = (step.start, step.nbytes)
            with outcome.copy.measure():
                self._copier.fetch(
                    self._device.spans(*where), self._host.spans(*where), self.urgency
                )
            return
        with self._near(step) as spans:
            if step.work in READING:
                self._read_into(spans, step, outcome)
            if step.work is not Work.READ or not self._has_to_settle:
                self._settle(spans, step, outcome)

    def _pieces_of_file(self) -> Pieces:
        sizes = self._file.piece_bytes
        if len(sizes) != -(-self.load.nbytes // READ_BYTES) or max(sizes) > PIECE_BYTES_MAX:
            raise ImageError(
                f"{self.load.path} has {len(sizes)} packed pieces, too few, too many or too long for "
                f"{self.load.nbytes} bytes; delete it to pack it again"
            )
        return Pieces(sizes)

    def _stored(self, step: Step) -> tuple[int, int]:
        """Return (start, bytes) of what the file and HOST hold for a step."""
        return (step.start, step.nbytes) if self._pieces is None else self._pieces.of(step.start)

    @contextlib.contextmanager
    def _near(self, step: Step) -> Iterator[list[Span]]:
        """Yield where the step's stored bytes lie, or will, in memory that the CPU can touch."""
        start, nbytes = self._stored(step)
        if self._is_staged:
            if nbytes > PIECE_BYTES_MAX:
                raise ImageError(f"{self.load.path} has a piece of {nbytes} bytes")
            with self._copier.stage() as address:
                yield [(address, nbytes)]
        else:
            places = self._host or self._device
            assert places is not None
            yield places.spans(start, nbytes)

    def _read_into(self, spans: list[Span], step: Step, outcome: Outcome) -> None:
        with outcome.read.measure():
            if step.work is Work.WHOLE:
                self._file.open(self.load.verify, spans)
            else:
                self._file.read(spans, self._stored(step)[0])
        outcome.read_bytes = self._stored(step)[1]

    def _settle(self, spans: list[Span], step: Step, outcome: Outcome) -> None:
        """Check what was read, copy it on."""
        if self.load.verify and step.work is not Work.COPY:
            self._file.check(spans, step.start // READ_BYTES)
        if self._goes_on:
            assert self._device is not None
            targets = self._device.spans(step.start, step.nbytes)
            with outcome.copy.measure():
                if self._is_packed:
                    self._unpack(spans, targets, step.start % READ_BYTES // BLOCK_BYTES)
                else:
                    self._copier.copy(spans, targets, self.urgency)

    def _unpack(self, spans: list[Span], targets: list[Span], first: int) -> None:
        self._copier.unpack(spans, targets, first, self.urgency)
        if self.load.verify:
            with self._copier.read_back(targets, self.urgency) as found:
                check_decoded(Head.parse(_shm.view(*spans[0], False)), found)

    @property
    def _is_packed(self) -> bool:
        """Whether the file and HOST hold the packed form."""
        return self.load.packed_bytes > 0

    @property
    def _is_staged(self) -> bool:
        """Whether what is read has to pass through a stage, because no place of it is near."""
        return self._host is None and (self._copier.is_remote or self._is_packed)

    @property
    def _goes_on(self) -> bool:
        """Whether bytes go from HOST, or from a stage, to DEVICE."""
        return self._device is not None and (self._host is not None or self._is_staged)

    @property
    def _has_to_settle(self) -> bool:
        """Whether a piece that was read is settled by another thread.  A stage is not handed on."""
        return not self._is_staged and (self.load.verify or self._goes_on)
