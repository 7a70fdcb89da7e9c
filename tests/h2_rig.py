"""A gRPC client of frames, on a front end without a server: bytes in, frames out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from front_end_rig import Rig, Transport

from overcommit.bench import grpc_wire
from overcommit.server import h2, hpack
from overcommit.server.grpc_server import GrpcServer
from overcommit.server.h2_connection import Connection
from overcommit.server.limits import H2_FRAME_BYTES_MAX
from overcommit.server.proto import messages

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


@dataclass
class Frame:
    """One frame of the server."""

    kind: int
    flags: int
    stream: int
    payload: bytes


class H2Client:
    """One connection; `rig` has the dispatch behind it."""

    def __init__(self, rig: Rig, *, greet: bool = True, settings: dict[int, int] | None = None):
        self.rig = rig
        self.server = GrpcServer(rig)  # type: ignore[arg-type]
        self.transport = Transport()
        self.connection = Connection(rig, self.server, self.server.connections)  # type: ignore[arg-type]
        self.connection.connection_made(self.transport)
        self._decoder = hpack.Decoder()
        self._read = 0
        self._next = 1
        self.frames: list[Frame] = []
        if greet:
            self.send(h2.PREFACE + h2.settings(settings or {}))
            self.read()

    def send(self, data: bytes) -> None:
        """Bytes arrive."""
        if not self.transport.is_closed:
            self.connection.data_received(data)

    def lose(self) -> None:
        """The client is gone."""
        self.connection.connection_lost(None)

    def read(self) -> list[Frame]:
        """Return the frames that were written since the last time."""
        data = bytes(self.transport.written[self._read :])
        self._read += len(data)
        new: list[Frame] = []
        at = 0
        while at < len(data):
            length, kind, flags, stream = grpc_wire.read_head(data, at)
            at += h2.HEAD_BYTES + length
            assert at <= len(data)
            new.append(Frame(kind, flags, stream, data[at - length : at]))
        self.frames += new
        return new

    async def settle(self) -> list[Frame]:
        """Let what was put off happen, and return the frames that came of it."""
        for _ in range(5):
            await asyncio.sleep(0)
        return self.read()

    # --- calls ----------------------------------------------------------------------------------
    def headers(self, path: str = INFER, **more: str) -> bytes:
        """A header block of literals."""
        pairs = [(":method", "POST"), (":scheme", "http"), (":path", path), ("te", "trailers")]
        pairs += [("content-type", "application/grpc"), *more.items()]
        names = {name: name.replace("_", "-") for name in more if name.startswith("grpc_")}
        return hpack.encode([(names.get(n, n).encode(), v.encode()) for n, v in pairs])

    def open(self, path: str = INFER, **more: str) -> int:
        """Begin a call; return its stream."""
        number, self._next = self._next, self._next + 2
        self.send(h2.frame(h2.HEADERS, h2.END_HEADERS, number, self.headers(path, **more)))
        return number

    def data(self, number: int, data: bytes, *, end: bool = False) -> None:
        """Send data of a call."""
        step = H2_FRAME_BYTES_MAX
        for at in range(0, max(len(data), 1), step):
            flags = h2.END_STREAM if end and at + step >= len(data) else 0
            self.send(frame(h2.DATA, flags, number, data[at : at + step]))

    def call(self, message: bytes, path: str = INFER, **more: str) -> int:
        """Send a whole call."""
        number = self.open(path, **more)
        self.data(number, framed(message), end=True)
        return number

    def answer(self, number: int) -> tuple[dict[str, str], list[bytes], dict[str, str]]:
        """Return headers, messages and trailers of a call that has ended."""
        blocks: list[dict[str, str]] = []
        pieces: list[bytes] = []
        for each in self.frames:
            if each.stream != number:
                continue
            if each.kind == h2.HEADERS:
                pairs = hpack.Decoder().decode(each.payload)
                blocks.append({name.decode(): value.decode() for name, value in pairs})
            elif each.kind == h2.DATA:
                pieces.append(each.payload)
        data, at = b"".join(pieces), 0
        found: list[bytes] = []
        while at < len(data):
            end = at + 5 + int.from_bytes(data[at + 1 : at + 5], "big")
            found.append(data[at + 5 : end])
            at = end
        return blocks[0], found, blocks[-1]

    def status(self, number: int) -> int:
        """Return the status of a call that has ended."""
        return int(self.answer(number)[2]["grpc-status"])


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of any length."""
    return grpc_wire.frame(kind, flags, stream, payload)


def framed(message: bytes, *, compressed: bool = False) -> bytes:
    """A message behind its prefix."""
    return bytes((compressed,)) + len(message).to_bytes(4, "big") + message


def request(*rows: list[float], name: str = "x", **more: Any) -> bytes:
    """A ModelInferRequest for the rig's model y = 2x."""
    import numpy as np

    array = np.array(rows, np.float32)
    message = messages.ModelInferRequest(model_name="m", **more)
    message.inputs.add(name=name, datatype="FP32", shape=array.shape)
    message.raw_input_contents.append(array.tobytes())
    return message.SerializeToString()


def values(message: bytes) -> list[float]:
    """The numbers of a ModelInferResponse."""
    import numpy as np

    (raw,) = messages.ModelInferResponse.FromString(message).raw_output_contents
    return np.frombuffer(raw, np.float32).tolist()  # type: ignore[no-any-return]


def in_loop(test: Callable[[], Any]) -> None:
    """Run an async test."""
    asyncio.run(test())
