"""How a server wants one FP32 tensor, and how it gives one back.

`V2` is the Open Inference Protocol, as ours, Triton and KServe speak it.  `PlainJson` and `RawBytes`
are for servers whose users write the handler: JSON with a key of their choice, or the tensor's bytes
and nothing else.

Pure.  Called by the workloads that are sent to more than one server, and by `canned`, which answers
as such a server would.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from overcommit.bench import grpc_wire, wire

Array = NDArray[np.float32]
JSON_CHARS_PER_VALUE = 24  # at most; some servers write floats as doubles


class V2(msgspec.Struct, frozen=True, kw_only=True, tag="v2"):
    """The Open Inference Protocol; `binary` is its tensor extension, both ways."""

    input: str = "x"
    output: str = "y"
    binary: bool = False
    path: str = wire.INFER_PATH
    timeout_us: int = 0  # in each request's parameters; 0: none

    def request(self, model: str, array: Array) -> bytes:
        """Return a whole HTTP request."""
        path = self.path.format(model=model)
        return wire.infer_request(
            *(path, {self.input: array}, self.output),
            binary=self.binary,
            timeout_us=self.timeout_us,
        )

    def read(self, model: str, headers: Mapping[bytes, bytes], body: bytes) -> Array:
        """Read an answer; ValueError, KeyError or MsgspecError for one that is none."""
        answer = wire.decode(headers, body)
        if answer.model and answer.model != model:
            raise ValueError(f"the answer says that it is of {answer.model}")
        output: Array = answer.outputs[self.output]
        if output.dtype != np.float32:
            raise ValueError(f"the output is {output.dtype}")
        return output

    def answer(self, model: str, array: Array) -> bytes:
        """Return a whole HTTP answer, as a server would."""
        output: dict[str, Any] = {"name": self.output, "datatype": "FP32", "shape": array.shape}
        tail, extra = b"", ""
        if self.binary:
            tail = array.tobytes()
            output["parameters"] = {"binary_data_size": len(tail)}
        else:
            output["data"] = array.ravel().tolist()
        content = {"model_name": model, "model_version": "1", "outputs": [output]}
        text = json.dumps(content, separators=(",", ":")).encode()
        if self.binary:
            extra = f"inference-header-content-length: {len(text)}\r\n"
        return _answer(text + tail, wire.BINARY_TYPE if self.binary else wire.JSON_TYPE, extra)


class PlainJson(msgspec.Struct, frozen=True, kw_only=True, tag="plain_json"):
    """`{request_key: [...]}` to a path, `{response_key: [...]}` back.

    The model is named in the path or in a header, where one is given.
    """

    path: str = "/inference"  # may hold {model}
    request_key: str = "x"
    response_key: str = "y"  # empty: the answer is the list itself
    is_nested: bool = False  # a list a row; otherwise all values in one
    model_header: str = ""

    def request(self, model: str, array: Array) -> bytes:
        """Return a whole HTTP request."""
        values = (array if self.is_nested else array.ravel()).tolist()
        body = json.dumps({self.request_key: values}, separators=(",", ":")).encode()
        headers = {self.model_header: model} if self.model_header else {}
        return wire.http_post(self.path.format(model=model), body, wire.JSON_TYPE, headers)

    def read(self, model: str, headers: Mapping[bytes, bytes], body: bytes) -> Array:
        """Read an answer, flat or nested; ValueError, KeyError or MsgspecError if it is none."""
        content = msgspec.json.decode(body)
        if self.response_key:
            if not isinstance(content, dict):
                raise ValueError("the answer is no JSON object")
            content = content[self.response_key]
        return np.asarray(content, np.float32)

    def answer(self, model: str, array: Array) -> bytes:
        """Return a whole HTTP answer, as a server would."""
        values = (array if self.is_nested else array.ravel()).tolist()
        content = {self.response_key: values} if self.response_key else values
        return _answer(json.dumps(content).encode(), wire.JSON_TYPE)


class RawBytes(msgspec.Struct, frozen=True, kw_only=True, tag="raw_bytes"):
    """The tensor's bytes, little-endian and row-major, both ways."""

    path: str = "/inference"  # may hold {model}

    def request(self, model: str, array: Array) -> bytes:
        """Return a whole HTTP request."""
        return wire.http_post(self.path.format(model=model), array.tobytes(), wire.BINARY_TYPE)

    def read(self, model: str, headers: Mapping[bytes, bytes], body: bytes) -> Array:
        """Read an answer; ValueError when it is no whole number of values."""
        return np.frombuffer(body, np.float32)

    def answer(self, model: str, array: Array) -> bytes:
        """Return a whole HTTP answer, as a server would."""
        return _answer(array.tobytes(), wire.BINARY_TYPE)


class Grpc(msgspec.Struct, frozen=True, kw_only=True, tag="grpc"):
    """ModelInfer of the Open Inference Protocol over gRPC, the tensor raw, both ways."""

    input: str = "x"
    output: str = "y"

    def request(self, model: str, array: Array) -> bytes:
        """Return a message; the connection puts it into a call."""
        return grpc_wire.request(model, self.input, self.output, array)

    def read(self, model: str, headers: Mapping[bytes, bytes], body: bytes) -> Array:
        """Read an answer; ValueError for one that is none."""
        name, values = grpc_wire.decode(body, self.output)
        if name and name != model:
            raise ValueError(f"the answer says that it is of {name}")
        return values

    def answer(self, model: str, array: Array) -> bytes:
        """Return a message, as a server would."""
        return grpc_wire.answer(model, self.output, array)


Dialect = V2 | PlainJson | RawBytes | Grpc


def is_text(dialect: Dialect) -> bool:
    """Whether values travel as decimal text."""
    return isinstance(dialect, PlainJson) or (isinstance(dialect, V2) and not dialect.binary)


def _answer(body: bytes, content_type: str, extra: str = "") -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\n{extra}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
