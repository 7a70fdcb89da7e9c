"""Payload blocks: a buddy allocator over one front end's ingress or egress arena.

Owns the free lists; touches no memory.  Blocks are powers of two from BLOCK_BYTES_MIN to
BLOCK_BYTES_MAX, aligned to their size.

Small blocks that come back wait on a short list of their size and go out again from there, still
warm in the cache, without being merged and split each time; when memory runs short they are merged.

Invariants
 1. Every byte of the arena is in exactly one free block, one waiting block or one reserved block.
 2. Two free buddies do not exist: they are one larger free block.
 3. A reservation fails only when no merging could make it succeed.
 4. When nothing is reserved and `merge_all` was called, the free lists are those of a new arena.

Called by the front end's dispatch, which alone knows who holds a block; pure.
"""

from __future__ import annotations

from typing import Final

from overcommit.runtime.config import BLOCK_BYTES_MAX, BLOCK_BYTES_MIN

_MIN_ORDER: Final = BLOCK_BYTES_MIN.bit_length() - 1
_MAX_ORDER: Final = BLOCK_BYTES_MAX.bit_length() - 1
_WAITING_ORDER_MAX: Final = 16  # blocks up to 64 KiB wait ...
_WAITING_MAX: Final = 256  # ... this many of each size


class BlockArena:
    """Blocks of one arena; `capacity_bytes` is rounded down to whole smallest blocks."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes // BLOCK_BYTES_MIN * BLOCK_BYTES_MIN
        # A dict as an ordered set: constant time to take the last and to remove a buddy.
        self._free: list[dict[int, None]] = [{} for _ in range(_MAX_ORDER + 1)]
        self._waiting: list[list[int]] = [[] for _ in range(_WAITING_ORDER_MAX + 1)]
        self._reserved: dict[int, int] = {}  # offset -> order
        self.used_bytes = 0
        offset = 0
        while offset < self.capacity_bytes:
            order = _MAX_ORDER
            while offset % (1 << order) or offset + (1 << order) > self.capacity_bytes:
                order -= 1
            self._free[order][offset] = None
            offset += 1 << order

    def __repr__(self) -> str:
        return f"<BlockArena {self.used_bytes} of {self.capacity_bytes} bytes, {self.blocks_used} blocks>"

    @property
    def free_bytes(self) -> int:
        """Bytes that are not reserved."""
        return self.capacity_bytes - self.used_bytes

    @property
    def blocks_used(self) -> int:
        """Reserved blocks."""
        return len(self._reserved)

    def try_reserve(self, nbytes: int) -> tuple[int, int] | None:
        """Reserve a block of at least `nbytes`: (offset, capacity); None when there is none."""
        order = max(_MIN_ORDER, (nbytes - 1).bit_length()) if nbytes > 1 else _MIN_ORDER
        if order <= _WAITING_ORDER_MAX and (waiting := self._waiting[order]):
            offset = waiting.pop()
        else:
            found = self._cut(order)
            if found is None:
                self.merge_all()
                found = self._cut(order)
                if found is None:
                    return None
            offset = found
        self._reserved[offset] = order
        self.used_bytes += 1 << order
        return offset, 1 << order

    def release(self, offset: int) -> None:
        """Give a block back; KeyError when it is not reserved."""
        order = self._reserved.pop(offset)
        self.used_bytes -= 1 << order
        if order <= _WAITING_ORDER_MAX and len(self._waiting[order]) < _WAITING_MAX:
            self._waiting[order].append(offset)
        else:
            self._merge(offset, order)

    def merge_all(self) -> None:
        """Turn every waiting block into a free one."""
        for order, waiting in enumerate(self._waiting):
            while waiting:
                self._merge(waiting.pop(), order)

    # --- the free lists -------------------------------------------------------------------------
    def _cut(self, order: int) -> int | None:
        """Take a block of this order off the free lists."""
        at = order
        while at <= _MAX_ORDER and not self._free[at]:
            at += 1
        if at > _MAX_ORDER:
            return None
        offset, _ = self._free[at].popitem()
        while at > order:  # split: keep the lower half, free the upper
            at -= 1
            self._free[at][offset + (1 << at)] = None
        return offset

    def _merge(self, offset: int, order: int) -> None:
        while order < _MAX_ORDER:
            buddy = offset ^ (1 << order)
            if buddy not in self._free[order]:
                break
            del self._free[order][buddy]
            offset = min(offset, buddy)
            order += 1
        self._free[order][offset] = None
