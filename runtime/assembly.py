"""From the requests of a batch to one array per input, and back from the outputs to each request.

`gather` copies the tensors out of the ingress blocks, one after the other along the batch axis,
and pads ragged axes to the longest.  `split` takes each request's rows out of the outputs, cuts
what was padded, and writes them into its egress block behind a header.

Inputs are copied even for a batch of one: ingress memory is mapped read-only, and a model that
changes its input in place would die of it.

Invariants
 1. What is given to the engine are writable, C-contiguous arrays that share nothing with a block.
 2. An egress block is written only up to its length; a block that is too short is not touched.
 3. `split(run(gather(requests)))` is, for a model that works row by row and masks its padding, what
    each request would have got alone.

Pure but for the blocks that are handed in.  Called at the batch boundary; raises BadRequest for a
malformed BYTES tensor, ModelError for outputs that are not what the version's signature says.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np

from overcommit.runtime.config import TensorSpec
from overcommit.runtime.errors import BadRequest, ModelError
from overcommit.runtime.payload import TensorPlace
from overcommit.runtime.signature import NUMPY_TYPES, Form, Signature

Array = np.ndarray[Any, np.dtype[Any]]


class Shaped(Protocol):
    """What has a shape: an array, or a tensor of torch's."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...


_LENGTH: Final = struct.Struct("<I")  # before each element of a BYTES tensor


# --- in -----------------------------------------------------------------------------------------
def gather(
    signature: Signature, forms: Sequence[Form], blocks: Sequence[memoryview]
) -> dict[str, Array]:
    """Make the arrays of a batch; `blocks[i]` is the ingress block of `forms[i]`."""
    inputs: dict[str, Array] = {}
    first = forms[0]
    if len(forms) == 1:
        block = blocks[0]
        for place in first.places:
            spec = signature.inputs[place.index]
            piece = block[place.offset : place.offset + place.nbytes]
            inputs[spec.name] = _array(spec, piece, place.shape)
        return inputs
    is_even = all(form.sizes == first.sizes for form in forms)
    for position, place in enumerate(first.places):
        spec = signature.inputs[place.index]
        pieces = [
            block[at.offset : at.offset + at.nbytes]
            for block, form in zip(blocks, forms, strict=True)
            for at in (form.places[position],)
        ]
        shapes = [form.places[position].shape for form in forms]
        if spec.datatype == "BYTES" or not is_even:
            parts = [_array(spec, *pair) for pair in zip(pieces, shapes, strict=True)]
            inputs[spec.name] = _pad(spec, parts)
            continue
        # The common case in one copy: equal shapes lie behind each other as they are.
        whole = bytearray().join(pieces)
        shape = (sum(form.rows for form in forms), *shapes[0][1:])
        inputs[spec.name] = _numbers(spec, whole, shape)
    return inputs


def _numbers(spec: TensorSpec, data: bytearray, shape: tuple[int, ...]) -> Array:
    if spec.datatype == "BOOL":
        # A client's byte may be 2; as numpy's or torch's bool that is neither true nor false.
        truth: Array = np.frombuffer(data, np.uint8).reshape(shape) != 0
        return truth
    return np.frombuffer(data, NUMPY_TYPES[spec.datatype]).reshape(shape)


def _array(spec: TensorSpec, piece: memoryview, shape: tuple[int, ...]) -> Array:
    if spec.datatype != "BYTES":
        return _numbers(spec, bytearray(piece), shape)
    elements = _elements(spec, piece)
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    try:
        return array.reshape(shape)
    except ValueError as error:
        raise BadRequest(
            f"input '{spec.name}' holds {len(elements)} elements, its shape is {list(shape)}"
        ) from error


def _elements(spec: TensorSpec, piece: memoryview) -> list[bytes]:
    elements: list[bytes] = []
    at, end = 0, len(piece)
    while at < end:
        start = at + _LENGTH.size
        length = _LENGTH.unpack_from(piece, at)[0] if start <= end else end
        if start + length > end:
            raise BadRequest(f"input '{spec.name}' ends inside an element")
        elements.append(bytes(piece[start : start + length]))
        at = start + length
    return elements


def _pad(spec: TensorSpec, parts: list[Array]) -> Array:
    """Join along the batch axis, each part padded at the end of every other axis."""
    rows = sum(part.shape[0] for part in parts)
    longest = tuple(max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True))
    whole: Array = np.full((rows, *longest), _pad_value(spec), NUMPY_TYPES[spec.datatype])
    at = 0
    for part in parts:
        whole[(slice(at, at + part.shape[0]), *map(slice, part.shape[1:]))] = part
        at += part.shape[0]
    return whole


def _pad_value(spec: TensorSpec) -> object:
    if spec.datatype == "BYTES":
        return b""
    pad = spec.pad or 0.0
    if spec.datatype == "BF16":
        return np.float32(pad).view(np.uint32) >> 16
    return bool(pad) if spec.datatype == "BOOL" else pad


# --- out ----------------------------------------------------------------------------------------
def split(
    signature: Signature,
    outputs: Mapping[str, Array],
    forms: Sequence[Form],
    blocks: Sequence[memoryview],
) -> list[int]:
    """Write each request's part of the outputs into its egress block.

    Return the bytes that each needs; where that is more than its block has, nothing was written.
    """
    arrays = [_checked(spec, outputs) for spec in signature.outputs]
    check_rows(signature, arrays, forms)
    if len(forms) == 1:
        return [_write(signature, arrays, blocks[0])]
    cuts = cuts_of(signature, arrays, forms)
    if not cuts and not any(array.dtype == object for array in arrays):
        return _split_even(signature, arrays, forms, blocks)
    needs: list[int] = []
    at = 0
    for form, block in zip(forms, blocks, strict=True):
        mine = [array[at : at + form.rows] for array in arrays]
        for number, axis, position in cuts:
            before = (slice(None),) * axis
            mine[number] = mine[number][(*before, slice(form.sizes[position]))]
        needs.append(_write(signature, mine, block))
        at += form.rows
    return needs


def _split_even(
    signature: Signature,
    arrays: Sequence[Array],
    forms: Sequence[Form],
    blocks: Sequence[memoryview],
) -> list[int]:
    """Split what is only rows, which nearly every batch is: slices of bytes, one header for all."""
    rows = max(1, arrays[0].shape[0]) if arrays else 1
    raws = [(_raw(array), array.nbytes // rows, array.shape[1:]) for array in arrays]
    needs: list[int] = []
    at, laid_out = 0, -1
    header, total = b"", 0
    places: tuple[TensorPlace, ...] = ()
    for form, block in zip(forms, blocks, strict=True):
        end = at + form.rows
        if form.rows != laid_out:
            laid_out = form.rows
            header, places, total = signature.answer_header(
                tuple((laid_out * width, (laid_out, *tail)) for _, width, tail in raws)
            )
        needs.append(total)
        if total <= len(block):
            block[: len(header)] = header
            for place, (raw, width, _) in zip(places, raws, strict=True):
                block[place.offset : place.offset + place.nbytes] = raw[at * width : end * width]
        at = end
    return needs


def _checked(spec: TensorSpec, outputs: Mapping[str, Array]) -> Array:
    array = outputs.get(spec.name)
    if array is None:
        raise ModelError(f"the model returned no output '{spec.name}'")
    if array.dtype != NUMPY_TYPES[spec.datatype]:
        raise ModelError(
            f"output '{spec.name}' is {array.dtype}, the model's config says {spec.datatype}"
        )
    return array


def check_rows(signature: Signature, arrays: Sequence[Shaped], forms: Sequence[Form]) -> None:
    """Raise ModelError for an output that has not the rows of its batch."""
    if len(forms) == 1:
        if not signature.batches:
            return
        rows = forms[0].rows
    else:
        rows = sum(form.rows for form in forms)
    for spec, array in zip(signature.outputs, arrays, strict=True):
        shape = array.shape
        if not shape or shape[0] != rows:
            raise ModelError(
                f"output '{spec.name}' has shape {list(shape)} for a batch of {rows} rows: "
                f"it cannot be split; set max_batch_size = 0 if the model does not batch"
            )


def cuts_of(
    signature: Signature, arrays: Sequence[Shaped], forms: Sequence[Form]
) -> list[tuple[int, int, int]]:
    """Find what must be cut: (output, axis, which ragged size)."""
    cuts: list[tuple[int, int, int]] = []
    for position, name in enumerate(signature.ragged):
        sizes = [form.sizes[position] for form in forms]
        longest = max(sizes)
        if min(sizes) == longest:
            continue
        for number, spec in enumerate(signature.outputs):
            axis = signature.axis_of(spec, name)
            if axis is None:
                continue
            shape = arrays[number].shape
            if axis >= len(shape) or shape[axis] != longest:
                raise ModelError(
                    f"output '{spec.name}' has shape {list(shape)}: its axis "
                    f"'{name}' is not the padded {longest}, so it cannot be cut back"
                )
            cuts.append((number, axis, position))
    return cuts


def _write(signature: Signature, arrays: Sequence[Array], block: memoryview) -> int:
    """Write one request's outputs behind their header; return the bytes that it needs."""
    pieces = [_joined(array) if array.dtype == object else _raw(array) for array in arrays]
    header, places, total = signature.answer_header(
        tuple([(len(piece), array.shape) for piece, array in zip(pieces, arrays, strict=True)])
    )
    if total > len(block):
        return total
    block[: len(header)] = header
    for place, piece in zip(places, pieces, strict=True):
        block[place.offset : place.offset + place.nbytes] = piece
    return total


def _raw(array: Array) -> memoryview:
    if not array.flags.c_contiguous or not array.size:
        array = np.ascontiguousarray(array).reshape(-1)
        return array.view(np.uint8).data
    return array.data.cast("B")


def _joined(array: Array) -> bytes:
    parts: list[bytes] = []
    for element in array.reshape(-1):
        data = element.encode() if isinstance(element, str) else bytes(element)
        parts += (_LENGTH.pack(len(data)), data)
    return b"".join(parts)
