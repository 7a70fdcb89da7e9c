"""What a version's requests must look like, and which of them can share a batch.

Owns the checked form of every request header seen lately, and the headers of answers: a front end
writes the same header for the same shapes, so a look-up by its bytes (0.2 us) replaces decoding and
checking it (5 us and up).

Requests can share a batch when they have the same inputs and the same sizes beyond the batch axis.
A named axis may differ (is ragged) when `pad` is set on every input that has it: it is then padded
to the longest of the batch, and outputs with an axis of that name are cut back.  An axis without a
name, or a version with an output whose size varies along an axis without a name, is never padded:
nobody could tell the padding from the answer.

Invariants
 1. Requests with equal `key` can be gathered into one array per input.
 2. A request's answer does not depend on what it shares a batch with: all of its inputs agree on
    the size of each ragged axis, so it is padded the same way everywhere.
 3. A key is never given to two different shapes in the life of the signature.

Pure.  Called by the worker when it takes a request, and by assembly.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np

from overcommit.runtime import payload
from overcommit.runtime.config import ModelConfig, TensorSpec
from overcommit.runtime.errors import BadRequest, ModelError
from overcommit.runtime.payload import TensorPlace

FORMS_MAX: Final = 256  # remembered headers of one version

NUMPY_TYPES: Final[dict[str, np.dtype[np.generic]]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BF16": np.dtype(np.uint16),  # numpy has no such type: the bits travel
    "BYTES": np.dtype(object),
}


_shared: weakref.WeakValueDictionary[bytes, Signature] = weakref.WeakValueDictionary()


def signature_of(config: ModelConfig) -> Signature:
    """Return the signature of a config: one object for all versions that take and give the same.

    A fine-tune per customer is thousands of versions of one shape; what they share stays in the
    processor's cache.
    """
    batches = config.batching.max_batch_size > 0
    key = msgspec.msgpack.encode((config.inputs, config.outputs, batches))
    signature = _shared.get(key)
    if signature is None:
        signature = _shared[key] = Signature(config)
    return signature


@dataclass(slots=True, frozen=True)
class Form:
    """One request's tensors, checked against the version's signature."""

    places: tuple[TensorPlace, ...]  # by input index
    rows: int  # along the batch axis; 1 where the version does not batch
    row_bytes: int
    key: int  # equal: can share a batch
    sizes: tuple[int, ...]  # of the ragged axes, in the order of `Signature.ragged`
    end: int  # bytes of the block that hold it
    shapes: Hashable = field(init=False)  # equal, for one signature: the same shapes throughout

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", (self.key, self.rows, self.sizes))


def shares_form(one: Form | None, other: Form | None) -> bool:
    """Whether two requests of one signature have the same shapes throughout."""
    if one is other:
        return one is not None
    if one is None or other is None:
        return False
    return one.shapes == other.shapes


class Signature:
    """Inputs and outputs of one version, and whether it batches."""

    def __init__(self, config: ModelConfig) -> None:
        self.inputs = config.inputs
        self.outputs = config.outputs
        self.batches = config.batching.max_batch_size > 0
        self.ragged: tuple[str, ...] = self._find_ragged() if self.batches else ()
        self.required = frozenset(
            index for index, spec in enumerate(config.inputs) if not spec.optional
        )
        self._forms: dict[bytes, Form] = {}
        self._answers: dict[object, tuple[bytes, tuple[TensorPlace, ...], int]] = {}
        self._header_bytes = 0  # of the request seen last: the next one is most likely as long
        self._keys: dict[Hashable, int] = {}
        self._next_key = itertools.count()

    def read(self, block: memoryview) -> Form:
        """Read and check the header of an ingress block.

        Raises ProtocolError when the header lies about its block (the front end's fault),
        BadRequest when the tensors are not what this version takes.
        """
        form = self._forms.get(bytes(block[: self._header_bytes]))
        if form is not None and form.end <= len(block):
            return form
        form = self._check(payload.decode(block))
        if len(self._forms) >= FORMS_MAX:
            self._forms.clear()
            self._keys.clear()  # numbers go on: a key that is still in a lane is not given again
        # Without the padding up to the first tensor: what lies there is left from other requests.
        words = 2 + sum(5 + len(place.shape) for place in form.places)
        self._header_bytes = words * payload.WORD_BYTES
        self._forms[bytes(block[: self._header_bytes])] = form
        return form

    def answer_header(
        self, sizes: tuple[tuple[int, tuple[int, ...]], ...]
    ) -> tuple[bytes, tuple[TensorPlace, ...], int]:
        """Lay out an answer whose outputs have these (bytes, shape); also return all its bytes.

        Raises ModelError when one has not the shape that the model's configuration declares.
        """
        answer = self._answers.get(sizes)
        if answer is None:
            for spec, (_, shape) in zip(self.outputs, sizes, strict=True):
                self._check_declared(spec, shape)
            specs = enumerate(zip(self.outputs, sizes, strict=True))
            places, total = payload.plan(
                [(index, spec.datatype, *size) for index, (spec, size) in specs]
            )
            header = bytearray(payload.header_bytes([len(place.shape) for place in places]))
            payload.encode(memoryview(header), places)
            if len(self._answers) >= FORMS_MAX:
                self._answers.clear()
            answer = self._answers[sizes] = bytes(header), places, total
        return answer

    def axis_of(self, spec: TensorSpec, name: str) -> int | None:
        """Which axis of a tensor has this name, beyond the batch axis."""
        for axis, other in enumerate(spec.axes):
            if axis and other == name:
                return axis
        return None

    # --- inside ---------------------------------------------------------------------------------
    def _check_declared(self, spec: TensorSpec, shape: tuple[int, ...]) -> None:
        if not (want := spec.declared):
            return
        # The batch's axis has the rows of the request, which `assembly` looks at.
        is_right = len(shape) == len(want) and all(
            size in (-1, got) or (self.batches and not axis)
            for axis, (size, got) in enumerate(zip(want, shape, strict=True))
        )
        if not is_right:
            raise ModelError(
                f"output '{spec.name}' has shape {list(shape)}, the model's config says {list(want)}"
            )

    def _find_ragged(self) -> tuple[str, ...]:
        if any(self._unnamed(spec) for spec in self.outputs):
            return ()
        padded: dict[str, bool] = {}
        for spec in self.inputs:
            for axis in self._varying(spec):
                name = spec.axes[axis] if axis < len(spec.axes) else None
                if name is not None:
                    padded[name] = padded.get(name, True) and spec.pad is not None
        return tuple(sorted(name for name, all_padded in padded.items() if all_padded))

    @staticmethod
    def _varying(spec: TensorSpec) -> list[int]:
        return [axis for axis, size in enumerate(spec.shape) if axis and size < 0]

    def _unnamed(self, spec: TensorSpec) -> bool:
        return any(axis >= len(spec.axes) or not spec.axes[axis] for axis in self._varying(spec))

    def _check(self, places: tuple[TensorPlace, ...]) -> Form:
        places = tuple(sorted(places, key=lambda place: place.index))
        present = [place.index for place in places]
        for index in present:
            if index >= len(self.inputs) or present.count(index) > 1:
                raise BadRequest(f"input {index} is unknown or given twice")
        missing = self.required.difference(present)
        if missing:
            names = ", ".join(f"'{self.inputs[index].name}'" for index in sorted(missing))
            raise BadRequest(f"input {names} is missing")
        sizes: dict[str, int] = {}
        shapes = [self._check_place(place, sizes) for place in places]
        rows = 1
        if self.batches and places:
            rows = places[0].shape[0]
            if any(place.shape[0] != rows for place in places):
                raise BadRequest("the inputs differ in the size of their first axis, the batch")
        key: Hashable = tuple(zip(present, shapes, strict=True))
        number = self._keys.get(key)
        if number is None:
            number = self._keys[key] = next(self._next_key)
        total = sum(place.nbytes for place in places)
        ends = [place.offset + place.nbytes for place in places]
        return Form(
            places=places,
            rows=rows,
            row_bytes=total // max(1, rows),
            key=number,
            sizes=tuple(sizes.get(name, 0) for name in self.ragged),
            end=max(ends, default=0),
        )

    def _check_place(self, place: TensorPlace, sizes: dict[str, int]) -> tuple[int, ...]:
        """Check one tensor; return the part of its shape that must be equal within a batch."""
        spec = self.inputs[place.index]
        if place.datatype != spec.datatype:
            raise BadRequest(
                f"input '{spec.name}' is {place.datatype}, the model takes {spec.datatype}"
            )
        shape = place.shape
        if len(shape) != len(spec.shape) or any(
            want not in (-1, size) for want, size in zip(spec.shape, shape, strict=True)
        ):
            raise BadRequest(
                f"input '{spec.name}' has shape {list(shape)}, the model takes {list(spec.shape)}"
            )
        fixed = list(shape)
        for name in self.ragged:
            axis = self.axis_of(spec, name)
            if axis is None:
                continue
            if sizes.setdefault(name, shape[axis]) != shape[axis]:
                raise BadRequest(
                    f"axis {axis} ('{name}') of input '{spec.name}' has size {shape[axis]}, of "
                    f"another input {sizes[name]}"
                )
            fixed[axis] = -1
        return tuple(fixed[1:] if self.batches else fixed)
