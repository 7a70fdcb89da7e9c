"""One HTTP/2 connection of a client: frames in, calls out; what it sends is `h2_output`'s.

It knows nothing of gRPC: whoever takes calls gives it a `Stream` for each header block.

Invariants
 1. A stream that is in `streams` hears what its client sends, in order, until it is gone.
 2. A client that sends beyond our windows, over the limits, or nothing but work, loses its
    connection, and is told why in GOAWAY.  Headers that are too long are their call's fault alone.
 3. Of frames that are not whole, headers alone are kept if they are long, and within the budget that
    bodies count against; data is never kept here.

Called by the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, Final, cast

from overcommit.server import h2, hpack
from overcommit.server.h2 import Code, ConnectionBroken
from overcommit.server.h2_headers import Heads, Unfinished
from overcommit.server.h2_output import Output
from overcommit.server.h2_stream import Calls, Stream
from overcommit.server.limits import (
    H2_FRAME_BYTES_MAX,
    H2_HEADERS_BYTES_MAX,
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

log = logging.getLogger("overcommit.grpc")

_SHORT_BYTES: Final = h2.FRAME_BYTES  # a frame of more is not kept, or is counted until it is whole
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


class Connection(Output):
    """See the module."""

    def __init__(
        self, front: FrontEnd, calls: Calls, connections: set[Connection], *, is_full: bool = False
    ) -> None:
        """`is_full`: tell the client that there are too many connections already."""
        super().__init__(front)
        self._calls = calls
        self._connections = connections
        self._is_full = is_full
        self._heads = Heads(calls.read_head)
        self._rest = bytearray()  # of a frame
        self._rest_bytes = 0  # that the frame needs to be whole
        self._is_greeted = False  # the client's preface was there
        self._data_left = 0  # of a DATA frame that is under way ...
        self._data_stream: Stream | None = None  # ... for whom; None: nobody any more
        self._data_ends = False
        self._unfinished = Unfinished(front)  # header block
        self._is_block_open = False
        self._block_stream = 0
        self._block_ends = False
        self._last_stream = 0
        self._received = 0  # since the client's window was topped up
        self._heard_s = front.clock_s
        self._begun_s = front.clock_s  # the greeting, or a frame or header block that is not whole
        self._asked_s = 0.0  # when we asked whether the client is there
        self._idle_frames = 0

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
        self._unfinished.take()
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
            self._rest += data
            if len(self._rest) < self._rest_bytes:
                return
            data, self._rest = bytes(self._rest), bytearray()
            if self._rest_bytes > _SHORT_BYTES:
                self._unfinished.let_go(self._rest_bytes)
            self._rest_bytes = 0
        self._is_reading = True
        try:
            rest = self._take(data)
        except ConnectionBroken as error:
            self._break(error)
            return
        except hpack.CompressionError as error:
            self._break(ConnectionBroken(Code.COMPRESSION_ERROR, str(error)))
            return
        if rest:
            self._rest += rest
            if not self._is_block_open:
                self._begun_s = self._heard_s
        self._is_reading = False
        if self._out:
            self._flush()

    def _take(self, data: bytes) -> bytes:
        """Handle every frame that is whole, and data as it comes; return the rest."""
        at, end = 0, len(data)
        if not self._is_greeted:
            if not h2.PREFACE.startswith(data[: len(h2.PREFACE)]):
                raise ConnectionBroken(
                    Code.PROTOCOL_ERROR,
                    "this port speaks gRPC (HTTP/2) alone",
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
            if self._is_block_open and kind != h2.CONTINUATION:
                raise ConnectionBroken(Code.PROTOCOL_ERROR, "a header block is not continued")
            if kind == h2.DATA:
                if flags & h2.PADDED:
                    if length > _SHORT_BYTES:
                        raise ConnectionBroken(Code.ENHANCE_YOUR_CALM, "a large frame is padded")
                    if stop > end:
                        self._wait_for(stop - at)
                        break
                    self._begin_data(number, length)
                    payload = h2.without_padding(data[start:stop])
                    self._deliver(payload, bool(flags & h2.END_STREAM))
                else:
                    self._begin_data(number, length)
                    if stop > end:
                        self._data_left, self._data_ends = length, bool(flags & h2.END_STREAM)
                        at = self._take_data_piece(data, start)
                        break
                    self._deliver(data[start:stop], bool(flags & h2.END_STREAM))
            elif stop > end:
                if length > _SHORT_BYTES and kind not in (h2.HEADERS, h2.CONTINUATION):
                    raise ConnectionBroken(Code.ENHANCE_YOUR_CALM, f"a frame of {length} bytes")
                self._wait_for(stop - at)
                break
            else:
                self._on_frame(kind, flags, number & h2.STREAM_MAX, data[start:stop])
            at = stop
        return data[at:]

    def _wait_for(self, nbytes: int) -> None:
        """Look at what is there again when the frame is whole."""
        self._rest_bytes = nbytes
        if nbytes > _SHORT_BYTES:
            self._unfinished.hold(nbytes)

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

    def _on_reset(self, number: int) -> None:
        self._count_idle()
        stream = self.streams.get(number)
        if stream is None:
            if not 0 < number <= self._last_stream:
                raise ConnectionBroken(Code.PROTOCOL_ERROR, f"a reset of stream {number}")
            return
        self._drop(stream)
        stream.abandon()

    # --- headers --------------------------------------------------------------------------------
    def _on_headers(self, flags: int, number: int, payload: bytes) -> None:
        if flags & h2.PADDED:
            payload = h2.without_padding(payload)
        if flags & h2.HAS_PRIORITY:
            payload = payload[5:]
        if number & 1 == 0:
            raise ConnectionBroken(Code.PROTOCOL_ERROR, f"stream {number} is no client's")
        self._block_stream, self._block_ends = number, bool(flags & h2.END_STREAM)
        if flags & h2.END_HEADERS:
            self._on_block(payload)
        else:
            self._is_block_open = True
            self._begun_s = self._heard_s
            self._unfinished.add(payload)

    def _on_continuation(self, flags: int, number: int, payload: bytes) -> None:
        if not self._is_block_open or number != self._block_stream:
            raise ConnectionBroken(Code.PROTOCOL_ERROR, "CONTINUATION of no header block")
        self._count_idle()
        self._unfinished.add(payload)
        if flags & h2.END_HEADERS:
            self._is_block_open = False
            self._on_block(self._unfinished.take())

    def _on_block(self, block: bytes) -> None:
        head = self._heads[block]
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
        elif not self._is_greeted or self._is_block_open or self._rest:
            if now_s - self._begun_s > HEAD_TIMEOUT_S:
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
