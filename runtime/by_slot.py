"""What a worker has for each version, by slot.

A list and no dictionary: with hundreds of versions in turn a look-up in a dictionary finds three lines of
memory that nobody has looked at lately (index, entry, key), one in a list.  And a list can be read by
`_shm.prefetch`, which has what belongs to many requests fetched at the same time.

Called by whoever keeps something for each version: `bound.py`, `batcher.py`.
"""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class BySlot(list[T | None]):
    """The item in each slot; None where there is none.  Grows, and never becomes shorter."""

    def find(self, slot: int) -> T | None:
        """The item in a slot."""
        return self[slot] if slot < len(self) else None

    def put(self, slot: int, item: T) -> None:
        """Have an item in a slot."""
        if slot >= len(self):
            self.extend([None] * (slot + 1 - len(self)))
        self[slot] = item

    def take(self, slot: int) -> T | None:
        """Take the item out of a slot."""
        item = self.find(slot)
        if item is not None:
            self[slot] = None
        return item
