"""The HTTP protocol: uvicorn's, with a short way for inference requests.

`POST /v2/models/{m}[/versions/{v}]/infer` is answered here, before ASGI and without a task: parse,
validate, submit; the completion writes the response.  Everything else goes to the FastAPI app,
unchanged.

An `Exchange` stands where uvicorn keeps its request-response cycle (`self.cycle`, `self.pipeline`),
so that uvicorn's own bookkeeping keeps hot and cold requests of a connection in order.

    RECEIVING --end of body--> WAITING (for its turn) --earlier ones answered--> SUBMITTED
    any --[succeed, fail]--> ANSWERED        any --[connection_lost]--> ABANDONED

Invariants
 1. Responses leave in the order of the requests, one each.
 2. Body bytes are copied out of the egress block before it is given back: the transport keeps
    reading a memoryview after `write` returns, and would send the next owner's bytes.
 3. What is refused for its size is refused before it is read; nothing is buffered over a limit.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from overcommit.runtime.config import HEADER_BYTES_MAX, NAME_CHARS_MAX, PIPELINE_MAX
from overcommit.runtime.errors import (
    BadRequest,
    HeadersTooLarge,
    OvercommitError,
    Overloaded,
    PayloadTooLarge,
)
from overcommit.server import binary
from overcommit.server.inference import prepare, respond
from overcommit.server.limits import HEADER_LINES_MAX, LINGER_S

if TYPE_CHECKING:
    from overcommit.server.dispatch import Pending, Result
    from overcommit.server.frontend import FrontEnd
    from overcommit.server.inference import Prepared

log = logging.getLogger("overcommit.http")

_HOT: Final = re.compile(rb"/v2/models/([^/?]+)(?:/versions/([^/?]+))?/infer(?:\?.*)?")
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS: Final = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}
_OK_JSON: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%s\r\n"
)
_OK_BINARY: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n"
    b"inference-header-content-length: %d\r\ncontent-length: %d\r\n%s\r\n"
)
_CLOSE: Final = b"connection: close\r\n"


class _NoEvent:
    """Stands for the asyncio.Event of uvicorn's cycle; nobody waits on an exchange."""

    def set(self) -> None:
        """Do nothing."""


_NO_EVENT: Final = _NoEvent()


def error_body(message: str) -> bytes:
    """The JSON body of every refusal."""
    return msgspec.json.encode({"error": message})


class Exchange:
    """One inference request and its response; takes the place of uvicorn's cycle."""

    __slots__ = (
        "body",
        "disconnected",
        "encoding",
        "json_bytes",
        "keep_alive",
        "message_event",
        "more_body",
        "name",
        "pending",
        "prepared",
        "protocol",
        "response_complete",
        "version",
        "waits_for_turn",
    )

    def __init__(self, protocol: HotProtocol, name: str, version: str | None) -> None:
        self.protocol = protocol
        self.name = name
        self.version = version
        self.body = bytearray()
        self.more_body = True
        self.message_event = _NO_EVENT
        self.response_complete = False
        self.disconnected = False
        self.keep_alive = True
        self.waits_for_turn = False
        self.json_bytes: int | None = None
        self.encoding = b""
        self.prepared: Prepared | None = None
        self.pending: Pending | None = None

    # --- on the way in --------------------------------------------------------------------------
    def try_begin(self) -> None:
        """Submit, once the body is there and earlier requests of the connection are answered."""
        if self.more_body or self.waits_for_turn or self.response_complete or self.disconnected:
            return
        front = self.protocol.front
        try:
            if self.encoding:
                limit = front.settings.body_bytes_max
                self.body = bytearray(binary.decompress(bytes(self.body), self.encoding, limit))
            route = front.find(self.name, self.version)
            if route is None:
                self.protocol.loop.create_task(self._begin_later())
                return
            self.submit(prepare(route, bytes(self.body), self.json_bytes))
        except OvercommitError as error:
            self.fail(error)
        except Exception:  # the request boundary
            log.exception("a request for model '%s' failed", self.name)
            self.fail(OvercommitError("internal error; see the server's log"))

    async def _begin_later(self) -> None:
        """The version's image is being made: wait for it."""
        try:
            route = await self.protocol.front.wait_for_route(self.name, self.version)
            if not self.disconnected:
                self.submit(prepare(route, bytes(self.body), self.json_bytes))
        except OvercommitError as error:
            self.fail(error)

    def submit(self, prepared: Prepared) -> None:
        """Hand the request to a worker."""
        self.prepared = prepared
        self.body = bytearray()
        front = self.protocol.front
        deadline_ns = time.monotonic_ns() + front.timeout_ns(prepared)
        self.pending = front.dispatch.submit(prepared, deadline_ns, self)

    def abandon(self) -> None:
        """The client is gone."""
        self.disconnected = True
        if self.pending is not None:
            self.protocol.front.dispatch.abandon(self.pending)
            self.pending = None

    # --- on the way out -------------------------------------------------------------------------
    def succeed(self, result: Result) -> None:
        """Write the model's answer."""
        self.pending = None
        prepared = self.prepared
        assert prepared is not None
        try:
            answer = respond(prepared, result.places, result.data)
        except OvercommitError as error:
            self.fail(error)
            return
        close = self._close_header()
        if answer.json_bytes is None:
            head = _OK_JSON % (len(answer.body), close)
        else:
            head = _OK_BINARY % (answer.json_bytes, len(answer.body), close)
        self.finish(head, answer.body)

    def fail(self, error: OvercommitError) -> None:
        """Write an error."""
        self.pending = None
        body = error_body(error.message)
        lines = [f"HTTP/1.1 {_STATUS[error.http_status]}", "content-type: application/json"]
        if error.retry_after_s is not None:
            lines.append(f"retry-after: {max(1, round(error.retry_after_s))}")
        lines.append(f"content-length: {len(body)}\r\n")
        self.finish("\r\n".join(lines).encode() + self._close_header() + b"\r\n", body)

    def _close_header(self) -> bytes:
        if self.protocol.front.is_draining:
            self.keep_alive = False
        return b"" if self.keep_alive else _CLOSE

    def finish(self, head: bytes, body: bytes) -> None:
        """Write the response in one piece and let the next request of the connection go on."""
        if self.response_complete or self.disconnected:
            return
        self.response_complete = True
        self.body = bytearray()
        self.protocol.on_exchange_done(self, head + body)


class HotProtocol(HttpToolsProtocol):
    """One connection."""

    front: FrontEnd  # set by `protocol_class`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._is_refused = False

    # --- parser callbacks -----------------------------------------------------------------------
    def on_message_begin(self) -> None:
        # uvicorn's scope is built in on_headers_complete, and only for requests that go to ASGI.
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        if self._head_bytes <= HEADER_BYTES_MAX:
            self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes <= HEADER_BYTES_MAX and len(self.headers) < HEADER_LINES_MAX:
            super().on_header(name, value)
        else:
            self._head_bytes = HEADER_BYTES_MAX + 1

    def on_headers_complete(self) -> None:
        if self._is_refused:
            return
        if self._head_bytes > HEADER_BYTES_MAX:
            self._refuse(
                HeadersTooLarge(
                    f"the request's headers are over {HEADER_BYTES_MAX} bytes or "
                    f"{HEADER_LINES_MAX} lines, which are the limits"
                )
            )
            return
        if len(self.pipeline) >= PIPELINE_MAX:
            self._refuse(
                Overloaded(f"over {PIPELINE_MAX} requests are pipelined; wait for answers")
            )
            return
        assert self.parser is not None
        found = _HOT.fullmatch(self.url) if self.parser.get_method() == b"POST" else None
        if found is None:
            self._go_cold()
        else:
            self._go_hot(found[1], found[2])

    def _go_cold(self) -> None:
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        length = next((value for name, value in headers if name == b"content-length"), b"0")
        limit = self.front.settings.body_bytes_max
        if not length.isdigit() or int(length) > limit:
            self._refuse(PayloadTooLarge(f"the body is over {limit} bytes, which is the limit"))
            return
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        super().on_headers_complete()

    def _go_hot(self, raw_name: bytes, raw_version: bytes | None) -> None:
        name = unquote(raw_name.decode("latin-1"))
        version = unquote(raw_version.decode("latin-1")) if raw_version is not None else None
        exchange = Exchange(self, name, version)
        assert self.parser is not None
        exchange.keep_alive = (
            self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        )
        try:
            if len(name) > NAME_CHARS_MAX:
                raise BadRequest(f"a model name has at most {NAME_CHARS_MAX} characters")
            self._read_headers(exchange)
        except OvercommitError as error:
            self._refuse(error)
            return
        existing = self.cycle
        self.cycle = exchange  # type: ignore[assignment]
        if existing is not None and not existing.response_complete:
            exchange.waits_for_turn = True
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]
        elif self.expect_100_continue:
            self.transport.write(_CONTINUE)

    def _read_headers(self, exchange: Exchange) -> None:
        limit = self.front.settings.body_bytes_max
        for name, value in self.headers:
            if name == b"content-length":
                if int(value) > limit:
                    raise PayloadTooLarge(
                        f"model '{exchange.name}': the body has {int(value)} bytes, the limit is "
                        f"{limit}; send less in one request or raise --max-body"
                    )
            elif name == b"inference-header-content-length":
                if not value.isdigit():
                    raise BadRequest("Inference-Header-Content-Length must be a whole number")
                exchange.json_bytes = int(value)
            elif name == b"content-encoding":
                exchange.encoding = value.strip().lower()
                if exchange.encoding == b"identity":
                    exchange.encoding = b""
                elif exchange.encoding not in (b"gzip", b"deflate"):
                    raise BadRequest("Content-Encoding must be gzip, deflate or identity")

    def on_body(self, body: bytes) -> None:
        cycle: Any = self.cycle
        if self._is_refused:
            return
        if not isinstance(cycle, Exchange):
            if not cycle.response_complete and len(cycle.body) > self.front.settings.body_bytes_max:
                self.transport.close()
                return
            super().on_body(body)
            return
        if cycle.response_complete:
            return
        cycle.body += body
        limit = self.front.settings.body_bytes_max
        if len(cycle.body) > limit:
            self._refuse(
                PayloadTooLarge(
                    f"model '{cycle.name}': the body is over {limit} bytes, which is the limit; "
                    f"send less in one request or raise --max-body"
                ),
                cycle,
            )

    def on_message_complete(self) -> None:
        cycle: Any = self.cycle
        if self._is_refused:
            return
        if not isinstance(cycle, Exchange):
            super().on_message_complete()
            return
        cycle.more_body = False
        cycle.try_begin()

    # --- turns ----------------------------------------------------------------------------------
    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, Exchange):
            cycle.waits_for_turn = False
            cycle.try_begin()
        else:
            super()._start_asgi_task(cycle, app)

    def on_exchange_done(self, exchange: Exchange, response: bytes) -> None:
        """Write a response; go on with the connection, or close it."""
        if self.transport.is_closing():
            return
        self.transport.write(response)
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _refuse(self, error: OvercommitError, exchange: Exchange | None = None) -> None:
        """Answer before the request is read, and close; what still comes is thrown away."""
        if exchange is None:
            exchange = Exchange(self, "", None)
            existing = self.cycle
            self.cycle = exchange  # type: ignore[assignment]
            if existing is not None and not existing.response_complete:
                # Its turn never comes in time for a good error; the earlier answers matter more.
                self._is_refused = True
                exchange.response_complete = True
                self.flow.pause_reading()
                existing.keep_alive = False
                return
        self._is_refused = True
        exchange.keep_alive = False
        body = error_body(error.message)
        head = (
            f"HTTP/1.1 {_STATUS[error.http_status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        exchange.response_complete = True
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

    # --- the connection -------------------------------------------------------------------------
    def connection_lost(self, exc: Exception | None) -> None:
        for cycle in (self.cycle, *(queued for queued, _ in self.pipeline)):
            if isinstance(cycle, Exchange) and not cycle.response_complete:
                cycle.abandon()
        self.pipeline.clear()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        # A client that does not read its answers is not read either.
        super().pause_writing()
        self.flow.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.pipeline:
            self.flow.resume_reading()


def protocol_class(front: FrontEnd) -> type[asyncio.Protocol]:
    """Return the protocol bound to one front end."""
    return type("FrontEndProtocol", (HotProtocol,), {"front": front})
