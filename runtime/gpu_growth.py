"""When DEVICE may grow again after it gave memory of the GPU back, and by how much at once.

Whoever took the memory may come back, so growing waits until much more is free than what shrinks
DEVICE, for long; and for twice as long each time that it was too soon.

    WAITING --[on_reading: enough is free, so many times in a row]--> GROWING
    GROWING --[chunks_at_once: all there, or less than the goal would be free]--> WAITING
    GROWING --[on_grown: the GPU had no memory for all of them]--> WAITING
    GROWING --[on_shrunk]--> WAITING, and for longer if it grew a short time ago

Invariants
 1. After a step GPU_FREE_GOAL_BYTES are still free, as far as anybody knows: what was made since the
    last reading is taken off what that one said.
 2. Between the bounds of growing and of shrinking nothing happens.
 3. A reading counts once, however often it is looked at.

Pure.  Called by `gpu_pressure`.
"""

from __future__ import annotations

from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.device_limits import (
    GPU_FREE_GOAL_BYTES,
    GPU_FREE_GROW_BYTES,
    GPU_GROW_BYTES,
    GPU_GROW_CHUNKS,
    GPU_GROW_LOOKS,
    GPU_GROW_LOOKS_MAX,
    GPU_GROW_PAUSE_NS,
    GPU_GROW_REGRET_NS,
)
from overcommit.runtime.gpu_watch import GpuReading


class Growth:
    """See the module."""

    def __init__(self, table: ChunkTable) -> None:
        self._table = table
        self._looks_needed = GPU_GROW_LOOKS
        self._looks = 0  # in a row in which enough was free
        self._read_ns = 0
        self._free_bytes = 0
        self.is_growing = False
        self._made: list[tuple[int, int]] = []  # (when, bytes) that no reading has shown yet
        self._not_before_ns = 0
        self._grew_ns: int | None = None

    def on_reading(self, reading: GpuReading) -> None:
        """NVML says this; the same as last time says nothing."""
        if reading.taken_ns <= self._read_ns:
            return
        self._read_ns, self._free_bytes = reading.taken_ns, reading.free_bytes
        self._made = [(at_ns, nbytes) for at_ns, nbytes in self._made if at_ns >= reading.taken_ns]
        self._looks = self._looks + 1 if reading.free_bytes >= GPU_FREE_GROW_BYTES else 0
        self.is_growing = self.is_growing or self._looks >= self._looks_needed

    def on_shrunk(self, now_ns: int) -> None:
        """DEVICE had to give chunks back."""
        if self._grew_ns is not None and now_ns - self._grew_ns < GPU_GROW_REGRET_NS:
            self._looks_needed = min(2 * self._looks_needed, GPU_GROW_LOOKS_MAX)
        else:
            self._looks_needed = GPU_GROW_LOOKS
        self._grew_ns = None
        self._stop()

    def chunks_at_once(self, count: int, now_ns: int) -> int:
        """Return how many chunks to add to the first `count` ones now; 0: none."""
        if not self.is_growing or now_ns < self._not_before_ns:
            return 0
        unseen = sum(nbytes for _, nbytes in self._made)
        spare = min(self._free_bytes - unseen - GPU_FREE_GOAL_BYTES, GPU_GROW_BYTES)
        last = min(count + GPU_GROW_CHUNKS, len(self._table))
        start = self._table.offset(count)
        while last > count and self._table.offset(last) - start > spare:
            last -= 1
        if last == count:
            self._stop()
        return last - count

    def next_ns(self) -> int | None:
        """Return when the next step may begin; None: DEVICE does not grow."""
        return self._not_before_ns if self.is_growing else None

    def _stop(self) -> None:
        self._looks, self.is_growing = 0, False

    def on_grown(self, nbytes: int, now_ns: int, *, is_all: bool) -> None:
        """So many bytes were made; if not all that were asked for, there are no more now."""
        if not is_all:
            self._stop()
        self._made.append((now_ns, nbytes))
        self._grew_ns = now_ns
        self._not_before_ns = now_ns + GPU_GROW_PAUSE_NS
