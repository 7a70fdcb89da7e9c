"""One inference request and its response, from the end of its head to the last byte written.

An `Exchange` stands where uvicorn keeps its request-response cycle (`cycle`, `pipeline`), so that
uvicorn's own bookkeeping keeps hot and cold requests of a connection in order.

    RECEIVING --end of body--> WAITING (for its turn) --earlier ones answered--> SUBMITTED
    RECEIVING --end of long JSON, its turn--> DECODED by another thread --> SUBMITTED
    RECEIVING --JSON of a long binary body is there--> BULK --end of body--> SUBMITTED
    any --[succeed, fail]--> ANSWERED        any --[abandon]--> ABANDONED

Invariants
 1. It is answered once, or abandoned with its connection.
 2. Nothing of an egress block is kept after `succeed` returns: the block is then another's.

Called by the protocol (in) and by the dispatch (out).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import msgspec

from overcommit.runtime.errors import OvercommitError
from overcommit.server import binary, compression, failures, long_bodies
from overcommit.server.ensembles import Run
from overcommit.server.inference import prepare, prepare_again, prepare_head, respond
from overcommit.server.limits import (
    COMPRESS_BYTES_MIN,
    COMPRESS_HERE_BYTES,
    DECODE_HERE_BYTES,
    JOIN_BYTES_MAX,
)

if TYPE_CHECKING:
    from overcommit.server.connection import Connection
    from overcommit.server.heads import Target
    from overcommit.server.inference import Data, Prepared
    from overcommit.server.parcels import Pending
    from overcommit.server.plans import RoutePlans

log = logging.getLogger("overcommit.http")

STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}" for status in HTTPStatus
}
OK_JSON: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n"
)
_OK_BINARY: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n"
    b"inference-header-content-length: %d\r\ncontent-length: %d\r\n%b\r\n"
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


def retry_headers(retry_after_s: float | None) -> tuple[tuple[str, str], ...]:
    """When to come back: in whole seconds, as HTTP has it, and as it is meant, in milliseconds.

    Both are rounded up: who comes back earlier would be refused again.  None: nobody was told.
    """
    if retry_after_s is None:
        return ()
    wait_ms = max(1, math.ceil(retry_after_s * 1000))
    return ("retry-after", str(-(-wait_ms // 1000))), ("retry-after-ms", str(wait_ms))


class Exchange:
    """See the module.  Defaults are on the class: most of them stay."""

    # What uvicorn's own cycle has.
    message_event = _NO_EVENT
    more_body = True
    response_complete = False
    disconnected = False
    keep_alive = True

    waits_for_turn = False
    refusal: OvercommitError | None = None  # its answer, when its turn comes
    target: Target | None = None  # whom it asks, if its request line was seen before
    asks: str | None = None  # for a version, by a header
    encoding = b""  # of the body
    accepts = b""  # how a long answer may be compressed
    echo = b""  # header lines of the request that come back
    json_bytes: int | None = None
    body_bytes: int | None = None  # None: sent in chunks
    body: bytes | bytearray = b""
    held_bytes = 0  # of the front end's body budget
    prepared: Prepared | None = None
    pending: Pending | None = None
    run: Run | None = None  # of an ensemble
    prepare = staticmethod(prepare)  # how a body is read

    def __init__(self, protocol: Connection, name: str, version: str | None) -> None:
        self.protocol = protocol
        self.name = name
        self.version = version

    # --- on the way in --------------------------------------------------------------------------
    def try_begin(self) -> None:
        """Submit, once the body is there and earlier requests of the connection are answered."""
        if self.more_body or self.waits_for_turn or self.response_complete or self.disconnected:
            return
        front = self.protocol.front
        try:
            if self.encoding:
                limit = front.settings.body_bytes_max
                self.body = binary.decompress(bytes(self.body), self.encoding, limit)
                self.encoding = b""
            target = self.target
            if target is not None and target.epoch == front.plans.epoch:
                self._submit(*prepare_again(target, bytes(self.body), self.json_bytes))
                return
            is_long = self.json_bytes is None and len(self.body) > DECODE_HERE_BYTES
            if is_long and self.prepare is prepare:
                self._begin_long()
                return
            plans = front.plans.serving.get((self.name, self.version))
            if target is not None and plans is not None:
                target.point_at(plans, front.plans.epoch)
            if plans is None:
                route = front.find(self.name, self.version)
                if route is None:
                    self.protocol.loop.create_task(self._begin_later())
                    return
                if route.steps:
                    self._begin_ensemble(front.plans.of(route))
                    return
                plans = front.plans.serve(self.name, self.version, route)
            self._submit(*self.prepare(plans, bytes(self.body), self.json_bytes))
        except OvercommitError as error:
            self.fail(error)
        except Exception:  # the request boundary
            self._fail_badly()

    def _begin_long(self) -> None:
        """Begin when another thread has decoded the body: others need not wait for that."""

        def go_on(done: asyncio.Future[long_bodies.Decoded]) -> None:
            try:
                self.prepare = done.result().prepare
            except Exception:  # the request boundary
                self._fail_badly()
            else:
                self.try_begin()

        self.body = body = bytes(self.body)
        loop = self.protocol.loop
        loop.run_in_executor(long_bodies.THREAD, long_bodies.Decoded, body).add_done_callback(go_on)

    async def _begin_later(self) -> None:
        """The version's image is being made: wait for it."""
        front = self.protocol.front
        try:
            route = await front.wait_for_route(self.name, self.version)
            if not self.disconnected:
                plans = front.plans.of(route)
                if route.steps:
                    self._begin_ensemble(plans)
                    return
                self._submit(*self.prepare(plans, bytes(self.body), self.json_bytes))
        except OvercommitError as error:
            self.fail(error)
        except Exception:  # the request boundary
            self._fail_badly()

    def _begin_ensemble(self, plans: RoutePlans) -> None:
        """Run it through its steps; the answer comes back here."""
        self._run_ensemble(*self.prepare(plans, bytes(self.body), self.json_bytes))

    def _run_ensemble(self, prepared: Prepared, data: Sequence[Data]) -> None:
        self.prepared = prepared
        self.drop_body()
        self.run = Run(self.protocol.front, prepared, data, self)

    def _submit(self, prepared: Prepared, data: Sequence[Data]) -> None:
        """Hand the request to a worker."""
        self.prepared = prepared
        front = self.protocol.front
        dispatch = front.dispatch
        now_ns = time.monotonic_ns()
        plan = prepared.plan
        self.pending = pending = dispatch.open(prepared.route, plan, self, now_ns)
        dispatch.parcels.fill(pending, plan, data)
        self.drop_body()
        if prepared.level:
            dispatch.urge(pending, prepared.level)
        dispatch.send(pending, now_ns + front.timeout_ns(prepared))

    def try_begin_bulk(self) -> list[memoryview] | None:
        """Reserve the blocks as soon as the JSON is there; return the space for the rest.

        None: the body is to be gathered as usual.  What is wrong with the request is answered then.
        """
        front, json_bytes, body_bytes = self.protocol.front, self.json_bytes, self.body_bytes
        assert json_bytes is not None
        assert body_bytes is not None
        try:
            route = front.find(self.name, self.version)
            if route is None or route.steps:
                return None
            text = bytes(self.body[:json_bytes])
            prepared = prepare_head(front.plans.of(route), text, body_bytes - json_bytes)
            if prepared is None:
                return None
            self.pending = front.dispatch.open(route, prepared.plan, self, time.monotonic_ns())
        except OvercommitError as error:
            log.debug("model '%s': not received in place: %s", self.name, error.message)
            return None
        self.prepared = prepared
        return front.dispatch.parcels.space(self.pending, prepared.plan)

    def end_bulk(self) -> None:
        """The last byte is in its place."""
        self.more_body = False
        if self.pending is not None:  # else it was answered meanwhile
            assert self.prepared is not None
            self._send(self.pending, self.prepared, time.monotonic_ns())

    def _send(self, pending: Pending, prepared: Prepared, now_ns: int) -> None:
        """Send a request whose tensors are in its block; short ones do this in `_submit`."""
        front = self.protocol.front
        front.dispatch.urge(pending, prepared.level)
        front.dispatch.send(pending, now_ns + front.timeout_ns(prepared))

    def abandon(self) -> None:
        """The client is gone."""
        self.disconnected = True
        self.prepared = None
        self.drop_body()
        if self.pending is not None:
            self.protocol.front.dispatch.abandon(self.pending)
            self.pending = None
        if self.run is not None:
            self.run.abandon()

    def drop_body(self) -> None:
        """Let go of the body, and of its part of the budget."""
        self.body = b""
        if self.held_bytes:
            self.protocol.front.bodies_bytes -= self.held_bytes
            self.held_bytes = 0

    # --- on the way out -------------------------------------------------------------------------
    def succeed(self, view: memoryview) -> None:
        """Write the model's answer."""
        self.pending = None
        assert self.prepared is not None
        try:
            answer = respond(self.prepared, view)
        except OvercommitError as error:
            self.fail(error)
            return
        except Exception:  # the request boundary: others wait for their completions
            self._fail_badly()
            return
        close = self._close_header()
        pieces = answer.pieces
        length = sum(map(len, pieces))
        if self.accepts and length >= COMPRESS_BYTES_MIN:
            self._compress(b"".join(pieces), answer.json_bytes, close)
            return
        if answer.json_bytes is None:
            head = OK_JSON % (length, close)
        else:
            head = _OK_BINARY % (answer.json_bytes, length, close)
            if length > JOIN_BYTES_MAX:
                self._finish([head + pieces[0], *pieces[1:]])
                return
        self._finish([b"".join((head, *pieces))])

    def _compress(self, body: bytes, json_bytes: int | None, close: bytes) -> None:
        """Answer compressed, in another thread where that takes time: others wait for theirs."""
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
        if json_bytes is not None:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n"
            head += b"inference-header-content-length: %d\r\n" % json_bytes
        head += b"content-encoding: %b\r\nvary: accept-encoding\r\n" % self.accepts

        def finish(small: bytes) -> None:
            self._finish([head + b"content-length: %d\r\n%b\r\n" % (len(small), close) + small])

        if len(body) <= COMPRESS_HERE_BYTES:
            finish(compression.compress(body, self.accepts))
            return
        loop = self.protocol.loop
        work = loop.run_in_executor(None, compression.compress, body, self.accepts)
        work.add_done_callback(lambda done: finish(done.result()))

    def fail(self, error: OvercommitError) -> None:
        """Write an error."""
        self.pending = None
        body = error_body(error.message)
        lines = [STATUS_LINES[error.http_status], "content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in retry_headers(error.retry_after_s)]
        lines.append(f"content-length: {len(body)}\r\n")
        self._finish(["\r\n".join(lines).encode() + self._close_header() + b"\r\n" + body])

    def _fail_badly(self) -> None:
        log.exception("a request for model '%s' failed", self.name)
        self.fail(failures.internal())

    def _close_header(self) -> bytes:
        if self.protocol.front.is_draining:
            self.keep_alive = False
        return self.echo if self.keep_alive else self.echo + _CLOSE

    def _finish(self, response: list[bytes]) -> None:
        """Write the response and let the next request of the connection go on."""
        if self.response_complete or self.disconnected:
            return
        self.response_complete = True
        # The connection keeps its last exchange: that must not hold a region, nor its plans.
        self.prepared = None
        if self.body or self.held_bytes:
            self.drop_body()
        self.protocol.on_exchange_done(self, response)
