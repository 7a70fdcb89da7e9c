"""A client's shared memory with one server: regions, which requests use them, and when none may.

    OFF --[begin, end]: pause over, the server takes regions--> ON     (others use bodies meanwhile)
    ON --[fail]: a request was refused for its region--> OFF, for a pause
    ON --[refuse]: a region was not registered--> ON, and none is made for a pause

    a region:  created, registered, proved --[lend]--> LENT --[give_back]--> IDLE --[lend]--> LENT
               LENT --[retire]: nobody can say that the server will not write to it--> gone
               IDLE --[close], [fail], or room is needed for a larger one--> gone

A region is used by one request at a time, inputs and answer in turn at its start.  Its file is locked by
this process (`leases.py`), so that it ends with it, whatever ends it.

Invariants
 1. A region is lent only after the server has said the digest of a nonce that only the file holds.
 2. A region goes back only when the server itself has answered the request; after a timeout, a
    cancellation or a broken connection a late answer may still be written to it, and it is retired.
 3. At most REGIONS_MAX regions of together REGION_BYTES_TOTAL exist; beyond that requests use bodies.
 4. A process that was forked has none of its parent's regions, and removes none.
 5. A file is removed by close, by the garbage collector, or at exit, whichever comes first.

No sockets here: the clients send what `exchange` makes.  Safe to share between threads.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from overcommit.runtime.config import KIB, MIB
from overcommit.server import leases
from overcommit.server.clients.exchange import Inference, Received, Result, Sent, infer_result

SHARED_BYTES_MIN: Final = 512 * KIB  # from here on it is faster than a body (bench/LOG.md)
REGION_BYTES_MIN: Final = 1 * MIB
REGION_BYTES_TOTAL: Final = 512 * MIB
REGIONS_MAX: Final = 32
PAUSE_S: Final = 10.0  # without shared memory, after it was refused; doubled each time ...
PAUSE_S_MAX: Final = 640.0  # ... up to this long
ASK_TIMEOUT_S: Final = 5.0  # of what only shared memory needs
ANSWERS_MAX: Final = 1024  # models whose answers' lengths are remembered


class Region:
    """A file of shared memory, mapped here and locked by this process."""

    def __init__(self, nbytes: int) -> None:
        """Raises OSError when there is no room, or no such memory."""
        self.nbytes = nbytes
        file, self.name = leases.create(nbytes)
        try:
            self._memory = mmap.mmap(file, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            nonce = os.urandom(leases.NONCE_BYTES)
            self._memory[: len(nonce)] = nonce
        except BaseException:
            _remove(file, self.name, os.getpid())
            raise
        self.proof = leases.proof_of(nonce)
        self._end = weakref.finalize(self, _remove, file, self.name, os.getpid())
        self.owner: _Books | None = None  # who counts it
        self.generation = 0

    @property
    def view(self) -> memoryview:
        """Its bytes."""
        return memoryview(self._memory)

    def write(self, data: Sequence[bytes | memoryview]) -> None:
        """Put tensors one behind the other at its start."""
        at = 0
        for each in data:
            self._memory[at : at + len(each)] = each
            at += len(each)

    def close(self) -> None:
        """Remove the file and let go of the memory."""
        self._end()
        # An error on its way up may still hold a view; the memory goes with it.
        with contextlib.suppress(BufferError):
            self._memory.close()


def _remove(file: int, name: str, pid: int) -> None:
    if os.getpid() == pid:
        leases.remove(file, name)
    os.close(file)


@dataclass(slots=True, eq=False)
class _Books:
    """What belongs to one process; a fork begins anew."""

    pid: int
    idle: list[Region]
    count: int = 0  # regions, lent ones and those being made among them
    nbytes: int = 0
    is_on: bool = False
    is_asking: bool = False
    ask_s: float = 0.0  # when the server may be asked again
    make_s: float = 0.0  # when a region may be made again
    pause_s: float = PAUSE_S
    generation: int = 0  # regions of a former one do not come back


class Sharing:
    """See the module."""

    def __init__(self, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._books = _Books(os.getpid(), [])
        self._answers: dict[str, int] = {}  # bytes of a model's last answer

    def wanted_bytes(self, inference: Inference) -> int:
        """Size of the region that this request should have; 0: its tensors are too short."""
        nbytes = max(inference.nbytes, self._answers.get(inference.path, 0))
        if not SHARED_BYTES_MIN <= nbytes <= REGION_BYTES_TOTAL:
            return 0
        return max(REGION_BYTES_MIN, 1 << (nbytes - 1).bit_length())

    def learn(self, inference: Inference, result: Result) -> None:
        """Remember how long the answer was."""
        nbytes = sum(array.nbytes for array in result.values() if array.dtype != object)
        if nbytes < SHARED_BYTES_MIN and inference.path not in self._answers:
            return
        if len(self._answers) >= ANSWERS_MAX:
            self._answers.clear()
        self._answers[inference.path] = nbytes

    # --- whether ---------------------------------------------------------------------------------
    @property
    def is_on(self) -> bool:
        """Whether regions may be lent and made."""
        return self._own().is_on

    def begin(self) -> bool:
        """Whether the caller is the one to ask the server now; then it calls `end`."""
        books = self._own()
        if books.is_on or books.is_asking or self._clock_s() < books.ask_s:
            return False
        with self._lock:
            if books.is_on or books.is_asking:
                return False
            books.is_asking = True
        leases.remove_leftovers()
        return True

    def end(self, is_on: bool) -> None:
        """The server has said whether it takes regions."""
        books = self._own()
        with self._lock:
            books.is_asking, books.is_on = False, is_on
            if not is_on:
                books.ask_s = self._pause(books)

    def refuse(self, region: Region) -> None:
        """The server has not registered a region, or has seen another: retire it, and wait."""
        books = self._own()
        with self._lock:
            books.make_s = self._pause(books)
        self.retire(region)

    def _pause(self, books: _Books) -> float:
        pause_s, books.pause_s = books.pause_s, min(2 * books.pause_s, PAUSE_S_MAX)
        return self._clock_s() + pause_s

    def fail(self) -> list[Region]:
        """Regions are of no use now: none is lent for a while.  Returns those that were idle."""
        books = self._own()
        with self._lock:
            books.is_on = False
            books.ask_s = self._pause(books)
            return self._take_idle(books)

    def close(self) -> list[Region]:
        """Forget all regions, those that are lent as soon as they are back; return the idle ones."""
        books = self._own()
        with self._lock:
            books.is_on = False
            books.ask_s = books.make_s = 0.0
            return self._take_idle(books)

    def _take_idle(self, books: _Books) -> list[Region]:
        idle, books.idle = books.idle, []
        books.generation += 1
        books.count -= len(idle)
        books.nbytes -= sum(each.nbytes for each in idle)
        return idle

    # --- regions ---------------------------------------------------------------------------------
    def lend(self, nbytes: int) -> Region | None:
        """Return an idle region of this size or larger."""
        books = self._own()
        with self._lock:
            fitting = [each for each in books.idle if each.nbytes >= nbytes]
            if not fitting:
                return None
            region = min(fitting, key=lambda each: each.nbytes)
            books.idle.remove(region)
            return region

    def make(self, nbytes: int) -> tuple[Region | None, list[Region]]:
        """Make a region, to be registered by the caller; it is lent to the caller then.

        Returns it, or None when there is no room, and idle ones that had to go: the caller unregisters
        and closes them.
        """
        books = self._own()
        gone: list[Region] = []
        with self._lock:
            if self._clock_s() < books.make_s:
                return None, gone
            while books.count >= REGIONS_MAX or books.nbytes + nbytes > REGION_BYTES_TOTAL:
                if not books.idle:
                    return None, gone
                region = books.idle.pop(0)
                books.count -= 1
                books.nbytes -= region.nbytes
                gone.append(region)
            books.count += 1
            books.nbytes += nbytes
            generation = books.generation
        try:
            region = Region(nbytes)
        except (OSError, ValueError):
            with self._lock:
                books.count -= 1
                books.nbytes -= nbytes
                books.make_s = self._pause(books)
            return None, gone
        region.owner, region.generation = books, generation
        return region, gone

    def give_back(self, region: Region) -> None:
        """The server has answered: the region may be lent to the next."""
        books = self._own()
        with self._lock:
            if region.owner is books and region.generation == books.generation:
                books.idle.append(region)
                books.pause_s = PAUSE_S
                return
        self.retire(region)

    def retire(self, region: Region) -> None:
        """Let go of a region; the server forgets it when it sees that nobody holds its lock."""
        books = self._own()
        with self._lock:
            if region.owner is books:
                region.owner = None
                books.count -= 1
                books.nbytes -= region.nbytes
        region.close()

    def _own(self) -> _Books:
        books = self._books
        if books.pid != os.getpid():  # a fork: the lock may be held by a thread that is not here
            self._lock = threading.Lock()
            self._books = books = _Books(os.getpid(), [])
        return books


# --- what both clients do with what comes back ---------------------------------------------------
def is_refusal(received: Received) -> bool:
    """Whether it may be the region that the server does not like."""
    return received.status in (400, 403, 404)


def sent_in(region: Region, inference: Inference) -> Sent:
    """Put the tensors into the region, and make the request that says so."""
    region.write(inference.tensors)
    return inference.in_region(region.name, region.nbytes)


def result_of(received: Received, region: Region) -> Result:
    """Read an answer; every array is a copy.  Raises as `infer_result`."""
    with region.view as view:
        return infer_result(received, view)
