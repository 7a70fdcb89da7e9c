"""The open loop: sends each request when it is due, on a connection that is free.

A request that comes due while every connection waits for an answer goes into a queue and is sent
when one is free; its time runs from its intended start all the same (coordinated omission is the
error of starting the clock late, or of leaving such requests out).

Invariants
 1. Every start of the schedule before the run's end is `intended`, and then either sent, once, in
    order, or `unsent`.
 2. While the queue holds something no connection is idle.

Called by `loadgen`; connections come back through `on_idle`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from overcommit.bench.alarm import Alarm
from overcommit.bench.arrivals import Schedule
from overcommit.bench.run import Idler, Run


class Pacer:
    """See the module."""

    def __init__(self, run: Run, schedule: Schedule, queue_max: int) -> None:
        self._run = run
        self._schedule = schedule
        self._queue_max = queue_max
        self._queue: deque[int] = deque()  # intended starts
        self._idle: deque[Idler] = deque()
        self._origin_ns = 0
        self._alarm: Alarm | None = None
        run.on_idle = self.on_idle

    @property
    def is_over(self) -> bool:
        """Whether everything that the schedule held was sent."""
        return self._schedule.next_ns() is None and not self._queue

    def start(self, loop: asyncio.AbstractEventLoop, now_ns: int) -> None:
        """Begin the schedule now."""
        self._origin_ns = now_ns
        self._alarm = Alarm(loop, self._on_ring)
        self._set()

    def on_idle(self, connection: Idler, now_ns: int) -> None:
        """A connection is free: it takes what waits longest, or waits itself."""
        if self._queue:
            self._send(connection, self._queue.popleft(), now_ns)
        else:
            self._idle.append(connection)

    def stop(self, now_ns: int) -> None:
        """The run ends: what was due and not sent never will be; idle connections close."""
        if self._alarm is not None:
            self._alarm.close()
            self._alarm = None
            due = len(self._schedule.take(now_ns - self._origin_ns))
            self._run.tally.intended += due
            self._run.tally.unsent += due + len(self._queue)
        self._queue.clear()
        while self._idle:
            self._idle.pop().close()

    # --- inside ---------------------------------------------------------------------------------
    def _set(self) -> None:
        next_ns = self._schedule.next_ns()
        if next_ns is not None and self._alarm is not None:
            self._alarm.set(self._origin_ns + next_ns)

    def _on_ring(self) -> None:
        tally = self._run.tally
        now_ns = time.monotonic_ns()
        for offset_ns in self._schedule.take(now_ns - self._origin_ns):
            start_ns = self._origin_ns + offset_ns
            tally.intended += 1
            connection = self._next_idle()
            if connection is not None:
                self._send(connection, start_ns, now_ns)
            elif len(self._queue) < self._queue_max:
                self._queue.append(start_ns)
                tally.queue_peak = max(tally.queue_peak, len(self._queue))
            else:
                tally.unsent += 1
        self._set()

    def _next_idle(self) -> Idler | None:
        while self._idle:
            connection = self._idle.popleft()
            if connection.is_idle:  # it may have been lost while it waited
                return connection
        return None

    def _send(self, connection: Idler, start_ns: int, now_ns: int) -> None:
        tally = self._run.tally
        tally.late_ns = max(tally.late_ns, now_ns - start_ns)
        connection.send(start_ns, now_ns)
