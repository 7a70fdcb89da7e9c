"""A tiny V2 server that gives the right answers of known models, and faults when it is told to.

It knows only what HTTP and V2 say, so that the load generator is not tested against itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import numpy as np

from overcommit.bench.references import References

OUTPUT = "last_hidden_state"


@dataclass
class Asked:
    """One request as it came in."""

    number: int  # of all requests so far, from 1
    model: str
    id: str
    binary: bool
    input: int


@dataclass
class V2Server:
    """`fault(asked)` names what to do wrong, or None."""

    references: References
    fault: Callable[[Asked], str | None] = lambda asked: None
    port: int = 0
    asked: list[Asked] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[V2Server]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer(reader, writer):
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = head.split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        body = await reader.readexactly(int(headers["content-length"]))
        asked = self._read(lines[0], headers, body)
        self.asked.append(asked)
        fault = self.fault(asked)
        if fault == "hang up":
            writer.transport.abort()
            return False
        if fault == "silence":
            return True
        if fault is not None and fault.isdigit():
            writer.write(response(int(fault), b'{"error": "asked for"}'))
            return True
        answer = self._right(asked, fault)
        writer.write(answer * 2 if fault == "twice" else answer)
        return fault != "close"

    def _read(self, line: str, headers: dict[str, str], body: bytes) -> Asked:
        model = line.split()[1].split("/")[3]
        length = headers.get("inference-header-content-length")
        content = json.loads(body[: int(length)] if length else body)
        ids, at = {}, int(length or 0)
        for tensor in content["inputs"]:
            if length:
                size = tensor["parameters"]["binary_data_size"]
                ids[tensor["name"]] = np.frombuffer(body[at : at + size], "<i8")
                at += size
            else:
                ids[tensor["name"]] = np.array(tensor["data"])
        for number, inputs in enumerate(self.references.inputs):
            if all(np.array_equal(inputs[name].ravel(), ids[name]) for name in inputs):
                return Asked(len(self.asked) + 1, model, content["id"], bool(length), number)
        raise AssertionError("these are no inputs of the references")

    def _right(self, asked: Asked, fault: str | None) -> bytes:
        names = self.references.names
        variant = names.index(asked.model)
        if fault == "wrong variant":
            variant = (variant + 1) % len(names)
        array = self.references.outputs[asked.input][variant]
        if fault == "nan":
            array = np.full_like(array, np.nan)
        output = {"name": OUTPUT, "datatype": "FP32", "shape": list(array.shape)}
        content = {"model_name": asked.model, "id": asked.id, "outputs": [output]}
        if fault == "wrong id":
            content["id"] = "0" * 16
        if not asked.binary:
            output["data"] = array.ravel().tolist()
            return response(200, json.dumps(content).encode(), fault == "close")
        output["parameters"] = {"binary_data_size": array.nbytes}
        text = json.dumps(content).encode()
        extra = f"Inference-Header-Content-Length: {len(text)}\r\n"
        return response(200, text + array.tobytes(), fault == "close", extra)


def response(status: int, body: bytes, close: bool = False, extra: str = "") -> bytes:
    """Return the bytes of an HTTP answer."""
    end = "Connection: close\r\n" if close else ""
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{end}{extra}\r\n"
    return head.encode() + body
