"""What TCP to the same machine can do: the limit of every server that is asked over HTTP.

 * round trips: a few bytes there and back on 1 to n connections, uvloop on both sides, in two
   processes, and nothing done with the bytes.
 * bandwidth: large payloads there and back.  Between receiving and sending, the far side copies the
   payload twice: into shared memory and out of it, which a server whose workers are processes of
   their own cannot avoid.  Counted is the payload, once.

Run as `python -m overcommit.bench.loopback NBYTES`, it is the far side; prints its port, and ends
with its standard input.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, cast

import uvloop

from overcommit.bench.errors import BenchError
from overcommit.bench.report import Figure
from overcommit.runtime.config import MIB

MESSAGE_BYTES: Final = 64
PAYLOAD_BYTES: Final = 16 * MIB
COPIED_BYTES: Final = 1 * MIB  # payloads from here on are copied twice on the far side
COPIES: Final = 6  # into and out of the kernel, twice, and the two of the far side
CONNECTIONS: Final = (1, 4, 16)
SECONDS: Final = 1.0


@dataclass(slots=True, frozen=True)
class Loopback:
    """Round trips a second by connections, and bytes a second one way of a payload's way and back."""

    round_trips: dict[int, float]
    bandwidth: float


class _Gatherer(asyncio.BufferedProtocol):
    """Receives messages of one size in place."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = bytearray(nbytes)
        self._view = memoryview(self.buffer)
        self._filled = 0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled == len(self.buffer):
            self._filled = 0
            self.on_message()

    def on_message(self) -> None:
        raise NotImplementedError


class _Far(_Gatherer):
    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        copies = nbytes >= COPIED_BYTES
        self._shared = [bytearray(nbytes) for _ in range(2)] if copies else []

    def on_message(self) -> None:
        assert self.transport is not None
        content = self.buffer
        for memory in self._shared:
            memory[:] = content
            content = memory
        # The near side sends nothing before it has all of this: no copy is needed.
        self.transport.write(content)


class _Near(_Gatherer):
    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.count = 0
        self._payload = bytes(nbytes)

    def start(self) -> None:
        assert self.transport is not None
        self.transport.write(self._payload)

    def on_message(self) -> None:
        self.count += 1
        self.start()


@contextmanager
def _far_side(nbytes: int) -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "overcommit.bench.loopback", str(nbytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise BenchError("the far side of the loop-back did not start; see above")
            yield int(line)
        finally:
            process.kill()


async def _count(port: int, nbytes: int, connections: int, seconds: float) -> float:
    loop = asyncio.get_running_loop()
    ends: list[_Near] = []
    for _ in range(connections):
        _, end = await loop.create_connection(lambda: _Near(nbytes), "127.0.0.1", port)
        ends.append(end)
    for end in ends:
        end.start()
    await asyncio.sleep(seconds / 4)  # buffers grow, pages are touched
    before, start_ns = sum(end.count for end in ends), time.perf_counter_ns()
    await asyncio.sleep(seconds)
    count, elapsed_ns = sum(end.count for end in ends) - before, time.perf_counter_ns() - start_ns
    for end in ends:
        assert end.transport is not None
        end.transport.abort()
    return count * 1e9 / elapsed_ns


def measure_round_trips(
    connections: Sequence[int] = CONNECTIONS, seconds: float = SECONDS
) -> dict[int, float]:
    """Return round trips a second for each number of connections."""
    with _far_side(MESSAGE_BYTES) as port:
        return {n: uvloop.run(_count(port, MESSAGE_BYTES, n, seconds)) for n in connections}


def measure_bandwidth(
    nbytes: int = PAYLOAD_BYTES, connections: int = 2, seconds: float = SECONDS
) -> float:
    """Return bytes a second of payloads of this size, each of which goes there and back."""
    with _far_side(nbytes) as port:
        return nbytes * uvloop.run(_count(port, nbytes, connections, seconds))


def measure(seconds: float = SECONDS) -> Loopback:
    """Measure both; takes a few seconds, and nothing else should run."""
    return Loopback(measure_round_trips(seconds=seconds), measure_bandwidth(seconds=seconds))


def figures(loopback: Loopback, copy: float) -> list[Figure]:
    """Say it; `copy` is the memory copy limit, of which each payload needs six on its way."""
    return [
        *(
            Figure(f"loop-back round trips, {count} connections", rate, "1/s")
            for count, rate in loopback.round_trips.items()
        ),
        Figure(
            f"loop-back, {PAYLOAD_BYTES >> 20} MiB there and back",
            loopback.bandwidth / 1e9,
            "GB/s",
            limit=copy / COPIES / 1e9,
            note=f"limit: {COPIES} memory copies",
        ),
    ]


async def _serve(nbytes: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Far(nbytes), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.buffer.read)


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
