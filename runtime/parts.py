"""Parts: the pieces of an image that versions share, and where an image is cut into them.

An image's payload is one range of addresses.  It is cut into parts, each named by the digest of its
bytes, so that versions with equal parts hold them once: on disk, in HOST and in DEVICE.  What is
left at the end, less than a chunk, is private: it lies in the version's own image file and, where it
is small, in a slab.

Where the cuts are follows from the tensors' names and sizes alone, and each cut only from what lies
before it; so two versions of one architecture are cut alike, whichever is packed first.

    trunk ........................................| head
    |<- part ->|<- part ->|<---- part ---->| (gap) | private, or a part
               ^ a multiple of a chunk              ^ a multiple of a chunk

 * The head is the last top-level module (`classifier`, `fc`, `lm_head`), or the last few if they are
   small, unless it is a large share of the whole (then it is an encoder).  It begins at a chunk of
   its own: the gap before it, less than a chunk, is the price.
 * Inside, cuts fall where a block begins (`encoder.layer.3`), once PART_BYTES_MIN have come together,
   rounded down to a whole chunk: that leaves no gap, and a tensor may lie across the cut, since every
   process maps the parts one after the other.

Invariants
 1. Every part but the last begins at a multiple of SMALL_CHUNK_BYTES and, gap included, ends at one.
 2. A part takes more than a slab's piece: only what is private shares a chunk with other models.
 3. An image of less than SMALL_CHUNK_BYTES has no parts: it costs what it did.

Pure.  Called by the packer (layout), the registry and residency.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from overcommit.runtime.config import (
    PAGE_BYTES,
    PART_BYTES_MIN,
    PART_GROWTH,
    SMALL_CHUNK_BYTES,
    TENSOR_ALIGN_BYTES,
)

SUFFIX: Final = ".part"
PACKED_SUFFIX: Final = ".packed"
HEAD_SHARE: Final = 0.4  # MobileNet's classifier is 0.36 of it, MiniLM's encoder 0.47


class PartInfo(msgspec.Struct, frozen=True, array_like=True):
    """A part, named by its raw content; bytes are multiples of PAGE_BYTES."""

    digest: str
    nbytes: int
    packed_bytes: int = 0  # on disk and in HOST; 0: it is not packed


@dataclass(slots=True, eq=False)
class Part:
    """Bytes that are loaded, placed and given back together; one object, however many share it."""

    digest: str  # "": private to one version
    nbytes: int
    versions: int = 0  # that are known and consist of it
    job: int = 0  # of the load in flight, 0: none
    packed_bytes: int = 0  # 0: it is not packed

    @property
    def stored_bytes(self) -> int:
        """What it takes on disk and in HOST."""
        return self.packed_bytes or self.nbytes


def round_up(nbytes: int, boundary: int) -> int:
    """Return the next multiple of `boundary` that is not below."""
    return -(-nbytes // boundary) * boundary


def private_bytes(nbytes: int, parts: Iterable[PartInfo]) -> int:
    """Return how much of an image of `nbytes` is in none of its parts."""
    return max(0, nbytes - sum(round_up(part.nbytes, SMALL_CHUNK_BYTES) for part in parts))


def path_of(image_path: str | Path, digest: str, *, is_packed: bool = False) -> Path:
    """Return where the part lies: beside the folder of the images."""
    suffix = PACKED_SUFFIX if is_packed else SUFFIX
    return Path(image_path).parent.parent / "parts" / f"{digest}{suffix}"


class PartTable:
    """The parts that can be shared, of every version that is known."""

    def __init__(self, shares: bool = True) -> None:
        """Without `shares` each version has parts of its own, though their bytes are equal."""
        self._shares = shares
        self._parts: dict[tuple[str, int], Part] = {}  # a part that is packed is another one

    def __len__(self) -> int:
        return len(self._parts)

    def parts_of(
        self, nbytes: int, infos: Iterable[PartInfo], packed_bytes: int = 0
    ) -> tuple[Part, ...]:
        """Return the parts of a version that is new here, in order; what is private comes last.

        `packed_bytes` are those of what is private; 0: it is not packed.
        """
        found: list[Part] = []
        for info in infos:
            part = Part(info.digest, info.nbytes, packed_bytes=info.packed_bytes)
            if self._shares:
                part = self._parts.setdefault((info.digest, info.packed_bytes), part)
            assert part.nbytes == info.nbytes, "the digest is of the content"
            part.versions += 1
            found.append(part)
        private = private_bytes(nbytes, infos)
        if private:
            found.append(Part("", private, 1, packed_bytes=packed_bytes))
        return tuple(found)

    def forget(self, parts: Iterable[Part]) -> None:
        """A version with these parts is gone, and holds none of them."""
        for part in parts:
            part.versions -= 1
            if self._shares and part.digest and not part.versions:
                del self._parts[part.digest, part.packed_bytes]


# --- where to cut -------------------------------------------------------------------------------
@dataclass(slots=True, frozen=True)
class Plan:
    """Where tensors and parts lie, in bytes from the start of the payload."""

    offsets: tuple[int, ...]  # of each tensor
    parts: tuple[tuple[int, int], ...]  # (start, bytes), those that can be shared
    nbytes: int  # all of it
    private_bytes: int  # at its end


def plan(tensors: Sequence[tuple[str, int]]) -> Plan:
    """Lay (name, bytes) out in this order and cut; aliases are not among them."""
    names = _without_common_prefix([name.split(".") for name, _ in tensors])
    sizes = [nbytes for _, nbytes in tensors]
    head = _head([name[0] if len(name) > 1 else "" for name in names], sizes)
    offsets, end = _place(sizes[:head], 0)
    if end < SMALL_CHUNK_BYTES:  # no trunk worth a chunk
        head = len(sizes)
        offsets, end = _place(sizes, 0)
    trunk = round_up(end, PAGE_BYTES)
    if trunk < SMALL_CHUNK_BYTES:
        nbytes = max(PAGE_BYTES, trunk)
        return Plan(tuple(offsets), (), nbytes, nbytes)
    parts = _cut([_block(name) for name in names[:head]], offsets, trunk)
    if head == len(sizes):
        return Plan(tuple(offsets), tuple(parts), trunk, 0)
    start = round_up(trunk, SMALL_CHUNK_BYTES)
    more, end = _place(sizes[head:], start)
    nbytes = max(start + PAGE_BYTES, round_up(end, PAGE_BYTES))
    if nbytes - start < SMALL_CHUNK_BYTES:
        return Plan((*offsets, *more), tuple(parts), nbytes, nbytes - start)
    return Plan((*offsets, *more), (*parts, (start, nbytes - start)), nbytes, 0)


def _place(sizes: Iterable[int], at: int) -> tuple[list[int], int]:
    offsets = []
    for size in sizes:
        at = round_up(at, TENSOR_ALIGN_BYTES)
        offsets.append(at)
        at += size
    return offsets, at


def _without_common_prefix(names: list[list[str]]) -> list[list[str]]:
    """Drop leading components that all names have; each keeps one at least."""
    shared = 0
    for column in zip(*(name[:-1] for name in names), strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return [name[shared:] for name in names]


def _head(modules: Sequence[str], sizes: Sequence[int]) -> int:
    """Return the index of the head's first tensor; the number of tensors if there is no head."""
    runs = [list(run) for _, run in itertools.groupby(range(len(sizes)), key=modules.__getitem__)]
    if len(runs) < 2:
        return len(sizes)
    head, nbytes = runs[-1][0], sum(sizes[i] for i in runs[-1])
    if nbytes > HEAD_SHARE * sum(sizes):
        return len(sizes)
    for run in reversed(runs[1:-1]):
        nbytes += sum(sizes[i] for i in run)
        if nbytes >= SMALL_CHUNK_BYTES:
            break
        head = run[0]
    return head


def _block(name: Sequence[str]) -> tuple[str, ...]:
    """Name the block a tensor belongs to: up to the first number, else its module."""
    for index, component in enumerate(name):
        if component.isdecimal():
            return tuple(name[: index + 1])
    return tuple(name[:-1])


def _cut(
    blocks: Sequence[tuple[str, ...]], offsets: Sequence[int], nbytes: int
) -> list[tuple[int, int]]:
    """Cut the bytes before `nbytes` where blocks begin; return (start, bytes) of each part."""
    starts = [0]
    for index in range(1, len(blocks)):
        if blocks[index] == blocks[index - 1]:
            continue
        at = offsets[index] // SMALL_CHUNK_BYTES * SMALL_CHUNK_BYTES
        # A part's least size grows with what lies before it, so that there are never too many.
        if (
            at - starts[-1] >= max(PART_BYTES_MIN, at // PART_GROWTH)
            and nbytes - at >= SMALL_CHUNK_BYTES
        ):
            starts.append(at)
    return [(start, end - start) for start, end in itertools.pairwise([*starts, nbytes])]
