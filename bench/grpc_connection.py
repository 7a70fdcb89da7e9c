"""A connection of the load generator that speaks gRPC: one call at a time, as `Connection`.

An answer is a message and trailers.  The message is compared with a known right one, or read and
judged; without a message the call has failed.

Called by `loadgen` and `pacer`.
"""

from __future__ import annotations

import asyncio
import time
from typing import cast

from overcommit.bench import grpc_wire
from overcommit.bench.connection import Connection
from overcommit.bench.run import Run


class GrpcConnection(Connection, asyncio.Protocol):
    """See the module."""

    __slots__ = ("_message", "_rest", "_stream")

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._rest = b""
        self._stream = -1
        self._message = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet, and begin with the first stream."""
        self._rest, self._stream, self._message = b"", -1, b""
        cast(asyncio.Transport, transport).write(grpc_wire.greeting())
        super().connection_made(transport)

    def _write(self, payload: bytes) -> None:
        assert self._transport is not None
        self._stream += 2
        is_first = self._stream == 1
        self._transport.write(grpc_wire.call(self._stream, payload, is_first=is_first))

    def data_received(self, data: bytes) -> None:
        """Read frames."""
        data = self._rest + data if self._rest else data
        at, end = 0, len(data)
        while end - at >= grpc_wire.HEAD_BYTES:
            length, kind, flags, stream = grpc_wire.read_head(data, at)
            start = at + grpc_wire.HEAD_BYTES
            at = start + length
            if at > end:
                at = start - grpc_wire.HEAD_BYTES
                break
            if kind == grpc_wire.DATA:
                self._message += data[start:at]
                is_over = bool(flags & grpc_wire.END_STREAM)
            elif kind == grpc_wire.HEADERS:
                is_over = bool(flags & grpc_wire.END_STREAM)
            else:
                is_over = kind == grpc_wire.RST_STREAM and stream == self._stream
                self._on_other(kind, flags, data[start:at])
            if is_over and stream == self._stream and self._request is not None:
                self._rest = b""
                self._on_end()
        self._rest = data[at:]

    def _on_other(self, kind: int, flags: int, payload: bytes) -> None:
        transport = self._transport
        if transport is None or flags & grpc_wire.ACK:
            return
        if kind in (grpc_wire.SETTINGS, grpc_wire.PING):
            answer = payload if kind == grpc_wire.PING else b""
            transport.write(grpc_wire.frame(kind, grpc_wire.ACK, 0, answer))
        elif kind == grpc_wire.GOAWAY:
            self._run.tally.note(f"GOAWAY: {payload[4:]!r}")

    def _on_end(self) -> None:
        request, message = self._request, self._message
        self._message = b""
        assert request is not None
        if message and message == request.body:
            self._on_known(request)
            return
        run = self._run
        self._request = None
        now_ns = time.monotonic_ns()
        if not message:
            run.on_answer(now_ns)
            run.tally.errors += 1
            run.tally.statuses["no message"] = run.tally.statuses.get("no message", 0) + 1
            run.tally.note(f"{request.target}: the call failed")
        elif self._count(request, 200, {}, message, now_ns) and request.is_repeated:
            if request.body is None:
                run.learned.append(request)
            request.body = message
        self._go_on(time.monotonic_ns())
