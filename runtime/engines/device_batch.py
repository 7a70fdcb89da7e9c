"""A batch straight from its ingress blocks to the device, and its results straight to the egress blocks.

    blocks --gather, or copies--> device --pictures--> the model --scatter, or copies--> blocks

All tensors of one element size are one launch.  Pieces of COPY_FROM_BYTES and more that need no padding
are copied each, the copy engine does that without the GPU's processors.  What neither can do (texts, sizes
that vary along several axes, blocks that are not registered) is made by the CPU, as where there is no GPU.

Invariants
 1. Whichever way a tensor goes, its bits are those of `assembly.gather` and `assembly.split`.
 2. An egress block is written only up to its length; of one that is too short nothing is written.
 3. Nothing waits; what is returned as kept stays until the stream has done all of it.

Called by `device_runner`, on the stream of the batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from overcommit.kernels.datatypes import bits_of
from overcommit.kernels.gather import Entry
from overcommit.runtime.assembly import check_rows, cuts_of
from overcommit.runtime.config import TensorSpec
from overcommit.runtime.device_limits import COPY_FROM_BYTES, GATHER_ROWS_MAX
from overcommit.runtime.engines.device_kernels import Kernels
from overcommit.runtime.engines.dtypes import torch_dtype, v2_of_torch
from overcommit.runtime.errors import ModelError
from overcommit.runtime.launch import Blocks
from overcommit.runtime.payload import DATATYPES, TensorPlace
from overcommit.runtime.signature import Form

_MOVE_OF_BYTES: Final = {1: "UINT8", 2: "UINT16", 4: "UINT32", 8: "UINT64"}
Shape = tuple[int, ...]


# --- in -----------------------------------------------------------------------------------------
def shapes_of(blocks: Blocks) -> dict[str, Shape]:
    """Return the shape of each input of the batch, as clients give them."""
    shapes: dict[str, Shape] = {}
    for position, place in enumerate(blocks.forms[0].places):
        spec = blocks.signature.inputs[place.index]
        mine = [form.places[position].shape for form in blocks.forms]
        if len(mine) == 1:
            shapes[spec.name] = mine[0]
            continue
        rows = sum(form.rows for form in blocks.forms)
        tails = zip(*(shape[1:] for shape in mine), strict=True)
        shapes[spec.name] = (rows, *(max(sizes) for sizes in tails))
    return shapes


def can_bring(blocks: Blocks) -> bool:
    """Whether the device can fetch the batch by itself."""
    if not blocks.ingress_at:
        return False
    count = 0
    for position, place in enumerate(blocks.forms[0].places):
        spec = blocks.signature.inputs[place.index]
        if spec.datatype == "BYTES":
            return False
        tails = {form.places[position].shape[1:] for form in blocks.forms}
        if len({tail[1:] for tail in tails}) > 1:
            return False  # it varies along other axes than the second
        is_even = len(tails) == 1
        count += len(blocks.forms) if is_even else sum(form.rows for form in blocks.forms)
    return count < GATHER_ROWS_MAX


def bring(
    kernels: Kernels, blocks: Blocks, shapes: Mapping[str, Shape], place: torch.device | str
) -> tuple[dict[str, torch.Tensor], list[object]]:
    """Fetch the inputs, in these shapes: with zeros in the rows beyond the requests'.

    Return them, and what has to be kept.
    """
    tensors: dict[str, torch.Tensor] = {}
    entries: defaultdict[tuple[str, str], list[Entry]] = defaultdict(list)
    for position, first in enumerate(blocks.forms[0].places):
        spec = blocks.signature.inputs[first.index]
        there = torch.empty(shapes[spec.name], dtype=torch_dtype(spec.datatype), device=place)
        tensors[spec.name] = there
        size = DATATYPES[spec.datatype][1]
        move = _MOVE_OF_BYTES[size]
        pair = ("UINT8", "BOOL") if spec.datatype == "BOOL" else (move, move)
        places = [form.places[position] for form in blocks.forms]
        rows = _Rows(spec, size, there, pair[0] == pair[1])
        entries[pair] += rows.entries(kernels, places, blocks)
    kept = [kernels.gather(*pair, mine) for pair, mine in entries.items() if mine]
    for first in blocks.forms[0].places:
        spec = blocks.signature.inputs[first.index]
        if spec.picture is not None:
            kept.append(tensors[spec.name])
            tensors[spec.name] = kernels.normalise(tensors[spec.name], spec.picture)
    return tensors, kept


class _Rows:
    """How one input of a batch is fetched."""

    def __init__(self, spec: TensorSpec, size: int, there: torch.Tensor, can_copy: bool) -> None:
        self._size = size
        self._at = there.data_ptr()
        self._end = self._at + there.numel() * size
        self._tail = tuple(there.shape[1:])
        self._can_copy = can_copy
        self._pad = _pad_bits(spec)

    def entries(
        self, kernels: Kernels, places: Sequence[TensorPlace], blocks: Blocks
    ) -> list[Entry]:
        """Begin the copies; return the rows to gather."""
        entries: list[Entry] = []
        is_even = all(place.shape[1:] == self._tail for place in places)
        for place, block_at in zip(places, blocks.ingress_at, strict=True):
            source = block_at + place.offset
            if is_even:
                if self._can_copy and place.nbytes >= COPY_FROM_BYTES:
                    kernels.copy_in(self._at, source, place.nbytes)
                elif place.nbytes:
                    count = place.nbytes // self._size
                    entries.append((source, 1, 1, count, 0, self._at, 0, 0))
                self._at += place.nbytes
                continue
            length, longest = place.shape[1], self._tail[0]
            width = math.prod(self._tail[1:])
            for _ in range(place.shape[0]):
                entries.append((source, length, longest, width, self._pad, self._at, 0, 0))
                source += length * width * self._size
                self._at += longest * width * self._size
        if self._at < self._end:  # rows that only fill a bucket
            entries.append((0, 0, 1, (self._end - self._at) // self._size, 0, self._at, 0, 0))
        return entries


def _pad_bits(spec: TensorSpec) -> int:
    pad = spec.pad or 0.0
    if spec.datatype == "BOOL":
        return int(bool(pad))
    # As NumPy puts it into an array of whole numbers.
    is_whole = spec.datatype.startswith(("INT", "UINT"))
    if spec.datatype == "BF16":
        return bits_of(pad, "FP32") >> 16
    return bits_of(int(pad) if is_whole else pad, spec.datatype)


# --- out ----------------------------------------------------------------------------------------
def send(
    kernels: Kernels, blocks: Blocks, outputs: Mapping[str, Any]
) -> tuple[list[int], list[object]] | None:
    """Write each request's part of the outputs into its egress block.

    Return the bytes that each needs, and what has to be kept; None, and nothing begun, where the CPU has
    to do it.  Raises ModelError for outputs that are not what the signature says.
    """
    if not blocks.egress_at:
        return None
    signature, forms = blocks.signature, blocks.forms
    tensors: list[torch.Tensor] = []
    for spec in signature.outputs:
        tensor = outputs.get(spec.name)
        if not isinstance(tensor, torch.Tensor) or not kernels.is_there(tensor):
            return None
        if v2_of_torch(tensor.dtype) != spec.datatype:
            raise ModelError(
                f"output '{spec.name}' is {v2_of_torch(tensor.dtype)}, the model's config says "
                f"{spec.datatype}"
            )
        tensors.append(tensor.detach().resolve_conj().resolve_neg().contiguous())
    cuts: dict[int, int] = {}
    check_rows(signature, tensors, forms)
    if len(forms) > 1:
        found = cuts_of(signature, tensors, forms)
        cuts = {number: position for number, axis, position in found if axis == 1}
        if len(cuts) < len(found):
            return None  # more than the second axis is cut
    results = [_Result(tensor, cuts.get(number)) for number, tensor in enumerate(tensors)]
    if sum(result.count(forms) for result in results) > GATHER_ROWS_MAX:
        return None
    return _scatter(kernels, blocks, results, tensors)


def _scatter(
    kernels: Kernels, blocks: Blocks, results: Sequence[_Result], tensors: Sequence[torch.Tensor]
) -> tuple[list[int], list[object]]:
    needs: list[int] = []
    entries: defaultdict[str, list[Entry]] = defaultdict(list)
    is_one = len(blocks.forms) == 1
    at = 0
    for form, block, block_at in zip(blocks.forms, blocks.egress, blocks.egress_at, strict=True):
        shapes = [result.shape(form, is_one) for result in results]
        header, places, total = blocks.signature.answer_header(
            tuple(
                (math.prod(shape) * result.size, shape)
                for shape, result in zip(shapes, results, strict=True)
            )
        )
        needs.append(total)
        if total <= len(block):
            block[: len(header)] = header
            for place, result in zip(places, results, strict=True):
                rows = result.entries(kernels, at, place, block_at + place.offset)
                entries[_MOVE_OF_BYTES[result.size]] += rows
        at += form.rows
    kept: list[object] = [
        kernels.scatter(move, move, mine) for move, mine in entries.items() if mine
    ]
    return needs, [*kept, *tensors]


class _Result:
    """One output of a batch; `position`: which ragged size its second axis is cut to."""

    def __init__(self, tensor: torch.Tensor, position: int | None) -> None:
        self._at = tensor.data_ptr()
        self._shape = tuple(tensor.shape)
        self._position = position
        self.size = tensor.element_size()
        self._row_bytes = math.prod(self._shape[1:]) * self.size

    def count(self, forms: Sequence[Form]) -> int:
        """Rows that a launch would have for it, at most."""
        return len(forms) if self._position is None else sum(form.rows for form in forms)

    def shape(self, form: Form, is_one: bool) -> Shape:
        """Return the shape of one request's part."""
        if is_one:
            return self._shape
        if self._position is None:
            return (form.rows, *self._shape[1:])
        return (form.rows, form.sizes[self._position], *self._shape[2:])

    def entries(self, kernels: Kernels, row: int, place: TensorPlace, target: int) -> list[Entry]:
        """Begin a copy, or return the rows to scatter."""
        source = self._at + row * self._row_bytes
        if not place.nbytes:
            return []
        if self._position is None:
            if place.nbytes >= COPY_FROM_BYTES:
                kernels.copy_out(target, source, place.nbytes)
                return []
            return [(source, place.nbytes // self.size, target)]
        mine = place.nbytes // place.shape[0]
        return [
            (source + n * self._row_bytes, mine // self.size, target + n * mine)
            for n in range(place.shape[0])
        ]
