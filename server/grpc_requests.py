"""ModelInferRequest to checked tensors.

Requests differ in their raw tensors and their id and seldom in anything else.  So a message is cut
by hand: what is left without these two is a key under which the request that was checked is found
again.  A message that is seen for the first time is parsed by protobuf and goes the way of a binary
HTTP request, `inference.prepare_decoded`, which alone decides what is right.

Invariants
 1. `prepare` returns what the long way would return; a key is kept only for requests whose tensors
    have the sizes of its plan.

Called by the inferences.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from google.protobuf.message import DecodeError

from overcommit.runtime.config import ID_CHARS_MAX
from overcommit.runtime.errors import BadRequest
from overcommit.runtime.payload import DATATYPES
from overcommit.server import binary, codec
from overcommit.server.inference import Data, Prepared, prepare_decoded
from overcommit.server.limits import PLANS_MAX
from overcommit.server.plans import RoutePlans
from overcommit.server.proto import messages

_ID: Final = 0x1A  # field 3, with a length; likewise:
_RAW_INPUT: Final = 0x3A
_FIELDS: Final = frozenset((0x0A, 0x12, _ID, 0x22, 0x2A, 0x32))

# Field of InferTensorContents -> how its numbers become bytes, by the datatypes that it may hold.
_CONTENTS: Final = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


@dataclass(slots=True)
class Asked:
    """A message, cut."""

    head: bytes  # all but the id and the raw tensors
    id: str
    raws: list[memoryview]
    name: str
    version: str | None
    known: Prepared | None  # of a message that differed in id and numbers alone
    request: messages.ModelInferRequest | None  # the head, parsed; None: it was not needed


@dataclass(slots=True, frozen=True)
class _Known:
    prepared: Prepared
    name: str
    version: str | None


class Requests:
    """Messages seen lately, by what requests have in common."""

    def __init__(self) -> None:
        self._known: dict[bytes, _Known] = {}

    def read(self, message: Data) -> Asked:
        """Cut a message.  Raises BadRequest."""
        cut = _cut(message)
        if cut is None:  # an order of fields that no client is known to write
            request = _parse(message)
            raws = [memoryview(raw) for raw in request.raw_input_contents]
            request.ClearField("raw_input_contents")
            version = request.model_version or None
            return Asked(b"", request.id, raws, request.model_name, version, None, request)
        head, id_bytes, raws = cut
        try:
            id_text = id_bytes.decode() if id_bytes else ""
        except UnicodeDecodeError as error:
            raise BadRequest("the request's id is not UTF-8") from error
        if len(id_text) > ID_CHARS_MAX:
            raise BadRequest(f"the id has {len(id_text)} characters, the limit is {ID_CHARS_MAX}")
        known = self._known.get(head)
        if known is not None:
            return Asked(head, id_text, raws, known.name, known.version, known.prepared, None)
        request = _parse(head)
        version = request.model_version or None
        return Asked(head, id_text, raws, request.model_name, version, None, request)

    def prepare(self, plans: RoutePlans, asked: Asked) -> tuple[Prepared, Sequence[Data]]:
        """Check a request; return it and its tensors.  Raises BadRequest that names the model."""
        known, raws = asked.known, asked.raws
        if known is not None and known.plans is plans and len(known.plan.places) == len(raws):
            for place, raw in zip(known.plan.places, raws, strict=True):
                if place.nbytes != len(raw):
                    break
            else:
                return known, raws
        try:
            request, tensors = _translate(asked.request or _parse(asked.head), raws)
        except BadRequest as error:
            raise BadRequest(f"model '{plans.route.name}': {error.message}") from error
        tail = tensors[0] if len(tensors) == 1 else b"".join(tensors)
        prepared, data = prepare_decoded(plans, request, memoryview(tail))
        if asked.head and raws and _can_be_known(plans, prepared):
            if len(self._known) >= PLANS_MAX:
                self._known.clear()
            self._known[asked.head] = _Known(prepared, asked.name, asked.version)
        return prepared, data


def _can_be_known(plans: RoutePlans, prepared: Prepared) -> bool:
    if plans.route.sequence or prepared.is_adapted or prepared.held:
        return False  # their heads have ids in them, or names of regions, whose meaning changes
    return all(spec.datatype != "BYTES" for spec in plans.route.inputs) and prepared.id is None


def _parse(data: Data) -> messages.ModelInferRequest:
    try:
        return messages.ModelInferRequest.FromString(bytes(data))
    except DecodeError as error:
        raise BadRequest(f"the message is no ModelInferRequest: {error}") from error


def _cut(message: Data) -> tuple[bytes, bytes, list[memoryview]] | None:
    """Cut a message as clients write it: fields in order, raw tensors last.  None: it is another.

    Raises BadRequest when a field reaches beyond the message.
    """
    try:
        return _cut_fields(message)
    except IndexError as error:
        raise BadRequest("the message is no ModelInferRequest: it is truncated") from error


def _cut_fields(message: Data) -> tuple[bytes, bytes, list[memoryview]] | None:
    at, end = 0, len(message)
    id_start = id_stop = id_at = 0
    while at < end:
        tag = message[at]
        if tag == _RAW_INPUT:
            break
        length = message[at + 1]
        start = at + 2
        if length >= 128:
            length, start = _varint(message, at + 1)
        if tag not in _FIELDS or (tag == _ID and id_stop):
            return None
        stop = start + length
        if tag == _ID:
            id_at, id_start, id_stop = at, start, stop
        at = stop
    head = bytes(message[:at])
    view = memoryview(message)
    raws: list[memoryview] = []
    while at < end:
        if message[at] != _RAW_INPUT:
            return None
        length = message[at + 1]
        start = at + 2
        if length >= 128:
            length, start = _varint(message, at + 1)
        at = start + length
        raws.append(view[start:at])
    if at > end:
        raise IndexError
    if id_stop:
        return head[:id_at] + head[id_stop:], head[id_start:id_stop], raws
    return head, b"", raws


def _varint(data: Data, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise BadRequest("the message is no ModelInferRequest: a length is too long")


def _translate(
    request: messages.ModelInferRequest, raws: Sequence[Data]
) -> tuple[codec.InferRequest, list[Data]]:
    """Say the request as a binary HTTP request; return that and the tensors behind it."""
    inputs: list[codec.RequestInput] = []
    tensors: list[Data] = []
    waiting = iter(raws)
    for tensor in request.inputs:
        parameters = _parameters(tensor.parameters)
        if tensor.HasField("contents") and raws:
            raise BadRequest(
                f"input '{tensor.name}' has contents, which must not be used together with "
                f"raw_input_contents"
            )
        data: Data | None = None
        if "shared_memory_region" not in parameters:
            if raws:
                data = next(waiting, None)
                if data is None:
                    raise BadRequest(
                        f"{len(request.inputs)} inputs, but only {len(raws)} raw_input_contents"
                    )
            else:
                data = _pack(tensor)
        if data is not None:
            parameters["binary_data_size"] = msgspec.Raw(b"%d" % len(data))
            tensors.append(data)
        shape = tuple(tensor.shape)
        inputs.append(codec.RequestInput(tensor.name, tensor.datatype, shape, parameters or None))
    left = sum(1 for _ in waiting)
    if left:
        raise BadRequest(
            f"{len(raws)} raw_input_contents, but only {len(raws) - left} inputs need them"
        )
    outputs = tuple(
        [
            codec.RequestOutput(output.name, _parameters(output.parameters) or None)
            for output in request.outputs
        ]
    )
    own = _parameters(request.parameters)
    own.pop("triton_enable_empty_final_response", None)
    return codec.InferRequest(tuple(inputs), None, outputs or None, own or None), tensors


def _parameters(given: Any) -> dict[str, msgspec.Raw]:
    """The parameters as they would stand in JSON."""
    found: dict[str, msgspec.Raw] = {}
    for name in given:
        choice = given[name].WhichOneof("parameter_choice")
        if choice is not None:
            found[name] = msgspec.Raw(codec.encode(getattr(given[name], choice)))
    return found


def _pack(tensor: messages.ModelInferRequest.InferInputTensor) -> bytes:
    """Turn a tensor's `contents` into its bytes.  Raises BadRequest."""
    datatype = tensor.datatype
    field = _CONTENTS.get(datatype)
    if field is None:
        if datatype in DATATYPES:
            raise BadRequest(
                f"input '{tensor.name}' is {datatype}, which can only be sent in raw_input_contents"
            )
        raise BadRequest(f"input '{tensor.name}' has the unknown datatype '{datatype}'")
    for descriptor, _ in tensor.contents.ListFields():
        if descriptor.name != field:
            raise BadRequest(
                f"input '{tensor.name}' is {datatype}, its data must be in {field}, not in "
                f"{descriptor.name}"
            )
    values = getattr(tensor.contents, field)
    if datatype == "BOOL":
        return bytes(values)
    if datatype == "BYTES":
        return binary.join_bytes(values)
    try:
        return array(codec.CODES[datatype], values).tobytes()
    except OverflowError as error:
        raise BadRequest(f"input '{tensor.name}': {error}; it does not fit {datatype}") from error
