"""An inference request against a route, and its answer: validated tensors in, bytes out.

Invariants
 1. What `prepare` returns fits the version's inputs: names, datatypes, ranks, fixed sizes, element
    counts, and one batch size in all of them.
 2. Every refusal names the model and the input, and says what was expected.
 3. `respond` keeps nothing of the block that it reads.

Pure; called by the exchange.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from overcommit.runtime import sequence_terms
from overcommit.runtime.config import ID_CHARS_MAX, TENSORS_MAX
from overcommit.runtime.errors import BadRequest, OvercommitError
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.payload import DATATYPES
from overcommit.runtime.sequence_terms import Ask
from overcommit.server import binary, codec, raw_body, sequences, specials, wants
from overcommit.server.answer_plans import OutputPlan, Outputs, Part, Selection
from overcommit.server.failures import named
from overcommit.server.plans import InputPlan, Key, RoutePlans, Shape
from overcommit.server.regions import Held, window_of

if TYPE_CHECKING:
    from overcommit.server.heads import Target

Data = bytes | memoryview
_encode, _LETTER_OF_NULL = codec.encode, specials.LETTER_OF_NULL
DecodeData = Callable[[codec.Raw, str, tuple[int, ...]], bytes]


@dataclass(slots=True, frozen=True, eq=False)
class Prepared:
    """A request that fits its route, without its numbers; requests that differ in these share it.

    What every request and answer needs of the plans is here too.  Hundreds of models in turn find
    nothing of theirs in the processor's cache, so it counts how many objects are looked at.
    """

    plans: RoutePlans
    plan: InputPlan
    id: str | None
    selection: Selection
    all_binary: bool
    timeout_us: int | None = None
    sequence: Ask | None = None  # that it is of
    level: int = 0  # how urgent it is; 0: as its version says
    is_adapted: bool = False  # its bytes were others when it came
    # Where outputs go, by name.  Whoever keeps a request for others keeps none that holds something.
    held: Mapping[str, Held] | None = None
    route: Route = field(init=False)  # whom it asks
    shape: Shape = field(init=False)
    answers: Outputs = field(init=False)  # plans of answers to such requests
    answer_head: bytes = field(init=False)
    limit_ns: int = field(init=False)  # that it may take, by itself and by its version; 0: none

    def __post_init__(self) -> None:
        plans = self.plans
        limits_ns = ((plans.route.timeout_ms or 0) * 1_000_000, (self.timeout_us or 0) * 1000)
        put = object.__setattr__
        selection, answers = plans.select(self.selection)
        put(self, "selection", selection)
        put(self, "answers", answers)
        put(self, "route", plans.route)
        put(self, "shape", plans.shape)
        put(self, "answer_head", plans.answer_head)
        put(self, "limit_ns", min((each for each in limits_ns if each), default=0))

    def plan_of(self, view: memoryview) -> OutputPlan:
        """Return the plan of an answer in this block.  Raises ProtocolError when it is none.

        The version's own plans are looked at only where the shape does not know it.
        """
        how = (self.answers, view, self.selection, self.all_binary)
        return self.shape.find(*how) or self.plans.write(*how)

    def deliver(self, output: str, data: memoryview) -> None:
        """Copy an output into the region where the client wants it.  Raises BadRequest."""
        assert self.held is not None
        self.held[output].write(output, data)


@dataclass(slots=True)
class Answer:
    """Body of a response, in pieces; `json_bytes` is set when binary tensors follow the JSON."""

    pieces: list[bytes]
    json_bytes: int | None


# --- requests -----------------------------------------------------------------------------------
def prepare(
    plans: RoutePlans, body: bytes, json_bytes: int | None
) -> tuple[Prepared, Sequence[Data]]:
    """Decode and check a request; return it and its tensors, in the order of `plan.places`.

    Raises BadRequest that names the model.
    """
    if json_bytes is not None:
        return _prepare_named(plans, body, json_bytes)
    template = plans.templates.find(body)
    tensors = None if template is None else template.read(body)
    if template is not None and tensors is not None:
        known = plans.recall(template)
        if known is not None:
            return known, tensors
    prepared, data = _prepare_named(plans, body, None)
    if (
        prepared.id is None
        and prepared.timeout_us is None
        and not (prepared.is_adapted or prepared.held)
    ):
        if template is None:
            datatypes = [place.datatype for place in prepared.plan.places]
            plans.templates.learn(
                body, datatypes, prepared.plan.counts, lambda text: _read_again(prepared, text)
            )
        elif data == tensors:
            plans.remember(template, prepared)
    return prepared, data


def prepare_again(
    target: Target, body: bytes, json_bytes: int | None
) -> tuple[Prepared, Sequence[Data]]:
    """`prepare` for somebody whose requests so far are remembered with whom he asks.

    `target.plans` must be those that it means now.  Raises BadRequest that names the model.
    """
    before = target.prepared
    if before is not None and json_bytes is None:
        template = before.shape.templates.find(body)
        if template is not None and template is target.template:
            tensors = template.read(body)
            if tensors is not None:
                return before, tensors
    plans = target.plans
    assert plans is not None, "a target is used while its plans hold"
    prepared, data = prepare(plans, body, json_bytes)
    target.template, target.prepared = plans.recent
    return prepared, data


def _read_again(first: Prepared, body: bytes) -> Sequence[Data] | None:
    """Read a body that should be as the first one but for its numbers; None when it is not."""
    try:
        prepared, data = _prepare(first.plans, codec.decode_request(body), memoryview(b""))
    except BadRequest:
        return None
    is_same = (
        prepared.plan is first.plan
        and prepared.selection == first.selection
        and prepared.all_binary == first.all_binary
        and prepared.id is None
        and prepared.timeout_us is None
    )
    return data if is_same else None


def _prepare_named(
    plans: RoutePlans, body: bytes, json_bytes: int | None
) -> tuple[Prepared, Sequence[Data]]:
    try:
        if json_bytes == 0:
            return _prepare_raw(plans, body)
        text, tail = binary.split(body, json_bytes)
        return _prepare(plans, codec.decode_request(text), tail)
    except OvercommitError as error:
        raise named(error, plans.route) from error


def prepare_head(plans: RoutePlans, text: Data, tail_bytes: int) -> Prepared | None:
    """Check a request whose binary tensors are still to come.

    None when they must be there to be checked.  Raises BadRequest that names the model.
    """
    try:
        is_raw = not len(text)
        request = (
            raw_body.request_of(plans.route, tail_bytes) if is_raw else codec.decode_request(text)
        )
        if plans.ask_shape is not None or plans.route.adapts:
            return None
        if any(item.datatype == "BYTES" for item in request.inputs):
            return None
        sizes = [codec.whole(item.parameters, "binary_data_size") for item in request.inputs]
        if any(size is None for size in sizes):
            return None
        _check_limits(request)
        key = tuple([(item.name, item.datatype, item.shape) for item in request.inputs])
        plans.check(key)
        plan = plans.make(key, [size or 0 for size in sizes])
        if sum(place.nbytes for place in plan.places) != tail_bytes:
            raise BadRequest(
                f"{tail_bytes} bytes follow the JSON, the inputs' binary_data_size add up to "
                f"{sum(place.nbytes for place in plan.places)}"
            )
        return _finish(plans, plan, request)
    except OvercommitError as error:
        raise named(error, plans.route) from error


def _prepare_raw(plans: RoutePlans, body: bytes) -> tuple[Prepared, Sequence[Data]]:
    request = raw_body.request_of(plans.route, len(body))
    if request.inputs[0].datatype == "BYTES":
        body = binary.join_bytes([body])
    return _prepare(plans, request, memoryview(body))


def prepare_decoded(
    plans: RoutePlans,
    request: codec.InferRequest,
    tail: memoryview,
    decode_data: DecodeData = codec.decode_data,
) -> tuple[Prepared, Sequence[Data]]:
    """Check a request whose JSON somebody else has read, or made; `tail`: its binary tensors.

    Raises BadRequest that names the model.
    """
    try:
        return _prepare(plans, request, tail, decode_data)
    except OvercommitError as error:
        raise named(error, plans.route) from error


def _prepare(
    plans: RoutePlans,
    request: codec.InferRequest,
    tail: memoryview,
    decode_data: DecodeData = codec.decode_data,
) -> tuple[Prepared, Sequence[Data]]:
    _check_limits(request)
    key: Key = tuple([(item.name, item.datatype, item.shape) for item in request.inputs])
    ask, given = None, key
    if plans.ask_shape is not None:
        ask = sequences.read(request.parameters, plans.route.name)
        key = (*key, (sequence_terms.ASK_NAME, "UINT8", plans.ask_shape))
    plan = plans.known(key)
    asked = key
    if plan is None:
        if plans.route.adapts:
            key = given = plans.adapt(key)
        plans.check(given)
        if ask is not None and plans.route.max_batch_size and any(s[0] != 1 for *_, s in given):
            raise BadRequest(
                f"inference request to model '{plans.route.name}' must specify batch-size 1 due to "
                f"requirements of sequence batcher"
            )
    data: list[Data] = []
    at = 0
    for item in request.inputs:
        size = codec.whole(item.parameters, "binary_data_size")
        if size is not None:
            if at + size > len(tail):
                raise BadRequest(
                    f"input '{item.name}' has binary_data_size {size}, but only {len(tail) - at} "
                    f"bytes follow the JSON"
                )
            data.append(tail[at : at + size])
            at += size
        elif len(memoryview(item.data)):
            try:
                data.append(decode_data(item.data, item.datatype, item.shape))
            except BadRequest as error:
                raise BadRequest(f"input '{item.name}': {error.message}") from error
            continue
        elif (window := window_of(item.parameters)) is not None:
            data.append(plans.regions.hold(window).read())
        else:
            raise BadRequest(
                f"input '{item.name}' has neither data nor binary_data_size nor "
                f"shared_memory_region"
            )
        if not DATATYPES[item.datatype][1]:
            _check_elements(item, data[-1])
    if at != len(tail):
        raise BadRequest(f"{len(tail) - at} bytes follow the last binary tensor")
    if key is not asked:
        data = [codec.cast(data[0], asked[0][1], key[0][1])]
    if ask is not None:
        data.append(sequence_terms.encode(ask))
    if plan is None or any(
        len(each) != place.nbytes for each, place in zip(data, plan.places, strict=True)
    ):
        plan = plans.make(key, [len(each) for each in data])
    prepared = _finish(plans, plan, request, ask)
    if key is not asked:
        prepared = replace(prepared, is_adapted=True)
    return prepared, data


def _check_limits(request: codec.InferRequest) -> None:
    if request.id is not None and len(request.id) > ID_CHARS_MAX:
        raise BadRequest(f"the id has {len(request.id)} characters, the limit is {ID_CHARS_MAX}")
    if len(request.inputs) > TENSORS_MAX:
        raise BadRequest(f"{len(request.inputs)} inputs, the limit is {TENSORS_MAX}")


def _check_elements(item: codec.RequestInput, data: Data) -> None:
    elements = math.prod(item.shape)
    count = binary.count_bytes_elements(memoryview(data))
    if count != elements:
        raise BadRequest(
            f"input '{item.name}' has {count} elements, its shape {list(item.shape)} needs {elements}"
        )


def _finish(
    plans: RoutePlans,
    plan: InputPlan,
    request: codec.InferRequest,
    ask: Ask | None = None,
) -> Prepared:
    if request.parameters is None and request.outputs is None:
        return Prepared(plans, plan, request.id, None, False)
    selection: Selection = None
    held: dict[str, Held] = {}
    if request.outputs:
        selection, held = wants.read(plans, request.outputs)
    level = codec.whole(request.parameters, "priority") or 0
    return Prepared(
        plans,
        plan,
        request.id,
        selection,
        bool(codec.flag(request.parameters, "binary_data_output")),
        codec.whole(request.parameters, "timeout"),
        sequences.read_if_any(request.parameters) if plans.route.steps else ask,
        level if level <= plans.route.priority_levels else 0,
        held=held or None,
    )


# --- answers ------------------------------------------------------------------------------------
def respond(prepared: Prepared, view: memoryview) -> Answer:
    """Encode the answer that lies in an egress block.  Raises ProtocolError, BadRequest."""
    plan = prepared.plan_of(view)
    pieces: list[bytes] = [prepared.answer_head]
    blobs: list[bytes] = []
    for part in plan.parts:
        pieces.append(part.prefix)
        if part.unpack is not None:
            text = _encode(part.unpack(view, part.start))
            if _LETTER_OF_NULL in text:
                data = view[part.start : part.end]
                text = codec.name_specials(text, data, part.datatype)
            pieces.append(text)
            continue
        data = view[part.start : part.end]
        if part.to_region:
            prepared.deliver(part.name, data)
            continue
        if part.classes is not None:
            text, blob = _classes(prepared, part, data)
            pieces.append(text)
            if blob is not None:
                blobs.append(blob)
            continue
        if part.is_binary:
            blobs.append(bytes(data))
            continue
        try:
            pieces.append(codec.write_data(data, part.datatype))
        except BadRequest as error:
            name = prepared.route.name
            raise BadRequest(f"model '{name}': output '{part.name}' {error.message}") from error
    pieces.append(plan.tail)
    if prepared.id is not None:
        pieces += (b',"id":', codec.encode(prepared.id))
    pieces.append(b"}")
    if not blobs:
        return Answer(pieces, None)
    json_bytes = sum(map(len, pieces))
    return Answer([b"".join(pieces), *blobs], json_bytes)


def _classes(prepared: Prepared, part: Part, data: memoryview) -> tuple[bytes, bytes | None]:
    """Encode the highest values of an output: the end of its JSON, and what follows the JSON."""
    assert part.classes is not None
    try:
        elements = part.classes(data)
    except BadRequest as error:
        name = prepared.route.name
        raise BadRequest(f"model '{name}': output '{part.name}' {error.message}") from error
    if not part.is_binary:
        texts = [element.decode() for element in elements]
        return b'"data":' + codec.encode(texts), None
    blob = binary.join_bytes(elements)
    return b'"parameters":{"binary_data_size":%d}' % len(blob), blob
