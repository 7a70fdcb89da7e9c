"""An arena whose end comes and goes: a GPU gives chunks back and gets them again.

The books are `ChunkAllocator`'s, without `can_split`; here is where they end.

    [0, retired from) is handed out; behind it
        held -> gone        [free]
        free -> gone        [retire, at once]
        gone -> free        [restore, from the front on]

Invariants
 1. Nothing that begins behind the offset is handed out.
 2. `capacity_bytes` is what is handed out, and what is held behind the offset still.
 3. Nothing comes back before everything behind the offset is gone.

Called by the GPU's pressure and its site; pure.
"""

from __future__ import annotations

from overcommit.runtime.allocator import SMALL_PER_LARGE, ChunkAllocator
from overcommit.runtime.config import LARGE_CHUNK_BYTES, SMALL_CHUNK_BYTES


class RetiringAllocator(ChunkAllocator):
    """See the module; offsets are where a chunk begins, as `chunk_table` has them."""

    def __init__(self, capacity_bytes: int, *, small_share: float = 0.25) -> None:
        self._retired_from: int | None = None
        super().__init__(capacity_bytes, can_split=False, small_share=small_share)
        self._full_bytes = self.capacity_bytes

    @property
    def end_bytes(self) -> int:
        """The offset from which on nothing is handed out."""
        return self._full_bytes if self._retired_from is None else self._retired_from

    @property
    def retiring_bytes(self) -> int:
        """Bytes behind the offset that allocations hold still."""
        return max(0, self.capacity_bytes - self.end_bytes)

    def retire(self, offset: int) -> None:
        """Hand out nothing from this offset on.

        What is free there is gone at once, and `capacity_bytes` with it; what is held, when it is freed.
        """
        if offset >= self.end_bytes:
            return
        self._retired_from = offset
        for slab in self._slabs:
            self._rank_slab(slab)
        self._drop_retired()

    def restore(self, offset: int) -> None:
        """Hand out what lies before this offset again; nothing may be held behind the former one."""
        assert not self.retiring_bytes, "somebody holds bytes there"
        at, end = self.end_bytes, min(offset, self._full_bytes)
        if at >= end:
            return
        self._retired_from = None if end == self._full_bytes else end
        self.capacity_bytes += end - at
        while at < end:
            parent = at // LARGE_CHUNK_BYTES
            if parent in self._small:
                stop = min(end, (parent + 1) * LARGE_CHUNK_BYTES)
                first, last = at // SMALL_CHUNK_BYTES, stop // SMALL_CHUNK_BYTES
                self._give_smalls(parent, range(first, last))
                at = stop
            else:
                assert at == parent * LARGE_CHUNK_BYTES, "a part of a whole chunk"
                self._lent.pop(parent, None)  # all that was lent of it is gone
                self._large.add(parent)
                at += LARGE_CHUNK_BYTES

    def _is_retired(self, chunk: int) -> bool:
        return self._retired_from is not None and chunk * SMALL_CHUNK_BYTES >= self._retired_from

    def _drop_retired(self) -> None:
        if self._retired_from is None:
            return
        first = self._retired_from // SMALL_CHUNK_BYTES
        gone = {parent for parent in self._large if parent * SMALL_PER_LARGE >= first}
        self._large -= gone
        self.capacity_bytes -= len(gone) * LARGE_CHUNK_BYTES
        for parent, chunks in self._small.items():
            if late := {chunk for chunk in chunks if chunk >= first}:
                chunks -= late
                self._small_free -= len(late)
                self._parents.set(parent, len(chunks))
                self.capacity_bytes -= len(late) * SMALL_CHUNK_BYTES
        for parent, chunks in self._lent.items():
            if parent * SMALL_PER_LARGE >= first:
                self.capacity_bytes -= len(chunks) * SMALL_CHUNK_BYTES
                self._lent_free -= len(chunks)
                chunks.clear()
