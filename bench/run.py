"""What the connections of one process share: the plan's data, the counts, the answers known so far.

Invariants
 1. A head is known only if it was parsed: status 200, keep-alive, and a Content-Length that was the
    body's length.  So an answer whose head is known, byte by byte, needs no parser.
 2. Times that were noted since the last `flush` are in no histogram yet; after it they are.

Called by `connection`, `pacer` and `loadgen`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from overcommit.bench.histogram import Histogram
from overcommit.bench.request import Frame, Request, Workload
from overcommit.bench.tally import Tally
from overcommit.bench.wire import ID_CHARS, JSON_LENGTH_HEADER

HEADS_MAX: Final = 4096  # a server may put a new date, or an id, into each
HEAD_END: Final = b"\r\n\r\n"

assert ID_CHARS == 16


class Idler(Protocol):
    """A connection that waits to be told to send."""

    @property
    def is_idle(self) -> bool:
        """Whether it still does: it may have been lost."""
        ...

    def send(self, start_ns: int, now_ns: int) -> None:
        """Send the next request, which was meant to start at `start_ns`."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


@dataclass(slots=True)
class Run:
    """See the module."""

    host: str
    port: int
    workload: Workload
    seed: int
    reconnect: bool = True
    is_stopping: bool = False
    tally: Tally = field(default_factory=Tally)
    # An open loop's: takes a connection that has nothing to do.  None: it sends at once.
    on_idle: Callable[[Idler, int], None] | None = None
    last_answer_ns: int = 0
    heads: dict[bytes, Frame] = field(default_factory=dict)
    times_ns: list[int] = field(default_factory=list)  # since the start, intended or real
    services_ns: list[int] = field(default_factory=list)  # since the sending; open loops only
    learned: list[Request] = field(default_factory=list)
    _histogram: Histogram = field(default_factory=Histogram)
    _services: Histogram = field(default_factory=Histogram)
    _counter: int = 0

    def draw(self) -> Request:
        """Return the next request; an id that is used is one that no other of the run has."""
        if not self.workload.uses_ids:
            return self.workload.draw(b"")
        self._counter += 1
        return self.workload.draw(b"%06x%010x" % (self.seed & 0xFFFFFF, self._counter))

    # --- known answers --------------------------------------------------------------------------
    def learn(
        self, request: Request, head: bytes, headers: dict[bytes, bytes], body: bytes
    ) -> None:
        """Remember an answer that was judged right and whose connection stays open."""
        length = headers.get(b"content-length", b"")
        if not request.is_repeated or not head or length != b"%d" % len(body):
            return
        frame = (len(body), int(headers.get(JSON_LENGTH_HEADER, b"-1")))
        if len(self.heads) >= HEADS_MAX:
            self.heads.clear()
        self.heads[head] = frame
        if request.body is None:
            self.learned.append(request)
        request.body, request.frame = body, frame

    def is_known(self, request: Request, data: bytes) -> bool:
        """Whether these bytes are a whole answer that is known to be right for this request."""
        body = request.body
        if body is None:
            return False
        end = data.find(HEAD_END) + len(HEAD_END)
        if (
            len(data) != end + len(body)
            or self.heads.get(data[:end]) != request.frame
            or not data.startswith(body, end)
        ):
            return False
        request.answer = data  # next time one comparison is enough, until the server's clock ticks
        return True

    # --- counting -------------------------------------------------------------------------------
    def on_answer(self, now_ns: int) -> None:
        """Note the time of an answer."""
        if not self.is_stopping:
            self.tally.silence_ns = max(self.tally.silence_ns, now_ns - self.last_answer_ns)
        self.last_answer_ns = now_ns

    def stop(self, now_ns: int) -> None:
        """Let every connection end after the answer that it waits for."""
        self.on_answer(now_ns)  # a silence that lasts to the end counts
        self.tally.ended_ns = now_ns
        self.is_stopping = True

    def flush(self) -> None:
        """Put what was noted into the histograms."""
        self._histogram.record_many(self.times_ns)
        self._services.record_many(self.services_ns)
        self.times_ns.clear()
        self.services_ns.clear()

    def finish(self) -> Tally:
        """Complete the tally."""
        self.flush()
        tally = self.tally
        tally.histogram = self._histogram.to_wire()
        if self._services.count:
            tally.services = self._services.to_wire()
        for request in self.learned:
            tally.targets[request.target] = tally.targets.get(request.target, 0) + request.right
            request.right = 0
        tally.targets = {target: count for target, count in tally.targets.items() if count}
        return tally
