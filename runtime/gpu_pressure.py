"""DEVICE gives memory of the GPU back when little of it is free: somebody else came, or a model needs it.

    CALM --[less than GPU_FREE_LOW_BYTES free: the last chunks are retired]--> CLEARING
    CLEARING --[whoever holds a retired chunk was evicted; everybody is told]--> CALM, for a pause

Chunks go from the end, so that a count goes on saying which there are.  They do not come back while the
server runs.

Invariants
 1. A chunk is given back only when no version holds it and no load touches it.
 2. DEVICE keeps GPU_KEEP_SHARE of what it had, however short the memory is.
 3. One step at a time: NVML shows late what was given back.

Called by the supervisor's loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from overcommit.runtime.activation import Activations
from overcommit.runtime.chunk_feed import ChunkFeed
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.device_limits import (
    GPU_FREE_GOAL_BYTES,
    GPU_FREE_LOW_BYTES,
    GPU_KEEP_SHARE,
    GPU_SHRINK_PAUSE_NS,
)
from overcommit.runtime.gpu_watch import GpuReading
from overcommit.runtime.residency import Residency

log = logging.getLogger("overcommit.gpu")


class GpuPressure:
    """Watches the GPU's free bytes, and shrinks DEVICE."""

    def __init__(
        self,
        table: ChunkTable,
        residency: Residency,
        activations: Activations,
        chunks: ChunkFeed,
        shrink: Callable[[int], None],
    ) -> None:
        """`shrink(count)` tells everybody of what is left."""
        self._table = table
        self._residency = residency
        self._activations = activations
        self._chunks = chunks
        self._shrink = shrink
        self._clearing: int | None = None  # chunks that there will be
        self._not_before_ns = 0

    def tick(self, reading: GpuReading | None, now_ns: int) -> None:
        """Look at the last reading; begin, go on with, or finish one step."""
        vault = self._chunks.vault
        if not vault.is_full:
            return
        if self._clearing is None and reading is not None and now_ns >= self._not_before_ns:
            self._begin(reading, vault.count)
        if self._clearing is None:
            return
        offset = self._table.offset(self._clearing)
        self._activations.apply(self._residency.clear_from(offset, now_ns), now_ns)
        if not self._residency.device.retiring_bytes:
            self._shrink(self._clearing)
            self._clearing = None
            self._not_before_ns = now_ns + GPU_SHRINK_PAUSE_NS

    def _begin(self, reading: GpuReading, count: int) -> None:
        if reading.free_bytes >= GPU_FREE_LOW_BYTES:
            return
        kept = shorten(self._table, count, GPU_FREE_GOAL_BYTES - reading.free_bytes)
        if kept < count:
            log.warning("%d MiB of the GPU are free", reading.free_bytes >> 20)
            self._clearing = kept
            self._residency.device.retire(self._table.offset(kept))


def shorten(table: ChunkTable, count: int, nbytes: int) -> int:
    """Return how many of the first `count` chunks stay when so many bytes have to go from the end.

    What the arena keeps in any case is a share of its first size.
    """
    floor = table.capacity_bytes * GPU_KEEP_SHARE
    while count > 1 and nbytes > 0 and table.offset(count - 1) >= floor:
        count -= 1
        nbytes -= table.nbytes(count)
    return count
