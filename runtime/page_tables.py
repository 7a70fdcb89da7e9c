"""Where in this process the page tables of an arena's chunks are, so that they move with the chunks.

Mapping a chunk is cheap; making its page tables is not: 90 us a MiB with MAP_POPULATE, 60 us when the
first batch takes the faults.  But a chunk that holds other weights now is the same memory as before:
`mremap` moves its page tables to the address of the version that has it now, which takes 5 us for
8 MiB and 16 us for 64 MiB (measured; the kernel moves whole tables where both ends are 2 MiB aligned).
What is left behind is PROT_NONE.

A unit is 2 MiB of the arena, aligned.

    UNSEEN -> HERE, at an address     [place: mapped]
    HERE -> HERE, at another address  [place: moved]
    HERE -> UNSEEN                    [forget: its range was closed, or something was put over it]

Invariants
 1. A unit is at one address at most, and an address holds one unit at most.
 2. After `place` the whole range is mapped to the extents given, whichever way each unit took.

Called by `Mapping`; one for each arena that a process maps.
"""

from __future__ import annotations

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
        self._unit_at: dict[int, int] = {}  # the reverse
        self.moved_bytes = 0

    def __len__(self) -> int:
        return len(self._address_of)

    def place(self, address: int, offset: int, nbytes: int, populate: bool) -> None:
        """Map this piece of the arena here; whole units bring their page tables along.

        Raises OSError, and then what is mapped is not known.
        """
        if address % UNIT or offset % UNIT or nbytes % UNIT:
            self.forget(address, nbytes)
            _shm.map_fixed(address, self._fd, offset, nbytes, False, populate)
            return
        for source, at, length in list(self._runs(address, offset, nbytes)):
            target = address + (at - offset)
            if source != target:
                self._put(source, at, target, length, populate)

    def forget(self, address: int, nbytes: int) -> None:
        """Something else is put over this range, or it is given back."""
        if not self._unit_at:
            return
        start = address - address % UNIT
        for each in range(start, address + nbytes, UNIT):
            unit = self._unit_at.pop(each, None)
            if unit is not None:
                del self._address_of[unit]

    # --- inside ---------------------------------------------------------------------------------
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
        self.forget(source, nbytes)
        try:
            _shm.move_fixed(source, target, nbytes)
        except OSError as error:
            # A kernel before 5.13 moves no shared memory like that, one before 6.17 only ranges
            # of one mapping.
            log.debug("page tables cannot be moved: %s", error)
            return False
        self.moved_bytes += nbytes
        return True

    def _set(self, unit: int, address: int) -> None:
        old = self._address_of.get(unit)
        if old is not None and self._unit_at.get(old) == unit:
            del self._unit_at[old]
        other = self._unit_at.get(address)
        if other is not None:
            del self._address_of[other]
        self._address_of[unit] = address
        self._unit_at[address] = unit
