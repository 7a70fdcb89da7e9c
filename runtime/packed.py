"""The packed form of a payload: pieces of `kernels.unpack`, one behind the other.

A payload, cut into pieces of READ_BYTES, is packed piece by piece.  Each packed piece stands for itself: its
head says how long it is, packed and raw, and what digest its raw bytes have; it is padded to whole
pages.  So a reader reads a piece in one go, where a copy of the payload lies in HOST its pieces are
found from head to head, and any run of a piece's blocks can be decoded alone.

    file, HOST   | head blocks pad | head blocks pad | ...      pieces, at most PIECE_BYTES_MAX each
    DEVICE       | READ_BYTES      | READ_BYTES      | ...      raw

A payload is packed as a whole or not at all: `is_worth` looks at a sample, `worth_bytes` says what its
packed form may take at most.

Invariants
 1. What a piece's head says is checked before it is used: heads lie in memory that a load has filled.
 2. A piece decodes to the bytes that it was made of, or its digest tells.

Called by `image` (pieces out of tensors), by `loading` and the copiers (back).  Imports no NumPy: the mover
needs none.
"""

from __future__ import annotations

import bisect
import itertools
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from overcommit.kernels import _digest, _unpack
from overcommit.runtime import _shm
from overcommit.runtime.config import (
    PACK_RATIO_MIN,
    PACK_SAMPLE_BYTES,
    PACK_SAMPLES,
    PAGE_BYTES,
    PIECE_BYTES_MAX,
    READ_BYTES,
)
from overcommit.runtime.errors import ImageError

Span = tuple[int, int]  # address, length

MAGIC: Final = 0x314B434150434F00
BLOCK_BYTES: Final = _unpack.BLOCK_BYTES
_HEAD: Final = struct.Struct("<QQQIIQ")  # magic, raw bytes, packed bytes, blocks, tables, digest
_DIGEST_AT: Final = 32

assert READ_BYTES % BLOCK_BYTES == 0


@dataclass(slots=True, frozen=True)
class Head:
    """What a packed piece says of itself."""

    nbytes: int  # raw
    stored_bytes: int  # with the padding
    digest: int  # of the raw bytes

    @classmethod
    def parse(cls, head: memoryview) -> Head:
        """Read the first bytes of a piece.  Raises ImageError for what is none."""
        if len(head) >= _HEAD.size:
            magic, nbytes, total, _, _, digest = _HEAD.unpack_from(head)
            stored = -(-total // PAGE_BYTES) * PAGE_BYTES
            if magic == MAGIC and 0 < nbytes <= READ_BYTES and 0 < stored <= PIECE_BYTES_MAX:
                return cls(nbytes, stored, digest)
        raise ImageError("a piece of packed weights does not begin as one")


# --- packing ------------------------------------------------------------------------------------
def pack_piece(raw: memoryview | bytearray) -> bytearray:
    """Pack at most READ_BYTES; return whole pages."""
    assert 0 < len(raw) <= READ_BYTES
    piece = bytearray(_unpack.encode(raw))
    struct.pack_into("<Q", piece, _DIGEST_AT, _digest.digest(raw, 0))
    piece += bytes(-len(piece) % PAGE_BYTES)
    assert len(piece) <= PIECE_BYTES_MAX
    return piece


def pieces_of(parts: Iterable[memoryview]) -> Iterator[bytearray]:
    """Pack a payload that comes in stretches of any length."""
    raw = bytearray()
    for part in parts:
        while part:
            taken = part[: READ_BYTES - len(raw)]
            raw += taken
            part = part[len(taken) :]
            if len(raw) == READ_BYTES:
                yield pack_piece(raw)
                raw = bytearray()
    if raw:
        yield pack_piece(raw)


def worth_bytes(nbytes: int) -> int:
    """Return what the packed form of so many bytes may take, so that it is used: whole pages."""
    return int(nbytes / PACK_RATIO_MIN) // PAGE_BYTES * PAGE_BYTES


def is_worth(nbytes: int, read: Callable[[int, int], Iterable[memoryview]]) -> bool:
    """Say from a sample whether to try to pack a payload; `read(start, nbytes)` gives its bytes."""
    if nbytes <= PACK_SAMPLES * PACK_SAMPLE_BYTES:
        return worth_bytes(nbytes) > 0
    step = nbytes // PACK_SAMPLES // BLOCK_BYTES * BLOCK_BYTES
    samples = (b"".join(read(number * step, PACK_SAMPLE_BYTES)) for number in range(PACK_SAMPLES))
    packed = sum(len(_unpack.encode(sample)) for sample in samples)
    return packed * PACK_RATIO_MIN <= PACK_SAMPLES * PACK_SAMPLE_BYTES


# --- where the pieces are -----------------------------------------------------------------------
class Pieces:
    """Where each piece of a packed payload lies in it."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._starts = tuple(itertools.accumulate(sizes, initial=0))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def of(self, start: int) -> tuple[int, int]:
        """Return (start, bytes) of the piece that holds this raw byte."""
        piece = start // READ_BYTES
        return self._starts[piece], self._starts[piece + 1] - self._starts[piece]


def find_pieces(extents: Sequence[Span], nbytes: int) -> Pieces:
    """Go from head to head through a packed payload of `nbytes` raw ones that lies at these addresses.

    Raises ImageError when it is not what lies there.
    """
    ends = list(itertools.accumulate(length for _, length in extents))
    sizes: list[int] = []
    at = raw = 0
    while raw < nbytes:
        index = bisect.bisect_right(ends, at)
        if index == len(ends):
            raise ImageError("packed weights end before their last piece")
        address, length = extents[index]
        inside = at - (ends[index] - length)
        # Pieces and extents begin at pages: a head never lies across two extents.
        head = Head.parse(_shm.view(address + inside, min(_HEAD.size, length - inside), False))
        if head.nbytes != min(READ_BYTES, nbytes - raw):
            raise ImageError("a piece of packed weights is not as long as it should be")
        sizes.append(head.stored_bytes)
        at, raw = at + head.stored_bytes, raw + head.nbytes
    if at > ends[-1]:
        raise ImageError("packed weights end inside their last piece")
    return Pieces(sizes)


def unpack_payload(data: bytes, sizes: Sequence[int], nbytes: int) -> bytearray:
    """Decode a packed payload in ordinary memory.  Raises ImageError."""
    raw = bytearray(nbytes)
    at = 0
    for number, size in enumerate(sizes):
        piece = memoryview(data)[at : at + size]
        target = memoryview(raw)[number * READ_BYTES : (number + 1) * READ_BYTES]
        head = Head.parse(piece)
        try:
            _unpack.decode(piece, target, 0, -(-len(target) // BLOCK_BYTES))
        except ValueError as error:
            raise ImageError(f"packed weights cannot be decoded: {error}") from error
        if _digest.digest(target, 0) != head.digest:
            raise ImageError("packed weights were not decoded to what they were packed from")
        at += size
    return raw


# --- decoding -----------------------------------------------------------------------------------
def blocks_of(targets: Sequence[Span]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (address, bytes, first block, blocks) for targets that are decoded one after the other.

    All but the last are whole blocks.
    """
    first = 0
    for address, nbytes in targets:
        count = -(-nbytes // BLOCK_BYTES)
        yield address, nbytes, first, count
        assert nbytes % BLOCK_BYTES == 0 or address == targets[-1][0], "a block would be torn"
        first += count


def decode(source: Span, targets: Sequence[Span], first: int) -> None:
    """Decode blocks of one piece, from block `first` on, in this thread, without the GIL.

    Raises ImageError for what cannot be decoded.
    """
    piece = _shm.view(*source, False)
    try:
        for address, nbytes, block, count in blocks_of(targets):
            _unpack.decode(piece, _shm.view(address, nbytes, True), first + block, count)
    except ValueError as error:
        raise ImageError(f"packed weights cannot be decoded: {error}") from error


def check_decoded(head: Head, targets: Sequence[Span]) -> None:
    """Hold what a whole piece was decoded to against its digest.  Raises ImageError."""
    total = at = 0
    for address, nbytes in targets:
        total += _digest.digest(_shm.view(address, nbytes, False), at // 8)
        at += nbytes
    if at != head.nbytes or total & ((1 << 64) - 1) != head.digest:
        raise ImageError("packed weights were not decoded to what they were packed from")
