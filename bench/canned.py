"""A server that does nothing: it knows every request of a plan and sends the prepared answer back.

It is the limit of all servers that speak HTTP with this load generator on this machine, and how the
load generator itself is measured.

Run as `python -m overcommit.bench.canned`, with the plan as one line on standard input; prints its
port, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, cast

import msgspec
import uvloop

from overcommit.bench.errors import BenchError
from overcommit.bench.known import KnownWorkload
from overcommit.bench.loadgen import Plan
from overcommit.bench.workload import make_workload

START_LIMIT_S: Final = 60.0
REQUESTS_MAX: Final = 100_000
_LENGTH: Final = b"content-length: "


class Book:
    """Every request of a workload, and its answer; both made when they are first needed."""

    def __init__(self, workload: KnownWorkload) -> None:
        self._answers: dict[bytes, bytes] = {}
        self._workload = workload
        count = len(workload.names) * len(workload.inputs)
        if count > REQUESTS_MAX:
            raise BenchError(f"{count} different requests are too many to prepare answers for")

    def answer(self, request: bytes) -> bytes | None:
        """Return the answer; None for bytes that are no request of the workload."""
        if not self._answers:
            work = self._workload
            for model, name in enumerate(work.names):
                for number in range(len(work.inputs)):
                    content = work.dialect.answer(name, work.expected(model, number))
                    self._answers[work.request(model, number).payload] = content
        return self._answers.get(request)


class CannedConnection(asyncio.Protocol):
    """Answers one connection."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._parts: list[bytes] = []
        self._missing = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Answer when a request is whole."""
        answer = None if self._parts else self._book.answer(data)
        if answer is None:
            if not self._parts:
                self._missing = _whole_bytes(data)
            self._parts.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            answer = self._book.answer(b"".join(self._parts))
            self._parts.clear()
        assert self._transport is not None
        if answer is None:
            self._transport.abort()  # not of the plan: the client sees a lost connection
        else:
            self._transport.write(answer)


def _whole_bytes(data: bytes) -> int:
    """Return how long the request will be that starts so; its head is there."""
    head, _, _ = data.partition(b"\r\n\r\n")
    _, found, rest = head.lower().partition(_LENGTH)
    length = int(rest.split(b"\r\n", 1)[0]) if found else 0
    return len(head) + 4 + length


@contextmanager
def canned(plan: Plan) -> Iterator[Plan]:
    """Run the server in a process of its own; yields the plan with its port."""
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "overcommit.bench.canned"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = threading.Timer(START_LIMIT_S, process.kill)
        watchdog.start()
        try:
            process.stdin.write(msgspec.json.encode(plan) + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise BenchError("the server of prepared answers did not start; see above")
        try:
            yield msgspec.structs.replace(plan, port=int(line), host="127.0.0.1")
        finally:
            process.kill()


async def _serve(plan: Plan) -> None:
    workload = make_workload(plan.workload, plan.seed)
    if not isinstance(workload, KnownWorkload):
        raise BenchError("only workloads of fixed requests have prepared answers")
    book = Book(workload)
    book.answer(b"")
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: CannedConnection(book), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.buffer.read)


def main() -> None:
    """Be the server."""
    uvloop.run(_serve(msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)))


if __name__ == "__main__":
    main()
