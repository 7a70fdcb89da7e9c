"""Where in this process the page tables of an arena's chunks are, so that they move with the chunks.

Mapping a chunk is cheap; making its page tables is not: 90 us a MiB with MAP_POPULATE, 60 us when the
first batch takes the faults.  But a chunk that holds other weights now is the same memory as before:
`mremap` moves its page tables to the address of the version that has it now, which takes 5 us for
8 MiB and 16 us for 64 MiB (measured; the kernel moves whole tables where both ends are 2 MiB aligned).
What is left behind is PROT_NONE.

Chunks of a part that several versions hold are in all their ranges at once: these are mapped plainly,
each version pays for its own page tables, and they stay where they are while the part does.

A unit is 2 MiB of the arena, aligned.

    UNSEEN -> HERE, at an address     [place: mapped]
    HERE -> HERE, at another address  [place, for one alone: moved]
    HERE -> HERE, at one more         [place, shared: mapped there too]
    HERE, at several -> at one        [place, for one alone: the others become PROT_NONE]
    HERE -> UNSEEN                    [forget: its range was closed, or something was put over it]

Invariants
 1. An address holds one unit at most; a unit is at several addresses only since it was shared.
 2. After `place` the whole range is mapped to the extents given, whichever way each unit took.
 3. After `place` for one alone no other range has these units: what a former version left mapped
    would read another's weights.  It takes nothing from who has them still as long as places come in the
    order in which they were given (`bound`).

Called by `Mapping`; one for each arena that a process maps.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Final

from overcommit.runtime import _shm
from overcommit.runtime.config import SMALL_CHUNK_BYTES

log = logging.getLogger("overcommit.arena")

UNIT: Final = SMALL_CHUNK_BYTES


class PageTables:
    """The units of one arena that this process has mapped."""

    def __init__(self, arena_fd: int) -> None:
        self._fd = arena_fd
        self._address_of: dict[int, int] = {}  # offset in the arena -> address
        self._more: dict[int, set[int]] = {}  # the further addresses of units that were shared
        self._unit_at: dict[int, int] = {}  # the reverse of both
        self.moved_bytes = 0
        self.changes = 0  # calls that may have changed what is mapped where

    def __len__(self) -> int:
        return len(self._address_of)

    def place(
        self, address: int, offset: int, nbytes: int, populate: bool, shared: bool = False
    ) -> None:
        """Map this piece of the arena here; whole units bring their page tables along.

        `shared`: others may have it mapped at the same time, and keep it.  Raises OSError, and then
        what is mapped is not known.
        """
        self.changes += 1
        if address % UNIT or offset % UNIT or nbytes % UNIT:
            self.forget(address, nbytes)
            _shm.map_fixed(address, self._fd, offset, nbytes, False, populate)
            return
        if shared:
            self._place_too(address, offset, nbytes, populate)
            return
        if self._more:
            self._leave_one(address, offset, nbytes)
        for source, at, length in list(self._runs(address, offset, nbytes)):
            target = address + (at - offset)
            if source != target:
                self._put(source, at, target, length, populate)

    def forget(self, address: int, nbytes: int) -> None:
        """Something else is put over this range, or it is given back."""
        self.changes += 1
        if not self._unit_at:
            return
        start = address - address % UNIT
        for each in range(start, address + nbytes, UNIT):
            unit = self._unit_at.pop(each, None)
            if unit is not None:
                self._drop(unit, each)

    # --- inside ---------------------------------------------------------------------------------
    def _place_too(self, address: int, offset: int, nbytes: int, populate: bool) -> None:
        """Map what is not here yet; what others have stays theirs too."""
        steps = range(0, nbytes, UNIT)
        absent = [k for k in steps if self._unit_at.get(address + k) != offset + k]
        for _, run in itertools.groupby(enumerate(absent), key=lambda at: at[1] // UNIT - at[0]):
            first, *rest = (k for _, k in run)
            length = (len(rest) + 1) * UNIT
            self.forget(address + first, length)
            _shm.map_fixed(address + first, self._fd, offset + first, length, False, populate)
            for k in (first, *rest):
                self._unit_at[address + k] = offset + k
                if self._address_of.setdefault(offset + k, address + k) != address + k:
                    self._more.setdefault(offset + k, set()).add(address + k)

    def _leave_one(self, address: int, offset: int, nbytes: int) -> None:
        """Units that were shared are at one address from now on: here, if they are here."""
        for k in range(0, nbytes, UNIT):
            unit = offset + k
            if unit not in self._more:
                continue
            known = {self._address_of[unit], *self._more[unit]}
            kept = address + k if address + k in known else self._address_of[unit]
            for other in known - {kept}:
                del self._unit_at[other]
                _shm.unmap_fixed(other, UNIT)
            del self._more[unit]
            self._address_of[unit] = kept

    def _drop(self, unit: int, address: int) -> None:
        """The unit is not at this address any more."""
        more = self._more.get(unit)
        if more is None:
            del self._address_of[unit]
            return
        if address in more:
            more.discard(address)
        else:
            self._address_of[unit] = more.pop()
        if not more:
            del self._more[unit]

    def _runs(
        self, address: int, offset: int, nbytes: int
    ) -> Iterator[tuple[int | None, int, int]]:
        """Cut into runs of units that lie behind each other: (address or None, offset, bytes)."""
        start, source = offset, self._address_of.get(offset)
        for at in range(offset + UNIT, offset + nbytes, UNIT):
            here = self._address_of.get(at)
            expected = None if source is None else source + (at - start)
            if here != expected:
                yield source, start, at - start
                start, source = at, here
        yield source, start, offset + nbytes - start

    def _put(self, source: int | None, at: int, target: int, nbytes: int, populate: bool) -> None:
        if source is None or not self._try_move(source, at, target, nbytes):
            if source is not None and nbytes > UNIT:
                for step in range(0, nbytes, UNIT):
                    self._put(source + step, at + step, target + step, UNIT, populate)
                return
            self.forget(target, nbytes)
            _shm.map_fixed(target, self._fd, at, nbytes, False, populate)
        for step in range(0, nbytes, UNIT):
            self._set(at + step, target + step)

    def _try_move(self, source: int, at: int, target: int, nbytes: int) -> bool:
        if source < target + nbytes and target < source + nbytes:
            return False  # they overlap
        # An earlier piece of this placement may have been put over it.
        if any(self._unit_at.get(source + k) != at + k for k in range(0, nbytes, UNIT)):
            return False
        self.forget(target, nbytes)
        try:
            _shm.move_fixed(source, target, nbytes)
        except OSError as error:
            # A kernel before 5.13 moves no shared memory like that, one before 6.17 only ranges
            # of one mapping.
            log.debug("page tables cannot be moved: %s", error)
            if nbytes == UNIT:  # else each unit is tried by itself
                self.forget(source, UNIT)
                _shm.unmap_fixed(source, UNIT)
            return False
        self.forget(source, nbytes)
        self.moved_bytes += nbytes
        return True

    def _set(self, unit: int, address: int) -> None:
        old = self._address_of.get(unit)
        if old is not None and self._unit_at.get(old) == unit:
            del self._unit_at[old]
        other = self._unit_at.get(address)
        if other is not None:
            self._drop(other, address)
        self._address_of[unit] = address
        self._unit_at[address] = unit
