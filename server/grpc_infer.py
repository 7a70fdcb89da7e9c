"""ModelInferRequest to checked tensors, and a block of outputs to ModelInferResponse.

Requests differ in their raw tensors and their id and seldom in anything else.  So a message is cut
by hand: what is left without these two is a key under which the request that was checked is found
again.  A message that is seen for the first time is parsed by protobuf and goes the way of a binary
HTTP request, `inference.prepare_decoded`, which alone decides what is right.

Invariants
 1. `prepare` returns what the long way would return; a key is kept only for requests whose tensors
    have the sizes of its plan.
 2. Outputs go into `raw_output_contents` alone, one for each output, never into `contents`.
 3. Nothing of the egress block is kept after `respond`.

Called by the calls.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec
from google.protobuf.message import DecodeError

from overcommit.runtime import payload
from overcommit.runtime.config import ID_CHARS_MAX
from overcommit.runtime.errors import BadRequest, ProtocolError
from overcommit.runtime.payload import DATATYPES
from overcommit.server import binary, codec
from overcommit.server.inference import Data, Prepared, prepare_decoded
from overcommit.server.limits import GRPC_ANSWERS_MAX, PLANS_MAX
from overcommit.server.plans import RoutePlans
from overcommit.server.proto import messages
from overcommit.server.regions import Window

_ID: Final = 0x1A  # field 3, with a length; likewise:
_RAW_INPUT: Final = 0x3A
_RAW_OUTPUT: Final = b"\x32"
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


@dataclass(slots=True, frozen=True)
class _Part:
    """One output: what stands before its bytes, and where these lie in the block."""

    before: bytes  # with the field of its bytes, if nothing is to be done to them
    start: int
    end: int
    name: str = ""
    window: Window | None = None  # it goes into the client's shared memory
    classes: Callable[[memoryview], list[bytes]] | None = None  # these are wanted of its values


@dataclass(slots=True, frozen=True)
class _Layout:
    """An answer whose numbers are missing."""

    parts: tuple[_Part, ...]
    tail: bytes  # of an answer without tensors
    end: int  # of the last tensor in its block
    is_plain: bool  # nothing is to be done to the tensors


# --- requests -----------------------------------------------------------------------------------
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


# --- answers ------------------------------------------------------------------------------------
class Answers:
    """Layouts of answers seen lately."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[int, bytes, object], tuple[RoutePlans, _Layout]] = {}
        self._words: dict[int, int] = {}  # slot -> words of the header seen last, in bytes

    def respond(self, prepared: Prepared, view: memoryview, request_id: str) -> list[bytes]:
        """Encode the answer that lies in an egress block.

        Raises ProtocolError; BadRequest, NotFound, Forbidden for outputs that cannot be had as asked.
        """
        plans = prepared.plans
        slot = plans.route.slot
        key = (slot, bytes(view[: self._words.get(slot, 0)]), prepared.selection)
        found = self._layouts.get(key)
        if found is not None and found[0] is plans and found[1].end <= len(view):
            layout = found[1]
        else:
            layout = self._lay_out(prepared, view)
        pieces: list[bytes] = []
        if request_id:
            text = request_id.encode()
            pieces.append(_field(b"\x1a", len(text)) + text)
        for part in layout.parts:
            data = view[part.start : part.end]
            if layout.is_plain or (part.window is None and part.classes is None):
                pieces += (part.before, bytes(data))
            else:
                pieces += (part.before, *_deliver(prepared, part, data))
        if layout.tail:
            pieces.append(layout.tail)
        return pieces

    def _lay_out(self, prepared: Prepared, view: memoryview) -> _Layout:
        places = payload.decode(view)
        words = payload.WORD_BYTES * (2 + sum(5 + len(place.shape) for place in places))
        plans = prepared.plans
        route = plans.route
        wanted = None if prepared.selection is None else dict(prepared.selection)
        head = messages.ModelInferResponse(model_name=route.name, model_version=route.version)
        parts: list[_Part] = []
        for place in places:
            if place.index >= len(route.outputs):
                raise ProtocolError(f"an answer has output {place.index}, which nobody knows")
            name = route.outputs[place.index].name
            if wanted is not None and name not in wanted:
                continue
            want = None if wanted is None else wanted[name]
            start, end = place.offset, place.offset + place.nbytes
            datatype, shape = place.datatype, place.shape
            if isinstance(want, tuple):
                classes, shape = plans.classes(place, want[0].count)
                datatype = "BYTES"
                parts.append(_Part(b"", start, end, name, None, classes))
            elif isinstance(want, Window):
                parts.append(_Part(b"", start, end, name, want))
            else:
                parts.append(_Part(_field(_RAW_OUTPUT, end - start), start, end))
            head.outputs.add(name=name, datatype=datatype, shape=shape)
        before = head.SerializeToString()
        if parts:
            parts[0] = replace(parts[0], before=before + parts[0].before)
            before = b""
        layout = _Layout(
            tuple(parts),
            before,
            max((part.end for part in parts), default=0),
            all(part.window is None and part.classes is None for part in parts),
        )
        if len(self._layouts) >= GRPC_ANSWERS_MAX:
            self._layouts.clear()
            self._words.clear()
        self._words[route.slot] = words
        self._layouts[route.slot, bytes(view[:words]), prepared.selection] = (plans, layout)
        return layout


def _deliver(prepared: Prepared, part: _Part, data: memoryview) -> list[bytes]:
    """Put an output where it is wanted; return its field of the answer."""
    if part.window is not None:
        prepared.plans.regions.write(part.window, part.name, data)
        return [_field(_RAW_OUTPUT, 0)]
    assert part.classes is not None
    try:
        blob = binary.join_bytes(part.classes(data))
    except BadRequest as error:
        name = prepared.plans.route.name
        raise BadRequest(f"model '{name}': output '{part.name}' {error.message}") from error
    return [_field(_RAW_OUTPUT, len(blob)), blob]


def _field(tag: bytes, length: int) -> bytes:
    """Write the tag and length of a field."""
    out = bytearray(tag)
    while length >= 128:
        out.append(length & 127 | 128)
        length >>= 7
    out.append(length)
    return bytes(out)


def stream_answer(pieces: list[bytes]) -> list[bytes]:
    """Put an answer into a ModelStreamInferResponse."""
    return [_field(b"\x12", sum(map(len, pieces))), *pieces]


def _final() -> bytes:
    response = messages.ModelInferResponse()
    response.parameters["triton_final_response"].bool_param = True
    return response.SerializeToString()


FINAL: Final = _final()  # the parameter that says so, to be put behind an answer of a stream
