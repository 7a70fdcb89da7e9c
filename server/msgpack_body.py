"""Inference with MessagePack bodies: `Content-Type: application/msgpack` on the infer path.

The request is the V2 object with each tensor's numbers as one byte string, little-endian and
row-major, BYTES elements with a 4-byte length each, as in the binary extension:

    {"id"?: str, "parameters"?: {"timeout"?: int, "sequence_id"?: int | str,
                                 "sequence_start"?: bool, "sequence_end"?: bool},
     "inputs": [{"name": str, "datatype": str, "shape": [int], "data": bin}],
     "outputs"?: [{"name": str}]}

The answer has the same form, with `model_name`, `model_version` and `outputs`.  Nothing is written
or read as text, and no lengths have to be added up: for clients without a V2 library.

Invariants
 1. What a request means is decided by `prepare_decoded`, as for JSON and gRPC.
 2. Refusals are JSON, as everywhere: whoever reads the status reads the type.

Called by the protocol (in) and by the dispatch (out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from overcommit.runtime.errors import BadRequest, OvercommitError
from overcommit.runtime.sequence_terms import Ask
from overcommit.server.asking import Tensor, request_of, tensors_of
from overcommit.server.exchange import Exchange
from overcommit.server.inference import Data, Prepared, prepare_decoded
from overcommit.server.plans import RoutePlans

MEDIA_TYPES: Final = frozenset((b"application/msgpack", b"application/x-msgpack"))
_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/msgpack\r\ncontent-length: %d\r\n%b\r\n"
)


class WireTensor(msgspec.Struct):
    """A tensor as it is sent."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


class _Output(msgspec.Struct):
    name: str


class _Parameters(msgspec.Struct):
    timeout: int | None = None
    sequence_id: int | str = 0
    sequence_start: bool = False
    sequence_end: bool = False


class _Request(msgspec.Struct):
    inputs: tuple[WireTensor, ...]
    id: str | None = None
    outputs: tuple[_Output, ...] | None = None
    parameters: _Parameters | None = None


class Answer(msgspec.Struct, omit_defaults=True):
    """What is sent back."""

    model_name: str
    model_version: str
    outputs: list[WireTensor]
    id: str | None = None


_NONE: Final = _Parameters()
_DECODER: Final = msgspec.msgpack.Decoder(_Request)
_ENCODER: Final = msgspec.msgpack.Encoder()


def prepare(
    plans: RoutePlans, body: bytes, json_bytes: int | None
) -> tuple[Prepared, Sequence[Data]]:
    """Decode and check a request; return it and its tensors.  Raises BadRequest."""
    name = plans.route.name
    if json_bytes is not None:
        raise BadRequest(
            f"model '{name}': a MessagePack body has no JSON in front; leave "
            f"Inference-Header-Content-Length out"
        )
    try:
        request = _DECODER.decode(body)
    except msgspec.ValidationError as error:
        raise BadRequest(
            f"model '{name}': the request does not fit the V2 inference protocol: {error}"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"model '{name}': the body is not MessagePack: {error}") from error
    parameters = request.parameters or _NONE
    sequence = None
    if parameters.sequence_id:
        sequence = Ask(parameters.sequence_id, parameters.sequence_start, parameters.sequence_end)
    return prepare_decoded(
        plans,
        *request_of(
            [Tensor(each.name, each.datatype, each.shape, each.data) for each in request.inputs],
            None if request.outputs is None else [output.name for output in request.outputs],
            id=request.id,
            timeout_us=parameters.timeout,
            sequence=sequence,
        ),
    )


def respond(prepared: Prepared, view: memoryview) -> bytes:
    """Encode the answer that lies in an egress block.  Raises ProtocolError."""
    route = prepared.route
    outputs = [
        WireTensor(each.name, each.datatype, each.shape, bytes(each.data))
        for each in tensors_of(prepared, view)
    ]
    return _ENCODER.encode(Answer(route.name, route.version, outputs, prepared.id))


class MsgpackExchange(Exchange):
    """One request with a MessagePack body, and its answer."""

    prepare = staticmethod(prepare)

    def succeed(self, view: memoryview) -> None:
        """Write the model's answer."""
        self.pending = None
        assert self.prepared is not None
        try:
            body = respond(self.prepared, view)
        except OvercommitError as error:
            self.fail(error)
            return
        self._finish([_HEAD % (len(body), self._close_header()) + body])
