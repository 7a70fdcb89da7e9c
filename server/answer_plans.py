"""How the answers of a version are written as JSON: what stands between their numbers.

Which outputs there are, and where, is the same in most answers of all versions of one shape; so what
stands between the numbers is written once, and kept by `plans.py`.

Invariants
 1. A plan says nothing of a version but its shape; labels of classes are the version's own.

Pure; called by `plans`, and read by `inference`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from overcommit.runtime.config import TensorSpec
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.payload import DATATYPES, TensorPlace
from overcommit.server import codec
from overcommit.server.classification import Classes

# How an output is wanted: binary or not (None: as the request says for all), its highest values alone,
# both, or in a region of the client's (`Prepared.held` has it: plans outlive requests).
Want = bool | Literal["region"] | tuple[Classes, bool | None] | None
Selection = tuple[tuple[str, Want], ...] | None  # outputs that are asked for; None: all
Classify = Callable[[memoryview], list[bytes]]  # an output's bytes -> its classes

SHORT_NUMBERS_MIN = 64  # FP32 from here on is written by the array; a list is as fast for few
UNPACK_NUMBERS_MAX = 4096  # at once, by a format of their own; half as dear for few


@dataclass(slots=True, frozen=True)
class Part:
    """One output: the JSON before its numbers, and where its bytes lie."""

    prefix: bytes
    name: str
    datatype: str
    start: int
    end: int
    is_binary: bool
    unpack: Callable[[memoryview, int], object] | None  # its numbers, for `codec.encode`
    to_region: bool = False  # it goes into shared memory, and `prefix` is all of its JSON
    classes: Classify | None = None  # these are wanted of its values


@dataclass(slots=True, frozen=True)
class OutputPlan:
    """The pieces of an answer's JSON after the route's `answer_head`; `tail` follows the last."""

    parts: tuple[Part, ...]
    tail: bytes


Outputs = dict[tuple[bytes, Selection, bool], OutputPlan]  # by header, what is wanted, and how


def write_plan(
    specs: Sequence[TensorSpec],
    places: tuple[TensorPlace, ...],
    selection: Selection,
    all_binary: bool,
    classes_of: Callable[[TensorPlace, int], tuple[Classify, tuple[int, ...]]],
) -> OutputPlan:
    """Write the plan of an answer whose outputs lie in these places.

    `classes_of` says how so many classes of an output are found, and their shape.  Raises ProtocolError.
    """
    wanted = None if selection is None else dict(selection)
    encode = codec.encode
    before = b',"outputs":['
    parts: list[Part] = []
    for place in places:
        if place.index >= len(specs):
            raise ProtocolError(f"an answer has output {place.index}, which nobody knows")
        name = specs[place.index].name
        own: Want = None
        if wanted is not None:
            if name not in wanted:
                continue
            own = wanted[name]
        binary = own[1] if isinstance(own, tuple) else own
        is_binary = binary if isinstance(binary, bool) else all_binary
        datatype, shape = place.datatype, place.shape
        classes = None
        if isinstance(own, tuple):
            classes, shape = classes_of(place, own[0].count)
            datatype = "BYTES"
        before += b'{"name":%b,"datatype":%b,"shape":%b' % (
            *(encode(name), encode(datatype), encode(shape)),
        )
        if own == "region":
            end = place.offset + place.nbytes
            parts.append(Part(before, name, datatype, place.offset, end, False, None, True))
            before = b"},"
            continue
        before += b","
        if classes is not None:
            pass  # what follows depends on the values
        elif is_binary:
            before += b'"parameters":{"binary_data_size":%d}' % place.nbytes
        else:
            before += b'"data":'
        end = place.offset + place.nbytes
        unpack = None if is_binary or classes is not None else _unpack(place)
        parts.append(
            Part(before, name, datatype, place.offset, end, is_binary, unpack, False, classes)
        )
        before = b"},"
    return OutputPlan(tuple(parts), b"}]" if parts else before + b"]")


def _unpack(place: TensorPlace) -> Callable[[memoryview, int], object] | None:
    code = codec.CODES.get(place.datatype)
    if code is None:
        return None
    count = place.nbytes // DATATYPES[place.datatype][1]
    if place.datatype == "FP32" and count >= SHORT_NUMBERS_MIN:
        return lambda view, start: codec.encode_fp32(view[start : start + place.nbytes])
    if count <= UNPACK_NUMBERS_MAX:
        return struct.Struct(f"<{count}{code}").unpack_from

    return lambda view, start: codec.encode_data(view[start : start + place.nbytes], place.datatype)
