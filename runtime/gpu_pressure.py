"""DEVICE gives memory of the GPU back when little of it is free, and takes it again when much is.

    CALM --[less than GPU_FREE_LOW_BYTES free: the last chunks are retired]--> CLEARING
    CLEARING --[whoever holds a retired chunk was evicted; everybody is told]--> CALM, for a pause
    CALM --[much is free, for long (`gpu_growth`): the mover is asked for more chunks]--> MAKING
    MAKING --[they are held, workers have been sent them; they are handed out]--> CALM
    MAKING --[the GPU has no memory for all of them]--> CALM, with those that there are
    MAKING --[the mover dies: its successor makes the rest]--> MAKING

Chunks go and come at the end, so that a count goes on saying which there are.

Invariants
 1. A chunk is given back only when no version holds it and no load touches it.
 2. DEVICE keeps GPU_KEEP_SHARE of what it had, however short the memory is, and never gets more than
    it was to have at the start.
 3. One step at a time: NVML shows late what was given back or taken.
 4. A chunk is handed out only when the supervisor holds it, the mover has it mapped, and each worker
    takes it over before it hears of anything that lies there.

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
from overcommit.runtime.gpu_growth import Growth
from overcommit.runtime.gpu_watch import GpuReading
from overcommit.runtime.residency import Residency
from overcommit.runtime.retiring import RetiringAllocator
from overcommit.runtime.telemetry import show_bytes

log = logging.getLogger("overcommit.gpu")


class GpuPressure:
    """Watches the GPU's free bytes; shrinks and grows DEVICE."""

    def __init__(
        self,
        table: ChunkTable,
        device: RetiringAllocator,
        residency: Residency,
        activations: Activations,
        chunks: ChunkFeed,
        shrink: Callable[[int], None],
    ) -> None:
        """`shrink(count)` tells everybody of what is left."""
        self._table = table
        self._device = device
        self._residency = residency
        self._activations = activations
        self._chunks = chunks
        self._shrink = shrink
        self._growth = Growth(table)
        self._clearing: int | None = None  # chunks that there will be
        self._making: tuple[int, int] | None = None  # chunks that there were, and are to be
        self._grown_from: int | None = None  # likewise, when the first of several steps began
        self._not_before_ns = 0

    def tick(self, reading: GpuReading | None, now_ns: int) -> None:
        """Look at the last reading; begin, go on with, or finish one step."""
        vault = self._chunks.vault
        if not vault.is_full:
            return
        if self._making is not None:
            self._finish_growing(*self._making, now_ns)
        if reading is not None:
            self._growth.on_reading(reading)
        if self._clearing is None and reading is not None and now_ns >= self._not_before_ns:
            self._begin(reading, vault.count, now_ns)
        if self._clearing is None:
            self._try_grow(now_ns)
            return
        offset = self._table.offset(self._clearing)
        self._activations.apply(self._residency.clear_from(offset, now_ns), now_ns)
        if not self._device.retiring_bytes:
            self._shrink(self._clearing)
            self._clearing = None
            self._not_before_ns = now_ns + GPU_SHRINK_PAUSE_NS

    def next_ns(self) -> int | None:
        """Return when the next step may begin; None: an event or the next reading comes first."""
        return self._growth.next_ns() if self._may_grow else None

    @property
    def _may_grow(self) -> bool:
        return self._chunks.vault.count < len(self._table) and self._chunks.is_settled

    def _begin(self, reading: GpuReading, count: int, now_ns: int) -> None:
        if reading.free_bytes >= GPU_FREE_LOW_BYTES:
            return
        kept = shorten(self._table, count, GPU_FREE_GOAL_BYTES - reading.free_bytes)
        if kept < count:
            log.warning("%d MiB of the GPU are free", reading.free_bytes >> 20)
            self._growth.on_shrunk(now_ns)
            self._grown_from = None
            self._clearing = kept
            self._device.retire(self._table.offset(kept))

    def _try_grow(self, now_ns: int) -> None:
        count = self._chunks.vault.count
        if not self._may_grow:
            return
        more = self._growth.chunks_at_once(count, now_ns)
        if more:
            self._making = count, count + more
            if self._grown_from is None:
                self._grown_from = count
            self._chunks.grow(count + more)
        elif not self._growth.is_growing:
            self._say_grown(count)

    def _finish_growing(self, former: int, asked: int, now_ns: int) -> None:
        """All chunks that there are to be are held; fewer than were asked for, if memory is short."""
        count = self._chunks.vault.count
        self._making = None
        nbytes = self._table.offset(count) - self._table.offset(former)
        self._growth.on_grown(nbytes, now_ns, is_all=count == asked)
        self._device.restore(self._table.offset(count))
        if count == len(self._table):
            self._say_grown(count)
        # Who waits for room need not wait for the next tick.
        self._activations.tick(now_ns)

    def _say_grown(self, count: int) -> None:
        """The last of several steps was done."""
        if self._grown_from is not None and count > self._grown_from:
            log.warning(
                "the GPU's memory is free again: DEVICE has %d chunks, %s, from now on",
                *(count, show_bytes(self._device.capacity_bytes)),
            )
            self._grown_from = None


def shorten(table: ChunkTable, count: int, nbytes: int) -> int:
    """Return how many of the first `count` chunks stay when so many bytes have to go from the end.

    What the arena keeps in any case is a share of its first size.
    """
    floor = table.capacity_bytes * GPU_KEEP_SHARE
    while count > 1 and nbytes > 0 and table.offset(count - 1) >= floor:
        count -= 1
        nbytes -= table.nbytes(count)
    return count
