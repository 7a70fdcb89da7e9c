"""A stream of an HTTP/2 connection: one call, as the connection sees it.

    OPEN --END_STREAM of the client--> HALF --last frame of ours--> gone
    OPEN | HALF --[RST_STREAM, connection lost]--> `abandon`, gone

Invariants
 1. A stream is told of its end once: it ends itself, by its last header block (`Output.send`,
    `Output.refuse`), or `abandon` is called.
 2. The connection alone writes the fields; a subclass reads them.

Called by the connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from overcommit.server.limits import BODY_TIMEOUT_S, H2_WINDOW_BYTES

if TYPE_CHECKING:
    from overcommit.server import hpack
    from overcommit.server.grpc_wire import CallHead
    from overcommit.server.h2_connection import Connection


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

    def read_head(self, headers: Sequence[hpack.Header] | None) -> CallHead:
        """Read what a header block says; kept for as long as an equal block says the same.

        None: they were too long, and their call is to be refused.
        """
        ...

    def open(self, connection: Connection, number: int, head: CallHead) -> Stream:
        """Make the stream of a call; it may have answered already."""
        ...


def is_late(stream: Stream, now_s: float) -> bool:
    """Whether the client takes too long to send its one message."""
    return now_s - stream.began_s > BODY_TIMEOUT_S
