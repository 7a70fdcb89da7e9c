"""The bytes inside an ingress or egress block: tensors with their shapes.

A block holds a header of int64 words in native order, then the tensors, each at a 64-byte
boundary:

    [count, reserved, then per tensor: index, dtype code, offset, nbytes, rank, dim 0, ...]

`index` is the tensor's place in the version's inputs (outputs), `offset` is relative to the block.
A block never leaves the host.  Bytes of a block come from a peer process: `decode` checks every
word against the block's length before anything is read, and raises `ProtocolError`.

Invariants
 1. `decode(encode(tensors))` gives the same tensors.
 2. No offset, length, rank or dimension that decode returns lies outside the block or its limits.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from overcommit.runtime.config import RANK_MAX, TENSORS_MAX
from overcommit.runtime.errors import ProtocolError

WORD_BYTES: Final = 8
TENSOR_BOUNDARY_BYTES: Final = 64

# V2 datatype -> (code, bytes per element).  BYTES has none: its elements carry their length.
DATATYPES: Final[dict[str, tuple[int, int]]] = {
    "BOOL": (1, 1),
    "UINT8": (2, 1),
    "UINT16": (3, 2),
    "UINT32": (4, 4),
    "UINT64": (5, 8),
    "INT8": (6, 1),
    "INT16": (7, 2),
    "INT32": (8, 4),
    "INT64": (9, 8),
    "FP16": (10, 2),
    "FP32": (11, 4),
    "FP64": (12, 8),
    "BF16": (13, 2),
    "BYTES": (14, 0),
}
DATATYPE_OF_CODE: Final[dict[int, str]] = {code: name for name, (code, _) in DATATYPES.items()}


@dataclass(slots=True, frozen=True)
class TensorPlace:
    """Where one tensor lies in its block: bytes `[offset, offset + nbytes)`."""

    index: int
    datatype: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]


def align(nbytes: int) -> int:
    """Round up to the next tensor boundary."""
    return (nbytes + TENSOR_BOUNDARY_BYTES - 1) & ~(TENSOR_BOUNDARY_BYTES - 1)


def header_bytes(ranks: Sequence[int]) -> int:
    """Bytes of the header of a block with tensors of these ranks, up to the first tensor."""
    return align(WORD_BYTES * (2 + sum(5 + rank for rank in ranks)))


def plan(
    tensors: Sequence[tuple[int, str, int, tuple[int, ...]]],
) -> tuple[tuple[TensorPlace, ...], int]:
    """Lay out tensors given as (index, datatype, nbytes, shape); also return the block's bytes."""
    offset = header_bytes([len(shape) for _, _, _, shape in tensors])
    places = []
    for index, datatype, nbytes, shape in tensors:
        places.append(TensorPlace(index, datatype, offset, nbytes, shape))
        offset += align(nbytes)
    return tuple(places), offset


def encode(block: memoryview, places: Sequence[TensorPlace]) -> None:
    """Write the header for `places` at the start of the block."""
    words: list[int] = [len(places), 0]
    for place in places:
        code = DATATYPES[place.datatype][0]
        words += (place.index, code, place.offset, place.nbytes, len(place.shape), *place.shape)
    struct.pack_into(f"={len(words)}q", block, 0, *words)


def decode(block: memoryview) -> tuple[TensorPlace, ...]:
    """Read the header of a block that a peer has written.

    Raises ProtocolError when a word is out of bounds.
    """
    limit = len(block)
    if limit < 2 * WORD_BYTES:
        raise ProtocolError(f"a payload of {limit} bytes is shorter than its header")
    words = block[: limit - limit % WORD_BYTES].cast("q")
    count = words[0]
    if not 0 <= count <= TENSORS_MAX:
        raise ProtocolError(f"a payload claims {count} tensors, the limit is {TENSORS_MAX}")
    places = []
    at = 2
    for _ in range(count):
        if at + 5 > len(words):
            raise ProtocolError("a payload ends inside its header")
        index, code, offset, nbytes, rank = words[at : at + 5].tolist()
        at += 5
        datatype = DATATYPE_OF_CODE.get(code)
        if datatype is None or not 0 <= rank <= RANK_MAX or at + rank > len(words):
            raise ProtocolError(f"a payload names datatype {code} of rank {rank}")
        shape = tuple(words[at : at + rank].tolist())
        at += rank
        if index < 0 or offset < 0 or nbytes < 0 or offset + nbytes > limit:
            raise ProtocolError(f"tensor {index} lies outside its payload of {limit} bytes")
        elements = 1
        for dimension in shape:
            if dimension < 0:
                raise ProtocolError(f"tensor {index} has a negative dimension")
            elements *= dimension
        size = DATATYPES[datatype][1]
        if size and elements * size != nbytes:
            raise ProtocolError(f"tensor {index} has {nbytes} bytes, its shape needs another count")
        places.append(TensorPlace(index, datatype, offset, nbytes, shape))
    return tuple(places)
