"""The loop-back limit: how often bytes can go to another process and back, with nothing else done.

Requests and answers have the sizes of real ones; both sides are uvloop protocols without HTTP or
JSON.  What a server reaches beside it is what its HTTP, JSON, batching and model leave over.

Run as `python -m overcommit.bench.pingpong ANSWER_BYTES`: the answering side; says its port.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Final, cast

import uvloop

from overcommit.bench.errors import BenchError

SECONDS: Final = 1.5
REQUEST_BYTES: Final = 330  # of V2 in JSON with FP32 [1,16]
ANSWER_BYTES: Final = 380
END_LIMIT_S: Final = 10.0


class _Side(asyncio.Protocol):
    """Sends `reply` whenever `expected` bytes have come."""

    def __init__(self, expected: int, reply: bytes) -> None:
        self._expected = expected
        self._reply = reply
        self._got = 0
        self.trips = 0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._got += len(data)
        if self._got >= self._expected:
            assert self.transport is not None
            self._got -= self._expected
            self.trips += 1
            self.transport.write(self._reply)


async def _answer(answer_bytes: int) -> None:
    """Answer until standard input is closed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: _Side(REQUEST_BYTES, b"y" * answer_bytes), "127.0.0.1", 0
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.buffer.read)


async def _ask(port: int, connections: int, seconds: float) -> float:
    loop = asyncio.get_running_loop()
    request = b"x" * REQUEST_BYTES
    sides = [_Side(ANSWER_BYTES, request) for _ in range(connections)]
    for side in sides:
        await loop.create_connection(lambda side=side: side, "127.0.0.1", port)  # type: ignore[misc]
    started = time.monotonic()
    for side in sides:
        assert side.transport is not None
        side.transport.write(request)
    await asyncio.sleep(seconds)
    rate = sum(side.trips for side in sides) / (time.monotonic() - started)
    for side in sides:
        assert side.transport is not None
        side.transport.abort()
    return rate


def measure(connections: int, seconds: float = SECONDS) -> float:
    """Return round trips a second over this many connections.

    Raises BenchError when the answering side does not start.
    """
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "overcommit.bench.pingpong", str(ANSWER_BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        if not line:
            raise BenchError("the answering side of the loop-back measurement did not start")
        return uvloop.run(_ask(int(line), connections, seconds))
    finally:
        child.stdin.close()
        child.stdout.close()
        try:
            child.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


if __name__ == "__main__":
    uvloop.run(_answer(int(sys.argv[1])))
