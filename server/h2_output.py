"""What an HTTP/2 connection sends: answers of streams, within the client's windows.

A base class of the connection rather than a part of it, so that an answer costs no further call.

Invariants
 1. Nothing is sent beyond the peer's windows and its frame size, and nothing at all while the
    transport is full; what waits belongs to streams that were accepted, each an answer of ours.
 2. Frames of a stream leave in the order in which they were handed over, its last header block last;
    then it is gone.
 3. Streams that wait take turns of GRPC_JOIN_BYTES_MAX.
 4. What is written while bytes are taken in leaves in one piece with what else was written then.

Called by streams that answer, and by the connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from overcommit.server import h2
from overcommit.server.h2 import Code, ConnectionBroken
from overcommit.server.h2_stream import Stream
from overcommit.server.limits import GRPC_JOIN_BYTES_MAX

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd


class Output(asyncio.Protocol):
    """See the module."""

    def __init__(self, front: FrontEnd) -> None:
        self.front = front
        self.initial_window = h2.WINDOW_BYTES  # of the peer's, for new streams
        self.frame_bytes = h2.FRAME_BYTES
        self.streams: dict[int, Stream] = {}
        self.loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._window = h2.WINDOW_BYTES  # that we may still send, on all streams
        self._out: list[bytes | memoryview] = []
        self._is_reading = False  # what answers meanwhile is written at its end
        self._flush_is_due = False
        self._blocked: dict[int, Stream] = {}  # streams whose answers wait for a window
        self._write_since_s = 0.0
        self.is_leaving = False

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

    # --- the client's windows --------------------------------------------------------------------
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

    def _cancel(self, stream: Stream, code: Code) -> None:
        """Reset a stream; its call is nobody's any more."""
        self._write(h2.reset(stream.number, code))
        self._drop(stream)
        stream.abandon()

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

    def _close_if_left(self) -> None:
        if self.is_leaving and not self.streams and self._transport is not None:
            self._transport.close()
