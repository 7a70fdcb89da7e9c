"""The HTTP protocol: uvicorn's, with a short way for inference requests.

`POST /v2/models/{m}[/versions/{v}]/infer` is answered here, before ASGI and without a task: parse,
validate, submit; the completion writes the response.  Everything else goes to the FastAPI app,
unchanged.

Three ways in, by what the client sends:

    head seen before, body there    no parser at all          [_try_known]
    anything else                   uvicorn's parser          [parser callbacks]
    long binary tensors             straight into the block   [BulkReceiver, from on_body on]

Invariants
 1. What is refused for its size is refused before it is read; nothing is buffered over a limit.
 2. Whichever way a request comes in, the bytes decide alone what it means.
 3. An offer to speak another protocol (`Upgrade`) is not taken up: the request means what it would without.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import httptools

from overcommit.runtime.config import (
    HEADER_BYTES_MAX,
    ID_CHARS_MAX,
    NAME_CHARS_MAX,
    PIPELINE_MAX,
)
from overcommit.runtime.errors import (
    BadRequest,
    HeadersTooLarge,
    NotOffered,
    OvercommitError,
    Overloaded,
    PayloadTooLarge,
)
from overcommit.server import compression, failures, heads
from overcommit.server.body_kinds import exchange_of
from overcommit.server.bulk import BulkReceiver
from overcommit.server.connection import Connection
from overcommit.server.exchange import Exchange
from overcommit.server.limits import (
    BODIES_BYTES_MAX,
    BODY_TIMEOUT_S,
    BULK_BYTES_MIN,
    HEAD_TIMEOUT_S,
    HEADER_LINES_MAX,
    SMALL_BODY_BYTES,
)
from overcommit.server.routing import CANARY, STABLE

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd

# A target may be a whole URL (RFC 9112, 3.2.2).
_HOT: Final = re.compile(
    rb"(?:[hH][tT][tT][pP][sS]?://[^/?]*)?/v2/models/([^/?]+)(?:/versions/([^/?]+))?/infer(?:\?.*)?"
)
# Ids by which clients find their requests again; what could end a line does not come back.
_ECHOED: Final = frozenset((b"x-request-id", b"seldon-puid"))
_PLAIN: Final = re.compile(rb"[\x20-\x7e]{1,%d}" % ID_CHARS_MAX)
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class HotProtocol(Connection):
    """Reads the requests of one connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._raw_head = b""  # of the request that is parsed, if all of it came in one piece
        self._bulk: BulkReceiver | None = None
        self._has_offer = False  # the request that is read: it will be read again, without

    def connection_lost(self, exc: Exception | None) -> None:
        self._bulk = None
        super().connection_lost(exc)

    # --- bytes ----------------------------------------------------------------------------------
    def data_received(self, data: bytes) -> None:
        if self._is_between:
            rest = self._try_known(data)
            if rest is None:
                return
            data = rest
        self._feed(data)
        bulk = self._bulk
        if bulk is not None and not self.transport.is_closing():
            # A transport looks at its protocol when it starts to read.
            self.transport.pause_reading()
            self.transport.set_protocol(bulk)
            self.transport.resume_reading()

    def _feed(self, data: bytes) -> None:
        while self.parser is not None:  # else the connection was lost meanwhile
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                if self._has_offer:
                    data = self._head_without_offer() + data[offer.args[0] :]
                    continue
            except httptools.HttpParserError as error:
                self.send_400_response(str(error) or "not HTTP")
            return

    def _head_without_offer(self) -> bytes:
        """Write the head anew: the parser takes a request with an offer to end with its head."""
        parser, self.parser = self.parser, httptools.HttpRequestParser(self)
        assert parser is not None
        self._has_offer = False
        line = b"%b %b HTTP/%b\r\n" % (
            *(parser.get_method(), self.url),
            parser.get_http_version().encode(),
        )
        fields = [b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        return b"".join((line, *fields, b"\r\n"))

    def _try_known(self, data: bytes) -> bytes | None:
        """Take requests whose head was seen before; return what the parser must look at."""
        at = 0
        known = self.front.heads
        while True:
            middle = data.find(heads.LINE_END, at) + 2
            end = data.find(heads.END, middle - 2) + 4
            target = known.targets.get(data[at:middle])
            fields = None if target is None else known.fields.get(data[middle:end])
            if target is None or fields is None:
                self._raw_head = data[at:end]
                break
            stop = end + fields.body_bytes
            if stop > len(data) or len(self.pipeline) >= PIPELINE_MAX or self._is_refused:
                break
            exchange = Exchange(self, target.name, target.version or fields.asks)
            if fields.asks is None:
                exchange.target = target
            exchange.json_bytes = fields.json_bytes
            exchange.accepts = fields.accepts
            exchange.body = data[end:stop]
            exchange.more_body = False
            self._since_s = 0.0
            self._enqueue(exchange)
            exchange.try_begin()
            if stop == len(data):
                return None
            at = stop
        return data[at:] if at else data

    # --- parser callbacks -----------------------------------------------------------------------
    def on_message_begin(self) -> None:
        # uvicorn's scope is built in on_headers_complete, and only for requests that go to ASGI.
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._head_bytes = 0
        self._is_between = False
        self._begin_reading(HEAD_TIMEOUT_S)

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
        raw_head, self._raw_head = self._raw_head, b""
        if self._is_refused:
            return
        self._begin_reading(BODY_TIMEOUT_S)
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
        if self.parser.should_upgrade():
            self._has_offer = self.parser.get_method() != b"CONNECT"
            if not self._has_offer:
                self._refuse(BadRequest("CONNECT is not served: this is no proxy"))
            return
        found = _HOT.fullmatch(self.url) if self.parser.get_method() == b"POST" else None
        if found is None:
            self._go_cold()
        else:
            self._go_hot(found[1], found[2], raw_head)

    def _go_cold(self) -> None:
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        fields = dict(headers)
        length = fields.get(b"content-length", b"0")
        limit = self.front.settings.body_bytes_max
        if not length.isdigit() or int(length) > limit:
            self._refuse(PayloadTooLarge(f"the body is over {limit} bytes, which is the limit"))
            return
        try:
            _check_coding(fields.get(b"transfer-encoding", b"chunked"))
        except NotOffered as error:
            self._refuse(error)
            return
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        super().on_headers_complete()

    def _go_hot(self, raw_name: bytes, raw_version: bytes | None, raw_head: bytes) -> None:
        name = unquote(raw_name.decode("latin-1"))
        version = unquote(raw_version.decode("latin-1")) if raw_version is not None else None
        kind = exchange_of(self.headers)
        exchange = kind(self, name, version)
        assert self.parser is not None
        exchange.keep_alive = (
            self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        )
        try:
            if len(name) > NAME_CHARS_MAX:
                raise BadRequest(f"a model name has at most {NAME_CHARS_MAX} characters")
            self._read_headers(exchange)
            exchange.version = version or exchange.asks
        except OvercommitError as error:
            self._refuse(error)
            return
        if (
            raw_head
            and exchange.keep_alive
            and exchange.body_bytes is not None
            and exchange.body_bytes <= SMALL_BODY_BYTES
            and kind is Exchange
            and not (exchange.encoding or exchange.echo or self.expect_100_continue)
        ):
            fields = heads.Fields(
                *(exchange.body_bytes, exchange.json_bytes, exchange.accepts, exchange.asks)
            )
            self.front.heads.remember(raw_head, self.url, heads.Target(name, version), fields)
        self._enqueue(exchange)
        if self.expect_100_continue and not exchange.waits_for_turn:
            self.transport.write(_CONTINUE)

    def _read_headers(self, exchange: Exchange) -> None:
        limit = self.front.settings.body_bytes_max
        for name, value in self.headers:
            if name == b"content-length":
                exchange.body_bytes = int(value)
                if exchange.body_bytes > limit:
                    raise PayloadTooLarge(
                        f"model '{exchange.name}': the body has {int(value)} bytes, the limit is "
                        f"{limit}; send less in one request or raise --max-body"
                    )
            elif name == b"inference-header-content-length":
                if not value.isdigit():
                    raise BadRequest("Inference-Header-Content-Length must be a whole number")
                exchange.json_bytes = int(value)
            elif name == b"x-overcommit-canary":
                exchange.asks = {b"always": CANARY, b"never": STABLE}.get(value.strip().lower())
            elif name == b"content-encoding":
                exchange.encoding = value.strip().lower()
                if exchange.encoding == b"identity":
                    exchange.encoding = b""
                elif exchange.encoding not in (b"gzip", b"deflate"):
                    raise BadRequest("Content-Encoding must be gzip, deflate or identity")
            elif name == b"accept-encoding":
                exchange.accepts = compression.choose(value)
            elif name == b"transfer-encoding":
                _check_coding(value)
            elif name in _ECHOED and _PLAIN.fullmatch(value):
                exchange.echo += b"%b: %b\r\n" % (name, value)

    def on_body(self, body: bytes) -> None:
        cycle: Any = self.cycle
        if self._is_refused:
            return
        if not isinstance(cycle, Exchange):
            super().on_body(body)  # the app counts what it takes of it: `body_budget`
        elif self._bulk is not None:
            self._bulk.take(memoryview(body))
        elif not cycle.response_complete:
            self._gather(cycle, body)

    def _gather(self, exchange: Exchange, body: bytes) -> None:
        if exchange.body:
            exchange.body += body
        elif exchange.body_bytes == len(body):
            exchange.body = body  # all of it, as it is
        else:
            exchange.body = bytearray(body)
        length = len(exchange.body)
        limit = self.front.settings.body_bytes_max
        if length > limit:
            self._refuse(
                PayloadTooLarge(
                    f"model '{exchange.name}': the body is over {limit} bytes, which is the limit; "
                    f"send less in one request or raise --max-body"
                ),
                exchange,
            )
            return
        if self._may_be_bulk(exchange) and length >= (exchange.json_bytes or 0):
            self._begin_bulk(exchange)
            if self._bulk is not None:
                return
        if length > SMALL_BODY_BYTES:
            self.front.bodies_bytes += length - exchange.held_bytes
            exchange.held_bytes = length
            if self.front.bodies_bytes > BODIES_BYTES_MAX:
                self._refuse(failures.bodies_full(f"model '{exchange.name}': "), exchange)

    def on_message_complete(self) -> None:
        if self._has_offer:
            return
        cycle: Any = self.cycle
        self._is_between = True
        self._since_s = 0.0
        if self._is_refused:
            return
        if not isinstance(cycle, Exchange):
            super().on_message_complete()
            cycle.more_body = False  # of one that was answered before, too
        elif self._bulk is not None:
            self._bulk = None
            cycle.end_bulk()
        else:
            cycle.more_body = False
            cycle.try_begin()

    # --- long binary bodies ---------------------------------------------------------------------
    @staticmethod
    def _may_be_bulk(exchange: Exchange) -> bool:
        return (
            exchange.json_bytes is not None
            and exchange.body_bytes is not None
            and exchange.body_bytes - exchange.json_bytes >= BULK_BYTES_MIN
            and not exchange.encoding
            and not exchange.waits_for_turn
            and exchange.pending is None
        )

    def _begin_bulk(self, exchange: Exchange) -> None:
        space = exchange.try_begin_bulk()
        if space is None:
            exchange.body_bytes = None  # not tried again
            return
        self._bulk = BulkReceiver(self, space)
        self._bulk.take(memoryview(exchange.body)[exchange.json_bytes :])
        exchange.drop_body()

    def on_bulk_done(self) -> None:
        """The receiver has the whole body: read HTTP again."""
        self._bulk = None
        self.transport.pause_reading()
        self.transport.set_protocol(self)
        # The old one still waits for the body.
        self.parser = httptools.HttpRequestParser(self)
        self._is_between = True
        self._since_s = 0.0
        self.transport.resume_reading()
        cycle: Any = self.cycle
        cycle.end_bulk()


def _check_coding(value: bytes) -> None:
    """Raise NotOffered unless a body's transfer coding is one that the parser takes off."""
    if value.strip().lower() != b"chunked":
        coding = value[:ID_CHARS_MAX].decode("latin-1")
        raise NotOffered(f"Transfer-Encoding is '{coding}': only 'chunked' is understood")


def protocol_class(front: FrontEnd) -> type[asyncio.Protocol]:
    """Return the protocol bound to one front end."""
    return type("FrontEndProtocol", (HotProtocol,), {"front": front})
