"""One HTTP/2 connection of a client: frames in, calls out; windows both ways.

It knows nothing of gRPC: whoever takes calls gives it a `Stream` for each header block.

    stream: OPEN --END_STREAM of the client--> HALF --last frame of ours--> gone
            OPEN | HALF --[RST_STREAM, connection lost]--> `abandon`, gone

Invariants
 1. A stream is told of its end once: it ends itself (`finish`), or `abandon` is called.
 2. Nothing is sent beyond the peer's windows and its frame size, and nothing at all while the
    transport is full; what waits belongs to streams that were accepted, each an answer of ours.
 3. A client that sends beyond our windows, over the limits, or nothing but work, loses its
    connection, and is told why in GOAWAY.
 4. Incomplete frames that are kept are shorter than H2_HEADERS_BYTES_MAX; data is never kept here.

Called by the event loop, and by streams that answer.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol, cast

from overcommit.server import h2, hpack
from overcommit.server.h2 import Code, ConnectionBroken
from overcommit.server.limits import (
    BODY_TIMEOUT_S,
    GRPC_JOIN_BYTES_MAX,
    H2_FRAME_BYTES_MAX,
    H2_HEADERS_BYTES_MAX,
    H2_HEADS_MAX,
    H2_IDLE_FRAMES_MAX,
    H2_IDLE_S,
    H2_PING_TIMEOUT_S,
    H2_STREAMS_MAX,
    H2_WINDOW_BYTES,
    HEAD_TIMEOUT_S,
    WRITE_TIMEOUT_S,
)

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd
    from overcommit.server.grpc_wire import CallHead

log = logging.getLogger("overcommit.grpc")

_PADDED_BYTES_MAX: Final = h2.FRAME_BYTES
_CONNECTION_WINDOW: Final = 1 << 30  # the streams' windows are the ones that hold
_WINDOW_STEP: Final = _CONNECTION_WINDOW // 2
_GREETING: Final = h2.settings(
    {
        h2.MAX_CONCURRENT_STREAMS: H2_STREAMS_MAX,
        h2.INITIAL_WINDOW_SIZE: H2_WINDOW_BYTES,
        h2.MAX_FRAME_SIZE: H2_FRAME_BYTES_MAX,
        h2.MAX_HEADER_LIST_SIZE: H2_HEADERS_BYTES_MAX,
    }
) + h2.window_update(0, _CONNECTION_WINDOW - h2.WINDOW_BYTES)
_SETTINGS_ACK: Final = h2.frame(h2.SETTINGS, h2.ACK, 0)
_ARE_YOU_THERE: Final = h2.frame(h2.PING, 0, 0, b"are you?")


class Stream:
    """One call, as the connection sees it; what it means is the subclass's."""

    __slots__ = (
        "began_s",
        "connection",
        "has_headers",
        "is_ended",
        "is_gone",
        "number",
        "queue",
        "room",
        "trailers",
        "window",
    )

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection = connection
        self.number = number
        self.window = connection.initial_window  # that we may still send
        self.room = H2_WINDOW_BYTES  # that the client may still send
        self.began_s = connection.front.clock_s
        self.is_ended = False  # the client has sent all
        self.is_gone = False
        self.has_headers = False  # ours are sent
        self.queue: deque[memoryview] | None = None  # ours, that wait for a window
        self.trailers: bytes | None = None  # behind the queue

    def on_data(self, data: bytes | memoryview, is_end: bool) -> None:
        """Bytes of the client; they are gone after the call."""
        raise NotImplementedError

    def abandon(self) -> None:
        """The client is gone, or wants nothing of it any more."""
        raise NotImplementedError

    def check_time(self, now_s: float) -> None:
        """Once a second, while the client has not sent all."""
        raise NotImplementedError

    def on_sent(self) -> None:
        """What waited for a window is sent."""


class Calls(Protocol):
    """Who takes calls."""

    def read_head(self, headers: Sequence[hpack.Header]) -> CallHead:
        """Read what a header block says; kept for as long as an equal block says the same."""
        ...

    def open(self, connection: Connection, number: int, head: CallHead) -> Stream:
        """Make the stream of a call; it may have answered already."""
        ...


class Connection(asyncio.Protocol):
    """See the module."""

    def __init__(
        self, front: FrontEnd, calls: Calls, connections: set[Connection], *, is_full: bool = False
    ) -> None:
        """`is_full`: tell the client that there are too many connections already."""
        self.front = front
        self.initial_window = h2.WINDOW_BYTES
        self.frame_bytes = h2.FRAME_BYTES
        self.streams: dict[int, Stream] = {}
        self._calls = calls
        self._connections = connections
        self._is_full = is_full
        self._transport: asyncio.Transport | None = None
        self.loop = asyncio.get_running_loop()
        self._decoder = hpack.Decoder()
        self._heads: dict[bytes, CallHead] = {}
        self._heads_of = 0  # the decoder's generation
        self._rest = b""  # of a frame
        self._is_greeted = False  # the client's preface was there
        self._data_left = 0  # of a DATA frame that is under way ...
        self._data_stream: Stream | None = None  # ... for whom; None: nobody any more
        self._data_ends = False
        self._block: list[bytes] | None = None  # header block under way
        self._block_stream = 0
        self._block_ends = False
        self._last_stream = 0
        self._window = h2.WINDOW_BYTES  # that we may still send, on all streams
        self._received = 0  # since the client's window was topped up
        self._out: list[bytes | memoryview] = []
        self._is_reading = False
        self._flush_is_due = False
        self._blocked: dict[int, Stream] = {}  # streams whose answers wait for a window
        self._write_since_s = 0.0
        self._heard_s = front.clock_s
        self._asked_s = 0.0  # when we asked whether the client is there
        self._idle_frames = 0
        self.is_leaving = False

    # --- life -----------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is none
        self._connections.add(self)
        transport.write(_GREETING)
        if self._is_full:
            self._break(ConnectionBroken(Code.ENHANCE_YOUR_CALM, "too many connections are open"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._transport = None
        self._out.clear()
        self._blocked.clear()
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream.is_gone = True
            stream.abandon()

    def leave(self, *, now: bool) -> None:
        """Take no new calls; `now`: say which was the last, and close when all are answered."""
        last = self._last_stream if now else h2.STREAM_MAX
        self._write(h2.goaway(last, Code.NO_ERROR))
        self.is_leaving = self.is_leaving or now
        self._flush()
        self._close_if_left()

    def _close_if_left(self) -> None:
        if self.is_leaving and not self.streams and self._transport is not None:
            self._transport.close()

    def _break(self, error: ConnectionBroken) -> None:
        log.info("a gRPC connection is closed: %s", error.text)
        self._write(h2.goaway(self._last_stream, error.code, error.text))
        self._is_reading = False
        self._flush()
        if self._transport is not None:
            self._transport.close()

    # --- bytes in -------------------------------------------------------------------------------
    def data_received(self, data: bytes) -> None:
        self._heard_s, self._asked_s = self.front.clock_s, 0.0
        if self._rest:
            data = self._rest + data
            self._rest = b""
        self._is_reading = True
        try:
            self._rest = self._take(data)
        except ConnectionBroken as error:
            self._break(error)
            return
        except hpack.CompressionError as error:
            self._break(ConnectionBroken(Code.COMPRESSION_ERROR, str(error)))
            return
        self._is_reading = False
        if self._out:
            self._flush()

    def _take(self, data: bytes) -> bytes:
        """Handle every frame that is whole, and data as it comes; return the rest."""
        at, end = 0, len(data)
        if not self._is_greeted:
            if not h2.PREFACE.startswith(data[: len(h2.PREFACE)]):
                raise ConnectionBroken(
                    Code.PROTOCOL_ERROR, "this port speaks gRPC (HTTP/2 without TLS) alone"
                )
            if end < len(h2.PREFACE):
                return data
            self._is_greeted = True
            at = len(h2.PREFACE)
        if self._data_left:
            at = self._take_data_piece(data, at)
        unpack = h2.HEAD.unpack_from
        while end - at >= h2.HEAD_BYTES:
            high, low, kind, flags, number = unpack(data, at)
            length = high << 16 | low
            start = at + h2.HEAD_BYTES
            stop = start + length
            if length > H2_FRAME_BYTES_MAX:
                raise ConnectionBroken(Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            if self._block is not None and kind != h2.CONTINUATION:
                raise ConnectionBroken(Code.PROTOCOL_ERROR, "a header block is not continued")
            if kind == h2.DATA:
                if flags & h2.PADDED:
                    if length > _PADDED_BYTES_MAX:
                        raise ConnectionBroken(Code.ENHANCE_YOUR_CALM, "a large frame is padded")
                    if stop > end:
                        break
                    self._begin_data(number, length)
                    payload = _without_padding(data[start:stop])
                    self._deliver(payload, bool(flags & h2.END_STREAM))
                else:
                    self._begin_data(number, length)
                    if stop > end:
                        self._data_left, self._data_ends = length, bool(flags & h2.END_STREAM)
                        at = self._take_data_piece(data, start)
                        break
                    self._deliver(data[start:stop], bool(flags & h2.END_STREAM))
            elif stop > end:
                if length > H2_HEADERS_BYTES_MAX:
                    raise ConnectionBroken(Code.ENHANCE_YOUR_CALM, f"a frame of {length} bytes")
                break
            else:
                self._on_frame(kind, flags, number & h2.STREAM_MAX, data[start:stop])
            at = stop
        return data[at:]

    def _begin_data(self, number: int, length: int) -> None:
        """A DATA frame: count it against the windows."""
        self._received += length
        if self._received >= _WINDOW_STEP:
            self._write(h2.window_update(0, self._received))
            self._received = 0
        stream = self.streams.get(number)
        if stream is None:
            if not 0 < number <= self._last_stream:
                raise ConnectionBroken(Code.PROTOCOL_ERROR, f"data for stream {number}")
        elif stream.is_ended:
            raise ConnectionBroken(Code.STREAM_CLOSED, f"data behind the end of stream {number}")
        else:
            stream.room -= length
            if stream.room < 0:
                raise ConnectionBroken(Code.FLOW_CONTROL_ERROR, "data beyond a stream's window")
        self._data_stream = stream

    def _take_data_piece(self, data: bytes, at: int) -> int:
        stop = min(at + self._data_left, len(data))
        self._data_left -= stop - at
        is_end = self._data_ends and not self._data_left
        if stop > at:
            piece = memoryview(data)[at:stop]
            self._deliver(piece, is_end)
        return stop

    def _deliver(self, data: bytes | memoryview, is_end: bool) -> None:
        stream = self._data_stream
        if not len(data) and not is_end:
            self._count_idle()
        if stream is None or stream.is_gone:
            return
        if is_end:
            stream.is_ended = True
        stream.on_data(data, is_end)

    def top_up(self, stream: Stream) -> None:
        """Let a stream's client send on, when it has used up half of its window."""
        used = H2_WINDOW_BYTES - stream.room
        if used >= H2_WINDOW_BYTES // 2 and not stream.is_ended and not stream.is_gone:
            stream.room = H2_WINDOW_BYTES
            self._write(h2.window_update(stream.number, used))
            if not self._is_reading:
                self._flush()

    # --- frames that are whole ------------------------------------------------------------------
    def _on_frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == h2.HEADERS:
            self._on_headers(flags, number, payload)
        elif kind == h2.WINDOW_UPDATE:
            self._on_window(number, h2.read_word(payload))
        elif kind == h2.CONTINUATION:
            self._on_continuation(flags, number, payload)
        elif kind == h2.SETTINGS:
            self._on_settings(flags, payload)
        elif kind == h2.PING:
            if len(payload) != 8:
                raise ConnectionBroken(Code.FRAME_SIZE_ERROR, "a PING of another length than 8")
            if not flags & h2.ACK:
                self._count_idle()
                self._write(h2.frame(h2.PING, h2.ACK, 0, payload))
        elif kind == h2.RST_STREAM:
            self._on_reset(number)
        elif kind == h2.PUSH_PROMISE:
            raise ConnectionBroken(Code.PROTOCOL_ERROR, "a client pushes")
        else:  # PRIORITY, GOAWAY, and kinds that we do not know: nothing to do
            self._count_idle()

    def _count_idle(self) -> None:
        self._idle_frames += 1
        if self._idle_frames > H2_IDLE_FRAMES_MAX:
            raise ConnectionBroken(
                Code.ENHANCE_YOUR_CALM, f"over {H2_IDLE_FRAMES_MAX} frames a second bring nothing"
            )

    def _on_settings(self, flags: int, payload: bytes) -> None:
        if flags & h2.ACK:
            return
        self._count_idle()
        for name, value in h2.read_settings(payload):
            if name == h2.INITIAL_WINDOW_SIZE:
                if value > h2.WINDOW_BYTES_MAX:
                    raise ConnectionBroken(Code.FLOW_CONTROL_ERROR, "a window is too large")
                change = value - self.initial_window
                self.initial_window = value
                for stream in self.streams.values():
                    stream.window += change
            elif name == h2.MAX_FRAME_SIZE:
                if not h2.FRAME_BYTES <= value < 1 << 24:
                    raise ConnectionBroken(Code.PROTOCOL_ERROR, f"frames of {value} bytes")
                self.frame_bytes = value
        self._write(_SETTINGS_ACK)
        self._pump()

    def _on_window(self, number: int, nbytes: int) -> None:
        if number:
            stream = self.streams.get(number)
            if stream is None:
                return
            stream.window += nbytes
            if not nbytes or stream.window > h2.WINDOW_BYTES_MAX:
                self._cancel(stream, Code.FLOW_CONTROL_ERROR)
                return
        else:
            self._window += nbytes
            if not nbytes or self._window > h2.WINDOW_BYTES_MAX:
                raise ConnectionBroken(Code.FLOW_CONTROL_ERROR, "the window is too large")
        if self._blocked:
            self._pump()

    def _on_reset(self, number: int) -> None:
        self._count_idle()
        stream = self.streams.get(number)
        if stream is None:
            if not 0 < number <= self._last_stream:
                raise ConnectionBroken(Code.PROTOCOL_ERROR, f"a reset of stream {number}")
            return
        self._drop(stream)
        stream.abandon()

    def _cancel(self, stream: Stream, code: Code) -> None:
        """Reset a stream; its call is nobody's any more."""
        self._write(h2.reset(stream.number, code))
        self._drop(stream)
        stream.abandon()

    # --- headers --------------------------------------------------------------------------------
    def _on_headers(self, flags: int, number: int, payload: bytes) -> None:
        if flags & h2.PADDED:
            payload = _without_padding(payload)
        if flags & h2.HAS_PRIORITY:
            payload = payload[5:]
        if number & 1 == 0:
            raise ConnectionBroken(Code.PROTOCOL_ERROR, f"stream {number} is no client's")
        self._block_stream, self._block_ends = number, bool(flags & h2.END_STREAM)
        if flags & h2.END_HEADERS:
            self._on_block(payload)
        else:
            self._block = [payload]

    def _on_continuation(self, flags: int, number: int, payload: bytes) -> None:
        block = self._block
        if block is None or number != self._block_stream:
            raise ConnectionBroken(Code.PROTOCOL_ERROR, "CONTINUATION of no header block")
        self._count_idle()
        block.append(payload)
        if sum(map(len, block)) > H2_HEADERS_BYTES_MAX:
            raise ConnectionBroken(
                Code.ENHANCE_YOUR_CALM, f"a header block is over {H2_HEADERS_BYTES_MAX} bytes"
            )
        if flags & h2.END_HEADERS:
            self._block = None
            self._on_block(b"".join(block))

    def _on_block(self, block: bytes) -> None:
        # Even a block that nobody wants must be read: it may change the table.
        head = self._heads.get(block)
        if head is None:
            head = self._calls.read_head(self._decoder.decode(block))
            if self._heads_of != self._decoder.generation or len(self._heads) >= H2_HEADS_MAX:
                self._heads_of = self._decoder.generation
                self._heads.clear()
                # A block that changes the table means something else the next time.
            else:
                self._heads[block] = head
        number = self._block_stream
        stream = self.streams.get(number)
        if stream is not None:  # trailers
            if not self._block_ends or stream.is_ended:
                raise ConnectionBroken(Code.PROTOCOL_ERROR, "headers in the middle of a stream")
            self._data_stream = stream
            self._deliver(b"", True)
            return
        if number <= self._last_stream:
            return  # of a stream that we have ended
        self._last_stream = number
        if len(self.streams) >= H2_STREAMS_MAX or self.is_leaving:
            self._write(h2.reset(number, Code.REFUSED_STREAM))
            self._count_idle()
            return
        stream = self._calls.open(self, number, head)
        if self._block_ends:
            stream.is_ended = True
        if not stream.is_gone:
            self.streams[number] = stream
            if self._block_ends:
                stream.on_data(b"", True)

    # --- answers --------------------------------------------------------------------------------
    def send(
        self, stream: Stream, headers: bytes, pieces: Sequence[bytes], trailers: bytes | None
    ) -> None:
        """Send a part of an answer: header block (the first time), data, trailers (the last time).

        What the windows do not allow waits.
        """
        if stream.is_gone:
            return
        number = h2.stream_bytes(stream.number)
        out = self._out
        if not stream.has_headers:
            stream.has_headers = True
            out += (h2.frame_head(len(headers), h2.HEADERS, h2.END_HEADERS), number, headers)
        length = sum(map(len, pieces))
        is_short = length <= GRPC_JOIN_BYTES_MAX and length <= self.frame_bytes
        if is_short and not stream.queue and length <= stream.window and length <= self._window:
            if length:
                stream.window -= length
                self._window -= length
                out += (h2.frame_head(length, h2.DATA, 0), number, *pieces)
            if trailers is not None:
                self._end(stream, trailers)
        else:
            if stream.queue is None:
                stream.queue = deque()
            stream.queue.extend(memoryview(piece) for piece in pieces if piece)
            stream.trailers = trailers
            self._blocked[stream.number] = stream
            self._pump()
        self._flush_soon()

    def refuse(self, stream: Stream, block: bytes) -> None:
        """End a stream with one header block and nothing else."""
        if stream.is_gone:
            return
        stream.queue = None
        self._end(stream, block)
        self._flush_soon()

    def _end(self, stream: Stream, block: bytes) -> None:
        """Send the last header block; the stream is gone."""
        flags = h2.END_HEADERS | h2.END_STREAM
        number = h2.stream_bytes(stream.number)
        self._out += (h2.frame_head(len(block), h2.HEADERS, flags), number, block)
        if not stream.is_ended:
            # The client need not send the rest.
            self._out.append(h2.reset(stream.number, Code.NO_ERROR))
        self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        stream.is_gone = True
        stream.queue = None
        self.streams.pop(stream.number, None)
        self._blocked.pop(stream.number, None)
        if self.is_leaving and not self.streams:
            self.loop.call_soon(self._close_if_left)

    def _pump(self) -> None:
        """Send what waits, as far as windows and transport allow; streams take turns."""
        while self._blocked and self._window > 0 and not self._write_since_s:
            sent = 0
            for stream in list(self._blocked.values()):
                sent += self._pump_stream(stream)
            if not sent:
                break
            if sum(map(len, self._out)) >= GRPC_JOIN_BYTES_MAX:
                self._flush()  # the transport says when it is full
        if not self._is_reading:
            self._flush()

    def _pump_stream(self, stream: Stream) -> int:
        """Send up to one turn's bytes; return how many, and 1 for an end without any."""
        queue = stream.queue
        number = h2.stream_bytes(stream.number)
        sent = 0
        while queue:
            piece = queue[0]
            length = min(len(piece), stream.window, self._window, self.frame_bytes)
            if length <= 0:
                return sent
            if length == len(piece):
                queue.popleft()
            else:
                queue[0] = piece[length:]
            stream.window -= length
            self._window -= length
            sent += length
            head = h2.frame_head(length, h2.DATA, 0)
            self._out += (head, number, piece[:length])
            if sent >= GRPC_JOIN_BYTES_MAX:
                break
        if not queue:
            self._blocked.pop(stream.number, None)
            if stream.trailers is not None:
                self._end(stream, stream.trailers)
            else:
                self.loop.call_soon(stream.on_sent)
        return sent or 1

    # --- bytes out ------------------------------------------------------------------------------
    def _write(self, data: bytes) -> None:
        self._out.append(data)

    def _flush_soon(self) -> None:
        """Write now; or, where others are likely to answer too, all together."""
        if self._is_reading or self._flush_is_due:
            return
        if self.streams:
            self._flush_is_due = True
            self.loop.call_soon(self._flush)
        else:
            self._flush()

    def _flush(self) -> None:
        self._flush_is_due = False
        out = self._out
        if not out:
            return
        self._out = []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(out))

    def pause_writing(self) -> None:
        self._write_since_s = self.front.clock_s or 1.0
        if self._transport is not None:
            # A client that does not read its answers is not read either.
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._write_since_s = 0.0
        if self._transport is not None:
            self._transport.resume_reading()
        self._pump()

    # --- time -----------------------------------------------------------------------------------
    def check_times(self, now_s: float) -> None:
        """Once a second: close what hangs, ask who is silent."""
        self._idle_frames = 0
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        silent_s = now_s - self._heard_s
        if self._write_since_s:
            if now_s - self._write_since_s > WRITE_TIMEOUT_S:
                transport.abort()
        elif not self._is_greeted or self._block is not None or self._rest:
            if silent_s > HEAD_TIMEOUT_S:
                transport.abort()
        elif self._asked_s:
            if now_s - self._asked_s > H2_PING_TIMEOUT_S:
                transport.abort()
        elif silent_s > H2_IDLE_S:
            self._asked_s = now_s
            self._write(_ARE_YOU_THERE)
            self._flush()
        for stream in list(itertools.islice(self.streams.values(), H2_STREAMS_MAX)):
            if not stream.is_ended:
                stream.check_time(now_s)


def is_late(stream: Stream, now_s: float) -> bool:
    """Whether the client takes too long to send its one message."""
    return now_s - stream.began_s > BODY_TIMEOUT_S


def _without_padding(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise ConnectionBroken(Code.PROTOCOL_ERROR, "padding is longer than its frame")
    return payload[1 : len(payload) - payload[0]]
