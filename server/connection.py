"""One connection: whose turn it is, what is refused, how long things may take.

Invariants
 1. Responses leave in the order of the requests, one each; refusals too, and the last one closes.
 2. A connection that is slow to send a request, or to read its answer, is closed: `check_times`,
    once a second, so that a request costs no timer.

The reading of requests is `protocol.py`, which is built on this.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from overcommit.runtime.errors import OvercommitError, Overloaded, RequestTimeout
from overcommit.server.exchange import STATUS_LINES, Exchange, error_body
from overcommit.server.limits import CONNECTIONS_MAX, LINGER_S, WRITE_TIMEOUT_S

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with exchanges beside its cycles."""

    front: FrontEnd  # set by `protocol_class`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_refused = False
        self._is_between = True  # requests: the parser has seen nothing of the next one
        self._since_s = 0.0  # idle, or reading what is read now; 0: neither
        self._limit_s = 0.0
        self._write_since_s = 0.0

    # --- the connection -------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_idle()
        if len(self.connections) > CONNECTIONS_MAX:
            self._refuse(
                Overloaded(f"over {CONNECTIONS_MAX} connections are open", retry_after_s=1)
            )

    def connection_lost(self, exc: Exception | None) -> None:
        for cycle in (self.cycle, *(queued for queued, _ in self.pipeline)):
            if isinstance(cycle, Exchange) and not cycle.response_complete:
                cycle.abandon()
        self.pipeline.clear()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        # A client that does not read its answers is not read either.
        self._write_since_s = self.front.clock_s
        super().pause_writing()
        self.flow.pause_reading()

    def resume_writing(self) -> None:
        self._write_since_s = 0.0
        super().resume_writing()
        if not self.pipeline:
            self.flow.resume_reading()

    # --- turns ----------------------------------------------------------------------------------
    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, Exchange):
            cycle.waits_for_turn = False
            if cycle.refusal is not None:
                self._write_refusal(cycle, cycle.refusal)
            else:
                cycle.try_begin()
        else:
            super()._start_asgi_task(cycle, app)

    def _enqueue(self, exchange: Exchange) -> None:
        existing = self.cycle
        self.cycle = exchange  # type: ignore[assignment]
        if existing is not None and not existing.response_complete:
            exchange.waits_for_turn = True
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]

    def on_exchange_done(self, exchange: Exchange, response: list[bytes]) -> None:
        """Write a response; go on with the connection, or close it."""
        transport = self.transport
        if transport.is_closing():
            return
        if len(response) == 1:
            transport.write(response[0])
        else:
            transport.writelines(response)
        if not exchange.keep_alive:
            transport.close()
            self.server_state.total_requests += 1
        elif self.pipeline or self._write_since_s or self.flow.read_paused:
            self.on_response_complete()
        else:  # nearly always; the same in short
            self.server_state.total_requests += 1
            if self._is_between:
                self._begin_idle()

    def on_response_complete(self) -> None:
        # As uvicorn's, without a timer for every response: `check_times` looks once a second.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self._is_between and not self.pipeline:
            self._begin_idle()
        if not self._write_since_s:
            self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)

    def _refuse(self, error: OvercommitError, exchange: Exchange | None = None) -> None:
        """Answer when its turn comes, before it is read, and close; what still comes is thrown away."""
        self._is_refused = True
        if exchange is None:
            exchange = Exchange(self, "", None)
            self._enqueue(exchange)
        exchange.drop_body()
        exchange.refusal = error
        if not exchange.waits_for_turn:
            self._write_refusal(exchange, error)

    def _write_refusal(self, exchange: Exchange, error: OvercommitError) -> None:
        exchange.keep_alive = False
        exchange.response_complete = True
        body = error_body(error.message)
        head = (
            f"{STATUS_LINES[error.http_status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # Closing at once would reset the connection under a client that is still sending, and the
        # client would never see why.
        self.loop.call_later(LINGER_S, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        body = error_body(f"malformed HTTP: {msg}")
        head = (
            f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        if not self._is_refused and not self.transport.is_closing():
            self.transport.write(head.encode() + body)
        self.transport.close()

    # --- time -----------------------------------------------------------------------------------
    def _begin_idle(self) -> None:
        self._since_s, self._limit_s = self.front.clock_s, self.front.settings.keep_alive_s

    def _begin_reading(self, limit_s: float) -> None:
        self._since_s, self._limit_s = self.front.clock_s, limit_s

    def check_times(self, now_s: float) -> None:
        """Close a connection that has been idle, or slow, for too long."""
        if self._write_since_s and now_s - self._write_since_s > WRITE_TIMEOUT_S:
            self.transport.abort()
        elif self.flow.read_paused and not self._is_between:
            self._since_s = now_s  # it is we who do not read
        elif self._since_s and now_s - self._since_s > self._limit_s and not self._is_refused:
            if self._is_between:
                self.transport.close()
            elif self.transport.get_protocol() is not self:
                self.transport.abort()  # a body is received in place
            else:
                current: Any = self.cycle
                error = RequestTimeout(f"the request was not complete within {self._limit_s:g} s")
                if current is None or not current.more_body:
                    self._refuse(error)
                elif current.response_complete or not isinstance(current, Exchange):
                    # It has its answer, or the app waits for a body that does not come.
                    self.transport.abort()
                else:
                    self._refuse(error, current)
