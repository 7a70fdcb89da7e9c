"""V2 inference requests and answers as bytes, in JSON and with the binary tensor extension.

Written apart from the server's codec on purpose: a harness that shares the server's code would
share its mistakes.

Pure; `decode` raises ValueError for an answer that is not V2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

ID_CHARS: Final = 16
INFER_PATH: Final = "/v2/models/{model}/infer"
JSON_LENGTH_HEADER: Final = b"inference-header-content-length"
JSON_TYPE: Final = "application/json"
BINARY_TYPE: Final = "application/octet-stream"
_ID_MARK: Final = "#" * ID_CHARS

_DTYPES: Final = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "INT32": "<i4", "INT64": "<i8"}
_DATATYPES: Final = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


@dataclass(slots=True, frozen=True)
class Template:
    """A whole HTTP request with a hole for its id; every id has the same length."""

    before: bytes
    after: bytes

    def render(self, request_id: bytes) -> bytes:
        """Return the request's bytes."""
        return self.before + request_id + self.after


class _Output(msgspec.Struct):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class _Answer(msgspec.Struct):
    outputs: list[_Output]
    model_name: str = ""
    id: str = ""


@dataclass(slots=True, frozen=True)
class Answer:
    """What an inference returned."""

    id: str
    model: str
    outputs: dict[str, NDArray[Any]]


_decoder = msgspec.json.Decoder(_Answer)


def infer_template(
    model: str,
    inputs: Mapping[str, NDArray[Any]],
    output: str,
    *,
    binary: bool,
    path: str = INFER_PATH,
) -> Template:
    """Prepare an inference request that asks for one output."""
    whole = infer_request(path.format(model=model), inputs, output, binary=binary, id_=_ID_MARK)
    before, _, after = whole.partition(_ID_MARK.encode())
    return Template(before, after)


def infer_request(
    path: str,
    inputs: Mapping[str, NDArray[Any]],
    output: str,
    *,
    binary: bool,
    id_: str = "",
    timeout_us: int = 0,
) -> bytes:
    """Return an inference request that asks for one output; without an id, always the same."""
    tensors: list[dict[str, Any]] = []
    raw: list[bytes] = []
    for name, array in inputs.items():
        tensor: dict[str, Any] = {
            "name": name,
            "shape": list(array.shape),
            "datatype": _DATATYPES[array.dtype],
        }
        if binary:
            raw.append(array.tobytes())
            tensor["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            tensor["data"] = array.ravel().tolist()
        tensors.append(tensor)
    content: dict[str, Any] = {"id": id_} if id_ else {}
    content |= {"inputs": tensors, "outputs": [{"name": output}]}
    parameters: dict[str, Any] = {"timeout": timeout_us} if timeout_us else {}
    if binary:
        parameters["binary_data_output"] = True
    if parameters:
        content["parameters"] = parameters
    text = json.dumps(content, separators=(",", ":")).encode()
    body = text + b"".join(raw)
    if not binary:
        return http_post(path, body, JSON_TYPE)
    return http_post(path, body, BINARY_TYPE, {JSON_LENGTH_HEADER.decode().title(): str(len(text))})


def http_post(path: str, body: bytes, content_type: str, headers: Mapping[str, str] = {}) -> bytes:
    """Return a whole request."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        f"Content-Length: {len(body)}",
        f"Content-Type: {content_type}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def decode(headers: Mapping[bytes, bytes], body: bytes) -> Answer:
    """Read an answer; header names are in lower case."""
    json_bytes = int(headers.get(JSON_LENGTH_HEADER, len(body)))
    view = memoryview(body)
    answer = _decoder.decode(view[:json_bytes])
    at = json_bytes
    outputs: dict[str, NDArray[Any]] = {}
    for output in answer.outputs:
        dtype = _DTYPES[output.datatype]
        size = output.parameters.get("binary_data_size")
        if size is not None:
            array = np.frombuffer(view[at : at + size], dtype)
            at += size
        else:
            array = np.asarray(output.data, dtype).ravel()
        outputs[output.name] = array.reshape(output.shape)
    if at != len(body):
        raise ValueError(f"{len(body) - at} bytes of the answer belong to no output")
    return Answer(answer.id, answer.model_name, outputs)
