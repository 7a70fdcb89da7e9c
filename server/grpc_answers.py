"""A block of outputs to ModelInferResponse.

Answers to one model differ in their numbers and their id and seldom in anything else: what stands
before each output's numbers is kept, by the words of the block's header.

Invariants
 1. Outputs go into `raw_output_contents` alone, one for each output, never into `contents`.
 2. Nothing of the egress block is kept after `respond`.

Called by the inferences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from overcommit.runtime import payload
from overcommit.runtime.errors import BadRequest, ProtocolError
from overcommit.server import binary
from overcommit.server.inference import Prepared
from overcommit.server.limits import GRPC_ANSWERS_MAX
from overcommit.server.plans import RoutePlans
from overcommit.server.proto import messages

_RAW_OUTPUT: Final = b"\x32"


@dataclass(slots=True, frozen=True)
class _Part:
    """One output: what stands before its bytes, and where these lie in the block."""

    before: bytes  # with the field of its bytes, if nothing is to be done to them
    start: int
    end: int
    name: str = ""
    to_region: bool = False  # it goes into the client's shared memory
    classes: Callable[[memoryview], list[bytes]] | None = None  # these are wanted of its values


@dataclass(slots=True, frozen=True)
class _Layout:
    """An answer whose numbers are missing."""

    parts: tuple[_Part, ...]
    tail: bytes  # of an answer without tensors
    end: int  # of the last tensor in its block
    is_plain: bool  # nothing is to be done to the tensors


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
            if layout.is_plain or not (part.to_region or part.classes):
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
                parts.append(_Part(b"", start, end, name, classes=classes))
            elif want == "region":
                parts.append(_Part(b"", start, end, name, to_region=True))
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
            not any(part.to_region or part.classes for part in parts),
        )
        if len(self._layouts) >= GRPC_ANSWERS_MAX:
            self._layouts.clear()
            self._words.clear()
        self._words[route.slot] = words
        self._layouts[route.slot, bytes(view[:words]), prepared.selection] = (plans, layout)
        return layout


def _deliver(prepared: Prepared, part: _Part, data: memoryview) -> list[bytes]:
    """Put an output where it is wanted; return its field of the answer."""
    if part.to_region:
        prepared.deliver(part.name, data)
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
