"""A front end without a server: real protocol, dispatch and rings; the worker's part is played here.

Connections are fed bytes and keep what was written to them.  `Peer.answer_all` does what a worker
whose model is y = 2x would do, in the order of the submissions or in any other.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import uvicorn
from uvicorn.server import ServerState

from overcommit.runtime import _shm, payload
from overcommit.runtime.config import Settings, TensorSpec
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.memory import create_memfd
from overcommit.runtime.messages import LinkUp
from overcommit.server.app import make_app
from overcommit.server.dispatch import Dispatch
from overcommit.server.heads import Heads
from overcommit.server.inference import Prepared
from overcommit.server.plans import Plans
from overcommit.server.protocol import HotProtocol, protocol_class

ARENA_BYTES = 4 << 20
SLOTS = 64


def _spec(name: str) -> TensorSpec:
    return TensorSpec(name=name, datatype="FP32", shape=(-1, -1), axes=("batch", "width"))


ROUTE = Route(
    slot=3,
    name="m",
    version="1",
    state="ready",
    inputs=(_spec("x"),),
    outputs=(_spec("y"),),
    max_batch_size=64,
)


HEAD = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\n"


def body(*values: float, id: str | None = None) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, len(values)], "data": values}
    return json.dumps({"inputs": [tensor], **({} if id is None else {"id": id})}).encode()


def request(content: bytes, *headers: bytes) -> bytes:
    lines = b"".join(line + b"\r\n" for line in headers)
    return HEAD + lines + b"Content-Length: %d\r\n\r\n" % len(content) + content


def answers(written: bytes) -> list[tuple[int, Any]]:
    """Cut what was written into (status, body)."""
    found: list[tuple[int, Any]] = []
    while written:
        head, _, rest = written.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        fields = dict(line.split(b": ") for line in lines[1:])
        length = int(fields[b"content-length"])
        content, written = rest[:length], rest[length:]
        size = fields.get(b"inference-header-content-length")
        found.append(
            (
                int(lines[0].split()[1]),
                json.loads(content) if size is None else content[int(size) :],
            )
        )
    return found


def numbers(answer: tuple[int, Any]) -> list[float]:
    assert answer[0] == 200, answer
    data: list[float] = answer[1]["outputs"][0]["data"]
    return data


class Peer:
    """A worker incarnation's side of the rings."""

    def __init__(self, rig: Rig, seat: int, epoch: int, slots: int = SLOTS) -> None:
        half = _shm.ring_bytes(slots)
        fd = create_memfd("link", 2 * half)
        memory = mmap.mmap(fd, 2 * half)
        _shm.create_ring(memory, 0, slots, 1, rig.epoch, epoch)
        _shm.create_ring(memory, half, slots, 2, epoch, rig.epoch)
        page = create_memfd("page", _shm.STATUS_BYTES)
        self.status = _shm.StatusPage(mmap.mmap(page, _shm.STATUS_BYTES), 0, True)
        self.submissions = _shm.SubmissionRing(memory, 0, False, rig.epoch, epoch)
        self.completions = _shm.CompletionRing(memory, half, True, epoch, rig.epoch)
        self.seat, self.epoch, self._rig = seat, epoch, rig
        self.taken: list[Any] = []
        message = LinkUp(
            seat=seat, epoch=epoch, slot_count=slots, completion_offset=half, payload_bytes=0
        )
        bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        rig.dispatch.link_up(message, {"link": fd, "page": page, "peer_doorbell": bell})

    def take(self) -> list[Any]:
        """Take the submissions that are there: inferences; cancels are dropped."""
        taken = [each for each in self.submissions.pop(SLOTS) if each[7] == _shm.SUBMIT]
        self.taken += taken
        return taken

    def answer(self, submission: Any, status: int = _shm.OK, *, length: int | None = None) -> None:
        """Answer one submission with y = 2x."""
        request_id, _, _, in_offset, out_offset, in_length, *_ = submission
        block = self._rig.ingress[in_offset : in_offset + in_length]
        place, *_ = payload.decode(block)  # of a sequence's request, its ask follows
        x = np.frombuffer(block[place.offset : place.offset + place.nbytes], np.float32)
        places, total = payload.plan([(0, "FP32", place.nbytes, place.shape)])
        out = self._rig.egress[out_offset : out_offset + total]
        payload.encode(out, places)
        out[places[0].offset : places[0].offset + place.nbytes] = (2 * x).tobytes()
        self.completions.push(
            *(request_id, 1, 2, 3, total if length is None else length, status, 1, 0)
        )

    def answer_all(self) -> int:
        """Answer everything that is there; return how much that was."""
        taken = self.take()
        for submission in taken:
            self.answer(submission)
        self._rig.dispatch.drain()
        return len(taken)


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_closed = False
        self.is_paused = False
        self.protocol: Any = None

    def write(self, data: Any) -> None:
        self.written += data

    def writelines(self, list_of_data: Any) -> None:
        for data in list_of_data:
            self.written += data

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_protocol(self) -> Any:
        return self.protocol


class Client:
    """One connection."""

    def __init__(self, protocol: HotProtocol) -> None:
        self.transport = Transport()
        self.transport.protocol = protocol
        self.protocol = protocol
        protocol.connection_made(self.transport)

    def send(self, data: bytes) -> None:
        """Bytes arrive, as uvloop would hand them over."""
        view = memoryview(data)
        while len(view) and not self.transport.is_closed:
            protocol = self.transport.protocol
            if isinstance(protocol, asyncio.BufferedProtocol):
                buffer = protocol.get_buffer(-1)
                count = min(len(buffer), len(view))
                buffer[:count] = view[:count]  # type: ignore[index]
                protocol.buffer_updated(count)
            else:
                count = len(view)
                protocol.data_received(bytes(view))
            view = view[count:]

    @property
    def written(self) -> bytes:
        return bytes(self.transport.written)

    def lose(self) -> None:
        """The client is gone."""
        self.transport.is_closed = True
        self.transport.protocol.connection_lost(None)


class Rig:
    """What the protocol needs of a front end."""

    epoch = 1

    def __init__(self, route: Route = ROUTE, app: Any = None, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.route = route
        self.heads, self.plans = Heads(), Plans()
        self.is_draining = False
        self.bodies_bytes = 0
        self.clock_s = 1.0
        ingress, egress = (create_memfd(name, ARENA_BYTES) for name in ("ingress", "egress"))
        self.ingress = memoryview(mmap.mmap(ingress, ARENA_BYTES))
        self.egress = memoryview(mmap.mmap(egress, ARENA_BYTES))
        self.dispatch = Dispatch(
            0,
            self.epoch,
            mmap.mmap(ingress, ARENA_BYTES),
            mmap.mmap(egress, ARENA_BYTES, prot=mmap.PROT_READ),
            lambda wake: wake(),
        )
        os.close(ingress)
        os.close(egress)

        async def refuse(scope: Any, receive: Any, send: Any) -> None:
            raise AssertionError("nothing here is for ASGI")

        self._config = uvicorn.Config(
            app or refuse,
            http=protocol_class(self),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
        )
        self._config.load()
        self._state = ServerState()

    def find(self, name: str, version: str | None) -> Route:
        return self.route

    def timeout_ns(self, prepared: Prepared) -> int:
        return 60_000_000_000

    def connect(self) -> Client:
        make: Any = self._config.http_protocol_class
        return Client(make(config=self._config, server_state=self._state, app_state={}))

    def is_empty(self) -> bool:
        """Whether every block is back."""
        self.dispatch.check()
        return not self.dispatch.pending and not self.bodies_bytes


def in_loop(test: Callable[[], None]) -> None:
    """Run a test where a loop runs: uvicorn asks for it."""

    async def run() -> None:
        test()

    asyncio.run(run())


async def settled() -> None:
    """Let the app do all that it can with what it was sent."""
    for _ in range(20):
        await asyncio.sleep(0)


def with_app(test: Callable[[Rig], Awaitable[None]], **settings: Any) -> None:
    """Run a test with the app behind the connections."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await made(scope, receive, send)

    async def run() -> None:
        await test(rig)
        await settled()
        assert rig.is_empty()

    rig = Rig(app=app, **settings)
    made = make_app(rig)  # type: ignore[arg-type]
    asyncio.run(run())
