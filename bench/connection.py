"""One keep-alive connection of the load generator: sends a request, judges the answer, goes on.

Callbacks only, no task per request: at ten thousand requests a second the harness shares its cores
with the server, and each task switch would be taken from it.  For the same reason an answer that is
byte by byte a known right one is not parsed: one comparison, and the next request is on its way.
Everything else is read by a parser and goes to the workload's judge.

Invariants
 1. At most one request is in flight, and each that was sent gets exactly one fate in the tally.
 2. An answer is judged before the next request is drawn; an answer that belongs to no request is
    counted as unexpected, never dropped.
 3. A known answer is only looked for between two messages, so the parser never misses a part.

State machine

    CLOSED --open--> CONNECTING --connection_made--> IDLE --send--> WAITING --answer--> IDLE | CLOSED
    WAITING, IDLE --connection_lost, timeout--> CLOSED --while the run goes on--> CONNECTING

In a closed loop IDLE lasts no time; in an open one the pacer ends it.

Called by `loadgen` and `pacer`.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, cast

import httptools

from overcommit.bench.request import Request
from overcommit.bench.run import HEAD_END, Run
from overcommit.bench.tally import LOST, WRONG

RECONNECT_S: Final = 0.02
OK: Final = 200
BULK_BYTES: Final = 256 << 10  # answers from this size on are read in place
BULK_SPARE_BYTES: Final = 64 << 10
HEAD_BYTES_MAX: Final = 16 << 10


class Connection:
    """See the module; `data_received` or its like is in the two classes below."""

    __slots__ = (
        "_finished",
        "_head",
        "_headers",
        "_is_parsing",
        "_opener",
        "_parser",
        "_parts",
        "_request",
        "_run",
        "_sent_ns",
        "_start_ns",
        "_transport",
        "is_done",
    )

    def __init__(self, run: Run) -> None:
        self._run = run
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._is_parsing = False  # in the middle of a message
        self._head = b""  # of the message that is parsed, if it came in one piece
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._finished: list[tuple[int, bool, dict[bytes, bytes], bytes]] = []
        self._request: Request | None = None
        self._start_ns = 0
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
        address = run.host, run.port
        while not run.is_stopping:
            run.tally.connects += 1
            try:
                await loop.create_connection(lambda: cast(asyncio.Protocol, self), *address)
                return
            except OSError as error:
                run.tally.connect_errors += 1
                run.tally.note(f"connect: {error}")
                if not run.reconnect:
                    break
                await asyncio.sleep(RECONNECT_S)
        self.is_done = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request, when it is time."""
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpResponseParser(self)
        self._is_parsing = False
        self._headers, self._parts, self._finished = {}, [], []
        self._go_on(time.monotonic_ns())

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
    def _go_on(self, now_ns: int) -> None:
        """WAITING -> IDLE."""
        run = self._run
        if run.is_stopping:
            assert self._transport is not None
            self._transport.close()
        elif run.on_idle is None:
            self.send(now_ns, now_ns)
        else:
            run.on_idle(self, now_ns)

    def send(self, start_ns: int, now_ns: int) -> None:
        """IDLE -> WAITING; the request was meant to start at `start_ns`."""
        run = self._run
        request = self._request = run.draw()
        run.tally.sent += 1
        self._start_ns = start_ns
        self._sent_ns = now_ns
        self._write(request.payload)

    def _write(self, payload: bytes) -> None:
        assert self._transport is not None
        self._transport.write(payload)

    @property
    def is_idle(self) -> bool:
        """Whether it is open and waits to be told to send."""
        return self._transport is not None and self._request is None

    def expire(self, now_ns: int, timeout_ns: int) -> None:
        """Give a request up that has waited too long."""
        if self._request is not None and now_ns - self._sent_ns > timeout_ns:
            tally = self._run.tally
            tally.unanswered += 1
            tally.note(f"{self._request.target}: no answer within {timeout_ns / 1e9:.0f} s")
            self._request = None
            self.close()

    # --- answers --------------------------------------------------------------------------------
    def _on_known(self, request: Request) -> None:
        """The answer is a known right one."""
        run = self._run
        now_ns = time.monotonic_ns()
        self._request = None
        request.right += 1
        run.tally.right += 1
        self._time(now_ns)
        self._go_on(now_ns)

    def _time(self, now_ns: int) -> None:
        run = self._run
        if now_ns - run.last_answer_ns > run.tally.silence_ns:
            run.on_answer(now_ns)
        run.last_answer_ns = now_ns
        run.times_ns.append(now_ns - self._start_ns)
        if run.on_idle is not None:
            run.services_ns.append(now_ns - self._sent_ns)

    def _parse(self, data: bytes) -> None:
        """Read; handle the answers that are complete."""
        if not self._is_parsing:
            self._head = data[: data.find(HEAD_END, 0, HEAD_BYTES_MAX) + len(HEAD_END)]
            if not self._head.endswith(HEAD_END):
                self._head = b""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error!r}")
            return
        finished, self._finished = self._finished, []
        for status, keep_alive, headers, body in finished:
            if len(finished) > 1:
                self._head = b""  # whose it is would have to be found out
            self._on_answer(status, keep_alive, headers, body)

    def on_message_begin(self) -> None:
        """Note that a message is under way; called by the parser."""
        self._is_parsing = True

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
        self._is_parsing = False

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
        is_right = self._count(request, status, headers, body, now_ns)
        if keep_alive:
            if is_right:
                run.learn(request, self._head, headers, body)
            self._go_on(time.monotonic_ns())
        elif self._transport is not None:
            self._transport.close()

    def _count(
        self,
        request: Request,
        status: int,
        headers: dict[bytes, bytes],
        body: bytes,
        now_ns: int,
    ) -> bool:
        run = self._run
        tally = run.tally
        if status != OK:
            run.on_answer(now_ns)
            tally.errors += 1
            tally.statuses[str(status)] = tally.statuses.get(str(status), 0) + 1
            tally.note(f"{request.target}: HTTP {status}: {body[:300].decode(errors='replace')}")
            return False
        fault = run.workload.judge(request, headers, body)
        if fault is not None:
            run.on_answer(now_ns)
            tally.wrong += 1
            tally.note(f"{WRONG}: {fault}")
            return False
        tally.right += 1
        tally.targets[request.target] = tally.targets.get(request.target, 0) + 1
        self._time(now_ns)
        return True

    def _fail(self, reason: str) -> None:
        tally = self._run.tally
        tally.note(f"{WRONG}: {reason}")
        if self._request is not None:
            tally.wrong += 1
            self._request = None
        else:
            tally.unexpected += 1
        self.close()


class StreamConnection(Connection, asyncio.Protocol):
    """For answers that mostly come in one piece."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """Recognize the answer, or parse."""
        request = self._request
        if (
            request is not None
            and not self._is_parsing
            and (data == request.answer or self._run.is_known(request, data))
        ):
            self._on_known(request)
        else:
            self._parse(data)


class BulkConnection(Connection, asyncio.BufferedProtocol):
    """For answers of many pieces: gathered where they are compared, without a copy."""

    __slots__ = ("_buffer", "_end", "_filled", "_total", "_view")

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._buffer = bytearray(run.workload.answer_bytes_max + BULK_SPARE_BYTES)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._end = 0  # of the head, once it is known
        self._total = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with an empty buffer."""
        self._filled = self._end = 0
        super().connection_made(transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Recognize the answer when it is whole; parse as soon as it cannot be a known one."""
        self._filled += nbytes
        request = self._request
        if request is None or self._is_parsing or not self._may_be_known(request):
            self._parse_all()
        elif self._end and self._filled >= self._total:
            body = request.body
            assert body is not None
            if self._filled == self._total and self._buffer.startswith(body, self._end):
                self._filled = self._end = 0
                self._on_known(request)
            else:
                self._parse_all()

    def _may_be_known(self, request: Request) -> bool:
        if self._end:
            return True
        if request.body is None:
            return False
        end = self._buffer.find(HEAD_END, 0, min(self._filled, HEAD_BYTES_MAX)) + len(HEAD_END)
        if end < len(HEAD_END):
            return self._filled < HEAD_BYTES_MAX
        total = end + len(request.body)
        if self._run.heads.get(bytes(self._view[:end])) != request.frame:
            return False
        if total >= len(self._buffer):
            return False
        self._end, self._total = end, total
        return True

    def _parse_all(self) -> None:
        data = bytes(self._view[: self._filled])
        self._filled = self._end = 0
        self._parse(data)


def make_connection(run: Run) -> Connection:
    """Return the kind of connection that suits the workload's answers."""
    if run.workload.answer_bytes_max >= BULK_BYTES:
        return BulkConnection(run)
    return StreamConnection(run)
