"""Which parts lie in a tier, where, and which versions hold each of them.

A part lies in a tier once, however many versions hold it; its place counts them.

    (none) -> held                [hold: bytes are allocated; or it was there: one holder more]
    held -> held                  [let_go, others hold it still]
    held -> (none)                [let_go, the last one]
    held -> orphan -> (none)      [let_go while a load reads or writes it; settle, when that ended]
    orphan -> held                [hold]

On DEVICE a part takes its raw bytes, in HOST what it takes on disk: its packed form, if it has one.

Invariants
 1. The allocator's used bytes are those of the places; no two places share a byte.
 2. Bytes that a version holds, or that a load in flight reads or writes, are never given back.
 3. Bytes that nobody holds and no load needs are given back at once.

Called by `placement` and residency; pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from overcommit.runtime.allocator import ChunkAllocator, Extent
from overcommit.runtime.config import SLAB_MODEL_BYTES_MAX, SMALL_CHUNK_BYTES
from overcommit.runtime.parts import Part, round_up
from overcommit.runtime.residents import Extents, Version


@dataclass(slots=True, frozen=True)
class Forms:
    """In which forms the parts of a tier are, without what their allocations have over."""

    raw_bytes: int = 0  # of all, as they are on DEVICE
    stored_bytes: int = 0  # of all, as they are here
    packed_parts: int = 0

    @classmethod
    def of(cls, several: Iterable[Forms]) -> Forms:
        """Add up those of several tiers."""
        rows = [(each.raw_bytes, each.stored_bytes, each.packed_parts) for each in several]
        return cls(*map(sum, zip(*rows, strict=True)))

    @property
    def ratio(self) -> float:
        """How many times as much is here as would fit raw."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 1.0


@dataclass(slots=True)
class Place:
    """Where a part lies in a tier, and for whom."""

    extents: Extents
    holders: set[Version] = field(default_factory=set)
    is_filled: bool = False  # its bytes are there


class Holdings:
    """The places of one tier."""

    def __init__(self, allocator: ChunkAllocator, *, is_raw: bool = True) -> None:
        self.allocator = allocator
        self.is_raw = is_raw
        self.places: dict[Part, Place] = {}

    def size(self, part: Part) -> int:
        """Bytes of the form that a part has here."""
        return part.nbytes if self.is_raw else part.stored_bytes

    def footprint(self, parts: Iterable[Part]) -> int:
        """Bytes that these take, each in a place of its own."""
        total = 0
        for part in parts:
            size = part.nbytes if self.is_raw else part.stored_bytes
            total += self.allocator.footprint(size)
        return total

    def missing(self, parts: Iterable[Part]) -> list[Part]:
        """Return those that have no place here."""
        return [part for part in parts if part not in self.places]

    def try_hold(self, version: Version, parts: Sequence[Part]) -> bool:
        """Hold all of these, or change nothing."""
        if self.allocator.is_contiguous:
            return self._try_hold_in_one_piece(version, parts)
        places = self.places
        fresh: list[tuple[Part, Extents]] = []
        for part in parts:
            if part in places:
                continue
            # A part with a name may lie before another one in some version, if not in this.
            exact = bool(part.digest) or len(parts) > 1
            extents = self.allocator.try_allocate(self.size(part), exact=exact)
            if extents is None:
                for _, taken in fresh:
                    self.allocator.free(taken)
                return False
            fresh.append((part, extents))
        for part, extents in fresh:
            places[part] = Place(extents)
        for part in parts:
            places[part].holders.add(version)
        return True

    def _try_hold_in_one_piece(self, version: Version, parts: Sequence[Part]) -> bool:
        """Hold all of a version's parts, one behind the other; see `try_hold`."""
        missing = self.missing(parts)
        if missing and len(missing) < len(parts):
            return False  # a load of an earlier try has not ended: what it fills cannot be moved
        if missing:
            # Of all but the last whole chunks: there the next part begins.
            lengths = [round_up(part.nbytes, SMALL_CHUNK_BYTES) for part in missing[:-1]]
            start = sum(lengths)
            extents = self.allocator.try_allocate(start + missing[-1].nbytes)
            if extents is None:
                return False
            ((offset, total),) = extents
            for part, length in zip(missing, [*lengths, total - start], strict=True):
                self.places[part] = Place((Extent(offset, length),))
                offset += length
        for part in parts:
            self.places[part].holders.add(version)
        return True

    def let_go(self, version: Version, parts: Iterable[Part]) -> None:
        """The version holds these no more."""
        for part in parts:
            self.places[part].holders.discard(version)
            self.settle(part)

    def settle(self, part: Part) -> None:
        """Give the part's bytes back if nobody holds them and no load needs them."""
        place = self.places.get(part)
        if place is not None and not place.holders and not part.job:
            del self.places[part]
            self.allocator.free(place.extents)

    # --- asking ---------------------------------------------------------------------------------
    def is_shared(self, part: Part) -> bool:
        """Whether several versions hold it."""
        return len(self.places[part].holders) > 1

    def extents_of(self, parts: Sequence[Part]) -> tuple[Extents, tuple[int, ...]]:
        """Return where these lie, in order, and which of the extents are not for one use alone."""
        extents: list[Extent] = []
        shared: list[int] = []
        for part in parts:
            place = self.places[part]
            if part.digest and (len(place.holders) > 1 or parts.count(part) > 1):
                shared += range(len(extents), len(extents) + len(place.extents))
            extents += place.extents
        return tuple(extents), tuple(shared)

    def unique_bytes(self, parts: Iterable[Part]) -> int:
        """Bytes of those parts that one version alone holds."""
        return sum(part.nbytes for part in parts if not self.is_shared(part))

    def saved_bytes(self) -> int:
        """Bytes that would be taken if every holder had a part of its own, less what is taken."""
        return sum(
            (len(place.holders) - 1) * self.allocator.footprint(self.size(part))
            for part, place in self.places.items()
            if len(place.holders) > 1
        )

    def forms(self) -> Forms:
        """Return in which forms the parts are that are here."""
        packed = 0 if self.is_raw else sum(1 for part in self.places if part.packed_bytes)
        raw = sum(part.nbytes for part in self.places)
        return Forms(raw, sum(self.size(part) for part in self.places), packed)

    def slab_of(self, parts: Iterable[Part]) -> int | None:
        """Return the slab in which one of these lies; at most one can."""
        for part in parts:
            if self.size(part) <= SLAB_MODEL_BYTES_MAX:
                return self.places[part].extents[0].offset // SMALL_CHUNK_BYTES
        return None


class Choice:
    """A set of versions that may leave, and the bytes that they free together.

    A part is freed with the last of its holders: a trunk under many heads frees nothing until all
    of them are chosen.
    """

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._left: dict[Part, int] = {}  # holders that are not chosen
        self.freed = 0

    def add(self, parts: Iterable[Part]) -> None:
        """Choose the version that holds these."""
        for part in parts:
            place = self._holdings.places[part]
            left = self._left.get(part, len(place.holders)) - 1
            self._left[part] = left
            if not left:
                self.freed += self._freed_by(part)

    def loss(self, parts: Iterable[Part]) -> int:
        """Bytes that would not be freed without the chosen version that holds these."""
        return sum(self._freed_by(part) for part in parts if not self._left[part])

    def discard(self, parts: Iterable[Part]) -> None:
        """Choose it no more."""
        for part in parts:
            if not self._left[part]:
                self.freed -= self._freed_by(part)
            self._left[part] += 1

    def _freed_by(self, part: Part) -> int:
        return 0 if part.job else self._holdings.footprint((part,))
