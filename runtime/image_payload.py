"""The bytes of an image while it is written, tensors and the gaps between them.

Invariants
 1. Any stretch can be had more than once, and is the same each time.
 2. What is given are the table's tensors, all of them, in its order and where `parts.plan` puts them.

Called by `image`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from overcommit.kernels import _digest
from overcommit.runtime.config import READ_BYTES
from overcommit.runtime.errors import ImageError
from overcommit.runtime.parts import plan

if TYPE_CHECKING:
    from overcommit.runtime.image import ImageHeader, TensorEntry

WORD_BYTES: Final = 8  # of a digest


class Payload:
    """The bytes of an image, gaps included, of which any stretch can be had more than once."""

    def __init__(
        self,
        header: ImageHeader,
        tensors: Iterable[tuple[TensorEntry, memoryview]],
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        """Raise ImageError for tensors that are not the table's: one must not become zeros."""
        self._given: list[tuple[int, memoryview]] = []
        wanted = [entry for entry in header.tensors if entry.alias_of is None]
        expected = iter(wanted)
        for entry, data in tensors:
            if entry != next(expected, None):
                raise ImageError(f"tensor '{entry.name}' is not the next one of the table")
            if data.nbytes != entry.nbytes:
                raise ImageError(
                    f"tensor '{entry.name}' has {data.nbytes} bytes, its entry says {entry.nbytes}"
                )
            self._given.append((entry.offset, data))
        if (missing := next(expected, None)) is not None:
            raise ImageError(f"tensor '{missing.name}' was not given")
        self.plan = plan([(entry.name, entry.nbytes) for entry in wanted])
        offsets = tuple(entry.offset for entry in wanted)
        if self.plan.offsets != offsets or self.plan.nbytes != header.nbytes:
            raise ImageError("the tensors do not lie where `lay_out` puts them")
        self._total = header.nbytes
        self._on_progress = on_progress

    def digest(self, start: int, nbytes: int) -> str:
        """Name these bytes."""
        digest = hashlib.blake2b(digest_size=20)
        for piece in self.pieces(start, nbytes):
            digest.update(piece)
        return digest.hexdigest()

    def content_digest(self) -> int:
        """Digest all of it; a word may begin in a tensor and end in the gap behind it."""
        total = at = 0
        begun = b""
        for piece in self.pieces(0, self._total):
            if begun:
                missing = WORD_BYTES - len(begun)
                begun, piece = begun + bytes(piece[:missing]), piece[missing:]
                if len(begun) < WORD_BYTES:
                    continue
                total += _digest.digest(begun, at // WORD_BYTES)
                at += WORD_BYTES
            whole = len(piece) // WORD_BYTES * WORD_BYTES
            total += _digest.digest(piece[:whole], at // WORD_BYTES)
            at, begun = at + whole, bytes(piece[whole:])
        assert not begun, "a range is whole pages"
        return total & ((1 << 64) - 1)

    def pieces(self, start: int, nbytes: int) -> Iterator[memoryview]:
        """Yield the bytes [start, start + nbytes) in order, zeros between tensors."""
        at, end = start, start + nbytes
        for offset, data in self._given:
            first, last = max(at, offset), min(end, offset + data.nbytes)
            if first < last:
                yield from _zeros(first - at)
                yield data[first - offset : last - offset]
                at = last
        yield from _zeros(end - at)

    def told(self, start: int, nbytes: int) -> Iterator[memoryview]:
        """As `pieces`, and report on the way: a part may be gigabytes, and so may a tensor."""
        for piece in self.pieces(start, nbytes):
            for at in range(0, len(piece), READ_BYTES):
                data = piece[at : at + READ_BYTES]
                yield data
                start += len(data)
                self.tell(start)

    def tell(self, done: int) -> None:
        """Report how far it is."""
        if self._on_progress is not None:
            self._on_progress(done, self._total)


def _zeros(nbytes: int) -> Iterator[memoryview]:
    zeros = memoryview(bytes(min(nbytes, 1 << 16)))
    while nbytes:
        yield zeros[:nbytes]
        nbytes -= min(nbytes, len(zeros))
