"""Clients with deadlines that do as they are told: who is refused comes back at the time it was told.

A closed loop of connections, each with one request at a time.  Every attempt has exactly one fate, and
is timed from its sending; one that was told to come back is followed by another attempt of the same
request, and it is noted whether that one is answered within its deadline: so a Retry-After is found to
be true or not.

Called by the scenario `pressure`, in its own process: the load is light.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import uvloop

from overcommit.bench.histogram import Histogram
from overcommit.bench.request import Request, Workload

EXAMPLES_MAX: Final = 5
OK: Final = 200
REFUSED: Final = 503
EXPIRED: Final = 504
UNTOLD_S: Final = 0.05  # until a client that was told nothing tries again


@dataclass(slots=True)
class Group:
    """Clients of one kind."""

    name: str
    workload: Workload
    connections: int
    timeout_ns: int = 0  # of each attempt; 0: none is said


@dataclass(slots=True)
class Book:
    """What became of a group's attempts."""

    sent: int = 0
    in_time: int = 0  # right, within the deadline
    late: int = 0  # right, after it
    refused: int = 0
    expired: int = 0
    failed: int = 0  # any other status
    wrong: int = 0
    came_back: int = 0  # attempts at the time that was told
    kept: int = 0  # of these, answered within their deadline
    lateness_ns: int = 0  # the most that any answer came after its deadline
    seconds: float = 0.0
    times: Histogram = field(default_factory=Histogram)  # of right answers
    refusals: Histogram = field(default_factory=Histogram)  # until a refusal was there
    examples: list[str] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Right answers within their deadline, a second."""
        return self.in_time / self.seconds if self.seconds else 0.0

    @property
    def truth(self) -> float:
        """The share of those that came back as told and were served in time."""
        return self.kept / self.came_back if self.came_back else 1.0

    @property
    def accounted(self) -> int:
        """Attempts whose fate is known."""
        ended = self.in_time + self.late + self.refused + self.expired
        return ended + self.failed + self.wrong

    def note(self, example: str) -> None:
        """Keep the first few."""
        if len(self.examples) < EXAMPLES_MAX:
            self.examples.append(example)


class _Client:
    def __init__(self, port: int, group: Group, book: Book, end_ns: int) -> None:
        self._port = port
        self._group = group
        self._book = book
        self._end_ns = end_ns

    async def run(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            request, is_back = self._group.workload.draw(b""), False
            while time.monotonic_ns() < self._end_ns:
                wait_s = await self._attempt(reader, writer, request, is_back)
                if wait_s is None:
                    request, is_back = self._group.workload.draw(b""), False
                else:
                    await asyncio.sleep(wait_s)
                    is_back = True
        finally:
            writer.close()

    async def _attempt(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        request: Request,
        is_back: bool,
    ) -> float | None:
        """Send it once; return in how many seconds to come back, None if it is done with."""
        book, limit_ns = self._book, self._group.timeout_ns
        book.sent += 1
        book.came_back += is_back
        sent_ns = time.monotonic_ns()
        writer.write(request.payload)
        status, headers, body = await _read(reader)
        took_ns = time.monotonic_ns() - sent_ns
        if limit_ns:
            book.lateness_ns = max(book.lateness_ns, took_ns - limit_ns)
        if status == OK:
            fault = self._group.workload.judge(request, headers, body)
            if fault is not None:
                book.wrong += 1
                book.note(fault)
                return None
            is_late = bool(limit_ns) and took_ns > limit_ns
            book.late += is_late
            book.in_time += not is_late
            book.kept += is_back and not is_late
            book.times.record(took_ns)
            return None
        if status == REFUSED:
            book.refused += 1
            book.refusals.record(took_ns)
            told = headers.get(b"retry-after-ms")
            if told is None:
                book.note(f"503 without a time: {body[:200]!r}")
                return UNTOLD_S
            return int(told) / 1000
        if status == EXPIRED:
            book.expired += 1
        else:
            book.failed += 1
            book.note(f"{status}: {body[:200]!r}")
        return None


async def _read(reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes], bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head[:-4].split(b"\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(b": ")
        headers[name.lower()] = value
    body = await reader.readexactly(int(headers[b"content-length"]))
    return int(first.split(b" ", 2)[1]), headers, body


def measure(port: int, groups: Sequence[Group], seconds: float) -> list[Book]:
    """Let all groups ask at the same time; return the books, in order."""
    return uvloop.run(_measure(port, groups, seconds))


async def _measure(port: int, groups: Sequence[Group], seconds: float) -> list[Book]:
    started_ns = time.monotonic_ns()
    end_ns = started_ns + int(seconds * 1e9)

    async def run(group: Group) -> Book:
        book = Book()
        clients = [_Client(port, group, book, end_ns).run() for _ in range(group.connections)]
        await asyncio.gather(*clients)
        # Its own end: another group may wait for its last answers much longer.
        book.seconds = (time.monotonic_ns() - started_ns) / 1e9
        return book

    return list(await asyncio.gather(*map(run, groups)))
