"""What a client sends and what comes back, without a socket.

Invariants
 1. A refusal becomes the error class that the server raised, with its words and its time to wait.
 2. An answer that is not what the protocol says is a ServerError, never an IndexError.

Pure.  Called by both clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from urllib.parse import quote

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from overcommit.runtime import errors
from overcommit.runtime.errors import BadRequest, OvercommitError
from overcommit.server.clients import tensors
from overcommit.server.clients.tensors import Array

T = TypeVar("T")

RETRIES: Final = 2  # of a request that was refused with a time to come back after
SHARED_TYPE: Final = "application/vnd.overcommit.shared+json"
_SHARED_BYTES: Final = "shared_memory_byte_size"
_JSON_LENGTH: Final = "inference-header-content-length"


class ServerError(OvercommitError):
    """The server answered with an error that has no class of its own, or with nonsense."""

    code = "server_error"


class ConnectionWasClosed(errors.Unavailable):
    """An idle connection turned out to be closed, and the request may not be repeated as it is."""


_BY_STATUS: Final[Mapping[int, type[OvercommitError]]] = {
    400: BadRequest,
    403: errors.Forbidden,
    404: errors.NotFound,
    408: errors.RequestTimeout,
    413: errors.PayloadTooLarge,
    502: errors.WorkerLost,
    503: errors.Unavailable,
    504: errors.DeadlineExceeded,
}


class TensorInfo(msgspec.Struct, frozen=True):
    """An input or output of a model; -1 in a shape is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelInfo(msgspec.Struct, frozen=True):
    """A model as the server describes it."""

    name: str
    versions: tuple[str, ...] = ()
    platform: str = ""
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()


class ModelState(msgspec.Struct, frozen=True):
    """A version in the repository's index; `state` is READY, LOADING or UNAVAILABLE."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


@dataclass(slots=True, frozen=True)
class Result(Mapping[str, Array]):
    """The outputs of an inference, by name, and who gave them."""

    model: str
    version: str
    id: str | None
    outputs: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        return self.outputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)


@dataclass(slots=True)
class Sent:
    """A request, ready for a socket."""

    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    may_repeat: bool = True  # over another connection, when an idle one turns out to be closed


@dataclass(slots=True)
class Received:
    """An answer, read to its end; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def model_path(model: str, version: str | None, what: str = "") -> str:
    """The path of a model or version."""
    path = f"/v2/models/{quote(model, safe='')}"
    if version is not None:
        path += f"/versions/{quote(version, safe='')}"
    return path + what


# --- inference ----------------------------------------------------------------------------------
@dataclass(slots=True, frozen=True)
class Inference:
    """An inference, checked and converted, whose tensors can be sent in the body or beside it."""

    path: str
    request: Mapping[str, Any]  # the JSON
    tensors: Sequence[bytes | memoryview]  # in the order of its inputs
    nbytes: int  # of all tensors
    is_once: bool = (
        False  # a model with state must not get it twice, so it is not tried in two ways
    )

    def in_body(self) -> Sent:
        """Give it as a request with binary tensors behind the JSON."""
        text = msgspec.json.encode(self.request)
        headers = {"content-type": "application/octet-stream", _JSON_LENGTH: str(len(text))}
        body = b"".join((text, *self.tensors))
        return Sent("POST", self.path, body, headers, may_repeat=not self.is_once)

    def in_region(self, region: str, nbytes: int) -> Sent:
        """Give it as a request whose tensors lie at the start of a region of so many bytes."""
        where = {
            "shared_memory_region": region,
            "shared_memory_byte_size": self.nbytes,
            "shared_memory_answer_byte_size": nbytes,
        }
        request = {**self.request, "parameters": {**self.request["parameters"], **where}}
        headers = {"content-type": SHARED_TYPE}
        return Sent("POST", self.path, msgspec.json.encode(request), headers, may_repeat=False)


def inference(
    model: str,
    version: str | None,
    inputs: Mapping[str, ArrayLike],
    outputs: Sequence[str] | None,
    info: ModelInfo | None,
    timeout_s: float | None,
    id: str | None,
    sequence: Mapping[str, int | str | bool] | None = None,
) -> Inference:
    """Make an inference request.  Raises ValueError that names the input."""
    if not inputs:
        raise ValueError(f"model '{model}': no inputs are given")
    datatypes = {} if info is None else {each.name: each.datatype for each in info.inputs}
    described: list[dict[str, Any]] = []
    blobs: list[bytes | memoryview] = []
    for name, value in inputs.items():
        datatype = datatypes.get(name) or tensors.datatype_of(name, value)
        shape, data = tensors.to_wire(name, value, datatype)
        described.append(
            {
                "name": name,
                "datatype": datatype,
                "shape": shape,
                "parameters": {"binary_data_size": len(data)},
            }
        )
        blobs.append(data)
    request: dict[str, Any] = {"inputs": described}
    parameters: dict[str, Any] = {"binary_data_output": True}
    if timeout_s is not None:
        parameters["timeout"] = max(1, int(timeout_s * 1e6))
    request["parameters"] = parameters if sequence is None else parameters | dict(sequence)
    if outputs is not None:
        request["outputs"] = [{"name": name} for name in outputs]
    if id is not None:
        request["id"] = id
    path, nbytes = model_path(model, version, "/infer"), sum(map(len, blobs))
    return Inference(path, request, blobs, nbytes, sequence is not None)


def sequence_of(
    id: int | str | None, *, start: bool, end: bool
) -> dict[str, int | str | bool] | None:
    """Say of a request which sequence it is of; None: of none."""
    if id is None:
        return None
    return {"sequence_id": id, "sequence_start": start, "sequence_end": end}


class _Output(msgspec.Struct):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class _Answer(msgspec.Struct):
    model_name: str
    outputs: list[_Output]
    model_version: str = ""
    id: str | None = None
    parameters: dict[str, Any] | None = None


_ANSWER: Final = msgspec.json.Decoder(_Answer)


def infer_result(received: Received, region: memoryview | None = None) -> Result:
    """Read the answer; its tensors may lie in the region that the request has named.

    Raises what the server refused it with, ServerError for nonsense.
    """
    check(received)
    body = memoryview(received.body)
    try:
        length = int(received.headers.get(_JSON_LENGTH, len(body)))
        answer = _ANSWER.decode(body[:length])
        at = length
        if region is not None and (size := (answer.parameters or {}).get(_SHARED_BYTES)):
            body, at = region[:size], 0
        outputs: dict[str, Array] = {}
        for output in answer.outputs:
            size = (output.parameters or {}).get("binary_data_size")
            if size is None:
                values = output.data or []
                outputs[output.name] = tensors.from_json(output.datatype, output.shape, values)
                continue
            if at + size > len(body):
                raise ValueError(f"output '{output.name}' is cut off")
            data = body[at : at + size]
            outputs[output.name] = tensors.from_wire(output.datatype, output.shape, data)
            at += size
    except (ValueError, KeyError, TypeError, msgspec.MsgspecError, OvercommitError) as error:
        raise ServerError(f"the answer is not a V2 inference response: {error}") from error
    return Result(answer.model_name, answer.model_version, answer.id, outputs)


def repository_request(name: str, what: str) -> Sent:
    """Ask for a model to be loaded or unloaded."""
    return _post(f"/v2/repository/models/{quote(name, safe='')}/{what}")


def region_request(region: str, what: str, key: str = "", nbytes: int = 0) -> Sent:
    """Ask for a leased region to be registered or unregistered."""
    sent = _post(f"/v2/systemsharedmemory/region/{region}/{what}")
    if key:
        sent.body = msgspec.json.encode(
            {"key": key, "offset": 0, "byte_size": nbytes, "leased": True}
        )
    return sent


class _Proof(msgspec.Struct):
    proof: str = ""


class _Server(msgspec.Struct):
    extensions: tuple[str, ...] = ()


def region_proof(received: Received) -> str:
    """What the server says of the region's first bytes; "" when it has not registered it."""
    return _said(received, _Proof, _Proof()).proof


def takes_regions(received: Received) -> bool:
    """Whether this server says that its clients may use shared memory."""
    return "system_shared_memory(leased)" in _said(received, _Server, _Server()).extensions


def _said(received: Received, kind: type[T], default: T) -> T:
    if received.status != 200:
        return default
    try:
        return msgspec.json.decode(received.body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return default


def index_request() -> Sent:
    """Ask for the repository's index."""
    return _post("/v2/repository/index")


def _post(path: str) -> Sent:
    return Sent("POST", path, b"{}", {"content-type": "application/json"})


# --- everything else ------------------------------------------------------------------------------
def embeddings_request(
    model: str, texts: Sequence[str], dimensions: int | None, truncate: bool
) -> Sent:
    """Ask for the vectors of texts."""
    asked: dict[str, Any] = {"model": model, "input": list(texts), "encoding_format": "base64"}
    if dimensions is not None:
        asked["dimensions"] = dimensions
    if truncate:
        asked["truncate"] = True
    headers = {"content-type": "application/json"}
    return Sent("POST", "/v1/embeddings", msgspec.json.encode(asked), headers)


class _Vector(msgspec.Struct):
    index: int
    embedding: bytes  # base64 in JSON


class _Vectors(msgspec.Struct):
    data: list[_Vector]


def embeddings_result(received: Received) -> Array:
    """FP32 `[texts, width]`."""
    vectors = decode(received, _Vectors)
    try:
        rows = [np.frombuffer(each.embedding, "<f4") for each in vectors.data]
        return np.stack(rows)
    except ValueError as error:
        raise ServerError(f"the answer holds no embeddings: {error}") from error


def decode(received: Received, kind: type[Any]) -> Any:
    """Check an answer and decode its JSON.  Raises as `check`, and ServerError."""
    check(received)
    try:
        return msgspec.json.decode(received.body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ServerError(f"the answer is not what the protocol says: {error}") from error


def check(received: Received) -> None:
    """Raise what the server refused the request with, if it did."""
    if received.status == 200:
        return
    try:
        said = msgspec.json.decode(received.body)["error"]
        message = said["message"] if isinstance(said, dict) else str(said)
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError):
        text = received.body[:500].decode(errors="replace")
        message = f"the server says {received.status}: {text}"
    kind = _BY_STATUS.get(received.status, ServerError)
    raise kind(message, retry_after_s=_retry_after_s(received.headers))


def is_servers_own(received: Received) -> bool:
    """Whether the server itself has answered; a gateway's error says nothing of what it does."""
    return received.status in (200, 400, 403, 404, 413) or "retry-after-ms" in received.headers


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "")
        if value.isdecimal():
            return int(value) * unit_s
    return None


def pause_s(sent: Sent, received: Received, tries: int, left_s: float) -> float | None:
    """How long to wait before this request is sent again; None: this is its answer.

    Only who is told when to come back does, because the server keeps a place until then.  What may not
    be repeated is, where the server itself has refused it and no gateway before it.
    """
    if not (sent.may_repeat or is_servers_own(received)):
        return None
    wait_s = _retry_after_s(received.headers)
    if received.status != 503 or wait_s is None or tries >= RETRIES or wait_s >= left_s:
        return None
    return wait_s
