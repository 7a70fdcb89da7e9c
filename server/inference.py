"""An inference request against a route, and its answer: validated tensors in, bytes out.

Invariants
 1. What `prepare` returns fits the version's inputs: names, datatypes, ranks, fixed sizes, element
    counts, and one batch size in all of them.
 2. Every refusal names the model and the input, and says what was expected.

Pure; called by the hot path and by the ASGI app.
"""

from __future__ import annotations

from dataclasses import dataclass

from overcommit.runtime.config import ID_CHARS_MAX, RANK_MAX, TENSORS_MAX, TensorSpec
from overcommit.runtime.errors import BadRequest, OvercommitError
from overcommit.runtime.messages import Route
from overcommit.runtime.payload import DATATYPES, TensorPlace, header_bytes
from overcommit.server import binary, codec

Tensor = tuple[int, str, bytes | memoryview, tuple[int, ...]]

_UNKNOWN_AXIS = 128  # guess for an output axis that no input decides


@dataclass(slots=True)
class Prepared:
    """A request that fits its route."""

    route: Route
    tensors: list[Tensor]
    out_bytes: int  # a guess of the egress needed
    timeout_us: int | None
    request: codec.InferRequest


@dataclass(slots=True)
class Answer:
    """Body of a response; `json_bytes` is set when binary tensors follow the JSON."""

    body: bytes
    json_bytes: int | None


def prepare(route: Route, body: bytes, json_bytes: int | None) -> Prepared:
    """Decode and check a request.  Raises BadRequest that names the model."""
    try:
        return _prepare(route, body, json_bytes)
    except OvercommitError as error:
        prefix = f"model '{route.name}': "
        if error.message.startswith(prefix):
            raise
        raise type(error)(prefix + error.message) from error


def _prepare(route: Route, body: bytes, json_bytes: int | None) -> Prepared:
    text, tail = binary.split(body, json_bytes)
    request = codec.decode_request(text)
    if request.id is not None and len(request.id) > ID_CHARS_MAX:
        raise BadRequest(f"the id has {len(request.id)} characters, the limit is {ID_CHARS_MAX}")
    if len(request.inputs) > TENSORS_MAX:
        raise BadRequest(f"{len(request.inputs)} inputs, the limit is {TENSORS_MAX}")
    specs = {spec.name: (index, spec) for index, spec in enumerate(route.inputs)}
    tensors: list[Tensor] = []
    axes: dict[str, int] = {}
    seen: set[str] = set()
    at = 0
    for item in request.inputs:
        found = specs.get(item.name)
        if found is None:
            raise BadRequest(f"unknown input '{item.name}'; its inputs are {sorted(specs)}")
        if item.name in seen:
            raise BadRequest(f"input '{item.name}' is given twice")
        seen.add(item.name)
        index, spec = found
        _check_shape(route, spec, item, axes)
        size = codec.whole(item.parameters, "binary_data_size")
        if size is not None:
            if at + size > len(tail):
                raise BadRequest(
                    f"input '{item.name}' has binary_data_size {size}, but only {len(tail) - at} "
                    f"bytes follow the JSON"
                )
            data: bytes | memoryview = tail[at : at + size]
            at += size
        elif len(memoryview(item.data)):
            try:
                data = codec.decode_data(item.data, item.datatype, item.shape)
            except BadRequest as error:
                raise BadRequest(f"input '{item.name}': {error.message}") from error
        else:
            raise BadRequest(f"input '{item.name}' has neither data nor binary_data_size")
        _check_count(item, data)
        tensors.append((index, item.datatype, data, item.shape))
    if at != len(tail):
        raise BadRequest(f"{len(tail) - at} bytes follow the last binary tensor")
    for name, (_, spec) in specs.items():
        if name not in seen and not spec.optional:
            raise BadRequest(f"input '{name}' is missing; its inputs are {sorted(specs)}")
    if request.outputs is not None:
        known = {spec.name for spec in route.outputs}
        for output in request.outputs:
            if output.name not in known:
                raise BadRequest(f"unknown output '{output.name}'; its outputs are {sorted(known)}")
    timeout_us = codec.whole(request.parameters, "timeout")
    return Prepared(route, tensors, _guess_bytes(route, axes), timeout_us, request)


def _check_shape(
    route: Route, spec: TensorSpec, item: codec.RequestInput, axes: dict[str, int]
) -> None:
    shape = item.shape
    if item.datatype != spec.datatype:
        raise BadRequest(f"input '{item.name}' is {item.datatype}, it must be {spec.datatype}")
    if len(shape) != len(spec.shape) or len(shape) > RANK_MAX:
        raise BadRequest(
            f"input '{item.name}' has shape {list(shape)}, it must fit {list(spec.shape)}"
        )
    for axis, (given, wanted) in enumerate(zip(shape, spec.shape, strict=True)):
        if given < 0 or (wanted >= 0 and given != wanted):
            raise BadRequest(
                f"input '{item.name}' has shape {list(shape)}, it must fit {list(spec.shape)}"
            )
        name = spec.axes[axis] if spec.axes else None
        if name is not None and axes.setdefault(name, given) != given:
            raise BadRequest(
                f"input '{item.name}' has {given} for the axis '{name}', another input has "
                f"{axes[name]}"
            )
    if route.max_batch_size and shape and shape[0] > route.max_batch_size:
        raise BadRequest(
            f"input '{item.name}' has {shape[0]} rows, max_batch_size is {route.max_batch_size}; "
            f"send fewer rows or raise it in model.toml"
        )


def _check_count(item: codec.RequestInput, data: bytes | memoryview) -> None:
    elements = 1
    for size in item.shape:
        elements *= size
    width = DATATYPES[item.datatype][1]
    if width:
        if len(data) != elements * width:
            raise BadRequest(
                f"input '{item.name}' has {len(data) // width} elements, its shape "
                f"{list(item.shape)} needs {elements}"
            )
        return
    count = binary.count_bytes_elements(memoryview(data))
    if count != elements:
        raise BadRequest(
            f"input '{item.name}' has {count} elements, its shape {list(item.shape)} needs {elements}"
        )


def _guess_bytes(route: Route, axes: dict[str, int]) -> int:
    total = header_bytes([len(spec.shape) for spec in route.outputs])
    for spec in route.outputs:
        nbytes = DATATYPES[spec.datatype][1] or 64
        names = spec.axes or (None,) * len(spec.shape)
        for name, size in zip(names, spec.shape, strict=True):
            nbytes *= size if size >= 0 else axes.get(name or "", _UNKNOWN_AXIS)
        total += nbytes + 64
    return total


def respond(prepared: Prepared, places: tuple[TensorPlace, ...], data: bytes) -> Answer:
    """Encode an answer.  `data` is the egress block, already copied out."""
    request, route = prepared.request, prepared.route
    wanted = None
    if request.outputs:
        wanted = {output.name: output for output in request.outputs}
    everything_binary = bool(codec.flag(request.parameters, "binary_data_output"))
    view = memoryview(data)
    outputs: list[codec.ResponseOutput] = []
    blobs: list[memoryview] = []
    for place in places:
        name = route.outputs[place.index].name
        is_binary = everything_binary
        if wanted is not None:
            asked = wanted.get(name)
            if asked is None:
                continue
            own = codec.flag(asked.parameters, "binary_data")
            is_binary = everything_binary if own is None else own
        part = view[place.offset : place.offset + place.nbytes]
        output = codec.ResponseOutput(name, place.datatype, place.shape)
        if is_binary:
            blobs.append(part)
            output.parameters = {"binary_data_size": place.nbytes}
        else:
            try:
                output.data = codec.encode_data(part, place.datatype)
            except BadRequest as error:
                raise BadRequest(
                    f"model '{route.name}': output '{name}' {error.message}"
                ) from error
        outputs.append(output)
    head = codec.encode_response(
        codec.InferResponse(route.name, route.version, outputs, request.id)
    )
    if not blobs:
        return Answer(head, None)
    return Answer(b"".join((head, *blobs)), len(head))
