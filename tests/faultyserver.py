"""A server that knows every answer of a workload, in this process, and does wrong when told to."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from overcommit.bench.canned import Book
from overcommit.bench.known import KnownWorkload
from overcommit.bench.loadgen import Plan, drive
from overcommit.bench.tally import Tally
from overcommit.bench.workload import make_workload

Change = Callable[[int, bytes], bytes]  # (number of the request from 1, right answer) -> answer


@dataclass
class FaultyServer:
    """`change` makes of a right answer what is sent; `delay_s` says how long that takes."""

    plan: Plan
    change: Change = lambda number, answer: answer
    delay_s: Callable[[int], float] = lambda number: 0.0
    pieces: int = 1
    seen: list[bytes] = field(default_factory=list)

    async def drive(self, requests: int, plan: Plan | None = None) -> Tally:
        """Drive the plan until the server has seen that many requests, or the plan ends."""
        self._stop, self._requests = threading.Event(), requests
        async with self._running() as port:
            plan = replace(plan or self.plan, port=port)
            return await drive(plan, make_workload(plan.workload, plan.seed), self._stop)

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[int]:
        workload = make_workload(self.plan.workload, 0)
        assert isinstance(workload, KnownWorkload)
        self._book = Book(workload)
        self._gate = asyncio.Lock()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                request = head + await reader.readexactly(length)
                self.seen.append(request)
                number = len(self.seen)
                if number >= self._requests:
                    self._stop.set()
                answer = self._book.answer(request)
                assert answer is not None, request
                async with self._gate:  # one at a time: a stall holds up everybody
                    if delay_s := self.delay_s(number):
                        await asyncio.sleep(delay_s)
                answer = self.change(number, answer)
                step = -(-len(answer) // self.pieces)
                for at in range(0, len(answer), step):
                    writer.write(answer[at : at + step])
                    await writer.drain()
                    if self.pieces > 1:
                        await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def run(server: FaultyServer, requests: int = 300) -> Tally:
    """Drive a server's plan."""
    return asyncio.run(server.drive(requests))
