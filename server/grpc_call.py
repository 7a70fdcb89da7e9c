"""gRPC calls: from the first byte of a message to the status at the end.

    unary   RECEIVING --END_STREAM--> RUNNING --[answer, failure]--> ended
    any     --[RST_STREAM, connection lost]--> abandoned: what runs for the call is ended (`stop`)

What infers is in `grpc_infer_calls`.

Invariants
 1. A call ends once: with OK, with a status that is no OK, or abandoned by its client.
 2. A message is refused for its size before memory is taken for it; what is kept of messages, whole
    or not, counts against the budget that HTTP bodies count against, until it is submitted.

Called by the HTTP/2 connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from overcommit.runtime.config import NEVER_NS
from overcommit.runtime.errors import OvercommitError
from overcommit.server import failures, grpc_wire
from overcommit.server.grpc_handler import Handler
from overcommit.server.grpc_inference import Service
from overcommit.server.grpc_wire import CallFailed, CallHead, Status, failure_of
from overcommit.server.h2_connection import Connection
from overcommit.server.h2_stream import Stream, is_late
from overcommit.server.inference import Data
from overcommit.server.limits import BODIES_BYTES_MAX

log = logging.getLogger("overcommit.grpc")

_PREFIX: Final = grpc_wire.PREFIX_BYTES


class Call(Stream):
    """Puts messages together; a subclass says what becomes of them."""

    __slots__ = (
        "_compressed",
        "_filled",
        "_held",
        "_message",
        "_start",
        "deadline_ns",
        "head",
        "service",
    )

    def __init__(
        self, connection: Connection, number: int, service: Service, head: CallHead
    ) -> None:
        super().__init__(connection, number)
        self.service = service
        self.head = head
        timeout_ns = head.timeout_ns
        self.deadline_ns = NEVER_NS if timeout_ns is None else time.monotonic_ns() + timeout_ns
        self._start = b""  # of a message's prefix
        self._message: bytearray | None = None  # under way
        self._filled = 0
        self._compressed = False
        self._held = 0  # of the budget for long bodies

    # --- messages in ----------------------------------------------------------------------------
    def on_data(self, data: Data, is_end: bool) -> None:
        """Take bytes of the client."""
        try:
            if (
                type(data) is bytes
                and len(data) >= _PREFIX
                and not self._start
                and self._message is None
                and not data[0]
                and int.from_bytes(data[1:_PREFIX], "big") + _PREFIX == len(data)
            ):
                self._check_size(len(data) - _PREFIX)
                self.on_message(data[_PREFIX:], is_end)  # a whole message, as most are
            else:
                self._gather(data)
            if is_end and not self.is_gone:
                self.on_end()
            elif not self.is_ended:
                self.top_up()
        except CallFailed as failure:
            self.refuse(failure)

    def _gather(self, data: Data) -> None:
        at, end = 0, len(data)
        while at < end and not self.is_gone:
            if self._message is None:
                count = min(_PREFIX - len(self._start), end - at)
                self._start += bytes(data[at : at + count])
                at += count
                if len(self._start) < _PREFIX:
                    return
                self._begin_message()
            assert self._message is not None
            count = min(len(self._message) - self._filled, end - at)
            self._message[self._filled : self._filled + count] = data[at : at + count]
            self._filled += count
            at += count
            if self._filled == len(self._message):
                message, self._message = self._message, None
                self._take(message)

    def _begin_message(self) -> None:
        flag, length = self._start[0], int.from_bytes(self._start[1:], "big")
        self._start = b""
        if flag > 1:
            raise CallFailed(Status.INTERNAL, f"a message has the unknown flags {flag}")
        self._compressed = bool(flag)
        self._check_size(length)
        self.hold(length)
        self._message, self._filled = bytearray(length), 0
        if not length:
            self._message = None
            self._take(bytearray())

    def _check_size(self, length: int) -> None:
        limit = self.service.front.settings.body_bytes_max
        if length > limit:
            raise CallFailed(
                Status.RESOURCE_EXHAUSTED,
                f"a message of {length} bytes, the limit is {limit}; send less in one request or "
                f"raise --max-body",
            )

    def _take(self, message: bytearray) -> None:
        self.let_go(len(message))
        data: Data = memoryview(message)
        if self._compressed:
            if self.head.encoding == "identity":
                raise CallFailed(Status.INTERNAL, "a message is compressed without grpc-encoding")
            limit = self.service.front.settings.body_bytes_max
            try:
                data = grpc_wire.decompress(bytes(message), self.head.encoding, limit)
            except OvercommitError as error:
                raise failure_of(error) from error
        self.on_message(data, False)

    def hold(self, nbytes: int) -> None:
        """Count bytes that are kept against the budget of all bodies.  Raises CallFailed."""
        front = self.service.front
        if front.bodies_bytes + nbytes > BODIES_BYTES_MAX:
            raise CallFailed(Status.UNAVAILABLE, "too many messages are being received", 1.0)
        front.bodies_bytes += nbytes
        self._held += nbytes

    def let_go(self, nbytes: int) -> None:
        """Bytes that were held are kept no more."""
        self.service.front.bodies_bytes -= nbytes
        self._held -= nbytes

    def release(self) -> None:
        """Give back what the messages take of the budget."""
        self.service.front.bodies_bytes -= self._held
        self._held = 0

    def top_up(self) -> None:
        """Let the client send on."""
        self.connection.top_up(self)

    def check_time(self, now_s: float) -> None:
        """Refuse a client that does not get its message out."""
        if is_late(self, now_s):
            self.refuse(
                CallFailed(Status.DEADLINE_EXCEEDED, "the message was not complete in time")
            )

    def on_message(self, message: Data, is_last: bool) -> None:
        """A message is there."""
        raise NotImplementedError

    def on_end(self) -> None:
        """The client has sent all."""
        raise NotImplementedError

    # --- messages out ---------------------------------------------------------------------------
    def send_message(self, pieces: list[bytes], trailers: bytes | None) -> None:
        """Send one message, compressed if the client's are."""
        encoding = self.head.answers_in
        is_compressed = encoding != "identity"
        if is_compressed:
            pieces = [grpc_wire.compress(b"".join(pieces), encoding)]
        prefix = grpc_wire.prefix(sum(map(len, pieces)), is_compressed=is_compressed)
        self.connection.send(self, grpc_wire.BEGIN[encoding], [prefix, *pieces], trailers)

    def refuse(self, failure: CallFailed) -> None:
        """End with this status."""
        self.release()
        self.stop()
        self.connection.refuse(self, grpc_wire.trailers(failure, is_only=not self.has_headers))

    def stop(self) -> None:
        """Let go of what runs for the call."""

    def abandon(self) -> None:
        """The client is gone."""
        self.release()
        self.stop()


class Unary(Call):
    """A call of one message; `run` begins when the client has sent all."""

    __slots__ = ("_whole",)

    def __init__(
        self, connection: Connection, number: int, service: Service, head: CallHead
    ) -> None:
        super().__init__(connection, number, service, head)
        self._whole: Data | None = None

    def on_message(self, message: Data, is_last: bool) -> None:
        """Keep the message; a second one is a fault."""
        if self._whole is not None:
            raise CallFailed(Status.UNIMPLEMENTED, "the method takes one message, two came")
        if not is_last:
            self.hold(len(message))
        self._whole = message

    def on_end(self) -> None:
        """Run."""
        message, self._whole = self._whole, None
        if message is None:
            raise CallFailed(Status.INTERNAL, "the method takes one message, none came")
        self.run(message)

    def run(self, message: Data) -> None:
        """Answer the message."""
        raise NotImplementedError


class OtherCall(Unary):
    """Every other method: a task that ends with the call."""

    __slots__ = ("_handler", "_task")

    def __init__(
        self,
        connection: Connection,
        number: int,
        service: Service,
        head: CallHead,
        handler: Handler,
    ) -> None:
        super().__init__(connection, number, service, head)
        self._handler = handler
        self._task: asyncio.Task[None] | None = None

    def run(self, message: Data) -> None:
        """Start the task."""
        self._task = asyncio.get_running_loop().create_task(self._answer(bytes(message)))
        self.release()

    async def _answer(self, message: bytes) -> None:
        left_s = None
        if self.deadline_ns != NEVER_NS:
            left_s = max(0.0, (self.deadline_ns - time.monotonic_ns()) / 1e9)
        try:
            answer = await asyncio.wait_for(self._handler(message), left_s)
        except TimeoutError:
            failure = CallFailed(Status.DEADLINE_EXCEEDED, "no answer within the request's time")
        except CallFailed as error:
            failure = error
        except OvercommitError as error:
            failure = failure_of(error)
        except Exception:  # the request boundary
            log.exception("the gRPC method %s failed", self.head.path)
            failure = CallFailed(Status.INTERNAL, failures.internal().message)
        else:
            self._task = None
            self.send_message([answer], grpc_wire.TRAILERS_OK)
            return
        self._task = None
        self.refuse(failure)

    def stop(self) -> None:
        """End the task."""
        if self._task is not None:
            self._task.cancel()


class Refused(Call):
    """A call that ended with its headers."""

    __slots__ = ()

    def on_message(self, message: Data, is_last: bool) -> None:
        """Nothing: it is gone."""

    def on_end(self) -> None:
        """Nothing: it is gone."""
