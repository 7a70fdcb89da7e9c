"""One keep-alive connection of the load generator: sends a request, judges the answer, goes on.

Callbacks only, no task per request: at ten thousand requests a second the harness shares its cores
with the server, and each task switch would be taken from it.

Invariants
 1. At most one request is in flight, and each that was sent gets exactly one fate in the tally.
 2. An answer is judged before the next request is drawn; an answer that belongs to no request is
    counted as unexpected, never dropped.

State machine

    CLOSED --open--> CONNECTING --connection_made--> WAITING --answer--> WAITING | CLOSED
    WAITING --connection_lost, timeout--> CLOSED --while the run goes on--> CONNECTING

Called by `loadgen`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Final, cast

import httptools

from overcommit.bench.histogram import Histogram
from overcommit.bench.tally import LOST, WRONG, Tally
from overcommit.bench.wire import ID_CHARS
from overcommit.bench.workload import Request, Workload

RECONNECT_S: Final = 0.02
OK: Final = 200


@dataclass(slots=True)
class Run:
    """What the connections of one process share."""

    host: str
    port: int
    workload: Workload
    seed: int
    reconnect: bool = True
    is_stopping: bool = False
    tally: Tally = field(default_factory=Tally)
    times: Histogram = field(default_factory=Histogram)
    last_answer_ns: int = 0
    _counter: int = 0

    def next_id(self) -> bytes:
        """Return an id that no other request of the whole run has."""
        self._counter += 1
        return b"%06x%010x" % (self.seed & 0xFFFFFF, self._counter)

    def on_answer(self, now_ns: int) -> None:
        """Note the time of an answer."""
        if not self.is_stopping:
            self.tally.silence_ns = max(self.tally.silence_ns, now_ns - self.last_answer_ns)
            self.last_answer_ns = now_ns

    def stop(self, now_ns: int) -> None:
        """Let every connection end after the answer that it waits for."""
        self.on_answer(now_ns)  # a silence that lasts to the end counts
        self.tally.ended_ns = now_ns
        self.is_stopping = True


assert ID_CHARS == 16


class Connection(asyncio.Protocol):
    """See the module."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._finished: list[tuple[int, bool, dict[bytes, bytes], bytes]] = []
        self._request: Request | None = None
        self._sent_ns = 0
        self._opener: asyncio.Task[None] | None = None
        self.is_done = False

    # --- opening and closing --------------------------------------------------------------------
    def open(self) -> None:
        """Start to connect."""
        self._opener = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        """Connect, trying again until it works or the run stops."""
        run = self._run
        loop = asyncio.get_running_loop()
        while not run.is_stopping:
            run.tally.connects += 1
            try:
                await loop.create_connection(lambda: self, run.host, run.port)
                return
            except OSError as error:
                run.tally.connect_errors += 1
                run.tally.note(f"connect: {error}")
                if not run.reconnect:
                    break
                await asyncio.sleep(RECONNECT_S)
        self.is_done = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpResponseParser(self)
        self._headers, self._parts, self._finished = {}, [], []
        self._send_next(time.monotonic_ns())

    def connection_lost(self, exc: Exception | None) -> None:
        """Count what was in flight as broken; open again."""
        self._transport = None
        run = self._run
        if self._request is not None:
            run.tally.broken += 1
            run.tally.note(f"{self._request.target}: {LOST}: {exc or 'closed by the server'}")
            self._request = None
        if run.is_stopping or not run.reconnect:
            self.is_done = True
        elif not self.is_done:
            self.open()

    def close(self) -> None:
        """End this connection; whatever is in flight counts as broken."""
        if self._transport is not None:
            self._transport.abort()
        else:
            self.is_done = True

    # --- requests -------------------------------------------------------------------------------
    def _send_next(self, now_ns: int) -> None:
        run, transport = self._run, self._transport
        assert transport is not None
        if run.is_stopping:
            transport.close()
            return
        self._request = run.workload.draw(run.next_id())
        run.tally.sent += 1
        self._sent_ns = now_ns
        transport.write(self._request.payload)

    def expire(self, now_ns: int, timeout_ns: int) -> None:
        """Give a request up that has waited too long."""
        if self._request is not None and now_ns - self._sent_ns > timeout_ns:
            tally = self._run.tally
            tally.unanswered += 1
            tally.note(f"{self._request.target}: no answer within {timeout_ns / 1e9:.0f} s")
            self._request = None
            self.close()

    # --- answers --------------------------------------------------------------------------------
    def data_received(self, data: bytes) -> None:
        """Parse; handle the answers that are complete."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error!r}")
            return
        finished, self._finished = self._finished, []
        for status, keep_alive, headers, body in finished:
            self._on_answer(status, keep_alive, headers, body)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; called by the parser."""
        self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body; called by the parser."""
        self._parts.append(body)

    def on_message_complete(self) -> None:
        """Put the answer aside: an error in a parser's callback would lose its traceback."""
        parser = self._parser
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._finished.append(
            (parser.get_status_code(), parser.should_keep_alive(), self._headers, body)
        )
        self._headers, self._parts = {}, []

    def _on_answer(
        self, status: int, keep_alive: bool, headers: dict[bytes, bytes], body: bytes
    ) -> None:
        now_ns = time.monotonic_ns()
        run, request = self._run, self._request
        if request is None:
            run.tally.unexpected += 1
            run.tally.note(f"an answer {status} to no request: {body[:200]!r}")
            return
        self._request = None
        self._count(request, status, headers, body, now_ns)
        if keep_alive:
            self._send_next(time.monotonic_ns())
        elif self._transport is not None:
            self._transport.close()

    def _count(
        self,
        request: Request,
        status: int,
        headers: dict[bytes, bytes],
        body: bytes,
        now_ns: int,
    ) -> None:
        run = self._run
        tally = run.tally
        run.on_answer(now_ns)
        if status != OK:
            tally.errors += 1
            tally.statuses[str(status)] = tally.statuses.get(str(status), 0) + 1
            tally.note(f"{request.target}: HTTP {status}: {body[:300].decode(errors='replace')}")
            return
        fault = run.workload.judge(request, headers, body)
        if fault is not None:
            tally.wrong += 1
            tally.note(f"{WRONG}: {fault}")
            return
        tally.right += 1
        tally.targets[request.target] = tally.targets.get(request.target, 0) + 1
        run.times.record(now_ns - self._sent_ns)

    def _fail(self, reason: str) -> None:
        tally = self._run.tally
        tally.note(f"{WRONG}: {reason}")
        if self._request is not None:
            tally.wrong += 1
            self._request = None
        else:
            tally.unexpected += 1
        self.close()
