"""When DEVICE grows again: after much was free for long, by a little at a time, later if it was wrong."""

from __future__ import annotations

from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.config import GIB, LARGE_CHUNK_BYTES, MIB
from overcommit.runtime.device_limits import (
    GPU_FREE_GOAL_BYTES,
    GPU_FREE_GROW_BYTES,
    GPU_GROW_CHUNKS,
    GPU_GROW_LOOKS,
    GPU_GROW_LOOKS_MAX,
    GPU_GROW_PAUSE_NS,
    GPU_GROW_REGRET_NS,
)
from overcommit.runtime.gpu_growth import Growth
from overcommit.runtime.gpu_watch import GpuReading

SECOND = 1_000_000_000
TABLE = ChunkTable(8 * GIB)
KEPT = 100


class World:
    """A GPU of which so much is free, read once a second, and DEVICE."""

    def __init__(self, table: ChunkTable = TABLE, count: int = KEPT) -> None:
        self.growth = Growth(table)
        self.table = table
        self.count = count
        self.now_ns = SECOND
        self.free_bytes = 0

    def look(self, free_bytes: int, times: int = 1) -> None:
        self.free_bytes = free_bytes
        for _ in range(times):
            self.now_ns += SECOND
            reading = GpuReading(
                device=0,
                name="",
                total_bytes=80 * GIB,
                used_bytes=80 * GIB - free_bytes,
                free_bytes=free_bytes,
                taken_ns=self.now_ns,
            )
            self.growth.on_reading(reading)
            self.growth.on_reading(reading)  # a reading counts once

    def step(self) -> int:
        """Grow by what is allowed now."""
        more = self.growth.chunks_at_once(self.count, self.now_ns)
        if more:
            nbytes = self.table.offset(self.count + more) - self.table.offset(self.count)
            self.count += more
            self.growth.on_grown(nbytes, self.now_ns, is_all=True)
        return more

    def looks_until_it_grows(self) -> int:
        for looks in range(1, 10_000):
            self.look(4 * GIB)
            if self.growth.chunks_at_once(self.count, self.now_ns):
                return looks
        raise AssertionError("it never grows")


def test_much_has_to_be_free_for_long() -> None:
    world = World()
    world.look(GPU_FREE_GROW_BYTES, GPU_GROW_LOOKS - 1)
    assert world.step() == 0
    world.look(GPU_FREE_GROW_BYTES - 1)
    world.look(GPU_FREE_GROW_BYTES, GPU_GROW_LOOKS - 1)
    assert world.step() == 0, "in a row"
    world.look(GPU_FREE_GROW_BYTES)
    assert world.step() == GPU_GROW_CHUNKS


def test_steps_have_a_pause_between_them() -> None:
    world = World()
    world.look(4 * GIB, GPU_GROW_LOOKS)
    assert world.step() == GPU_GROW_CHUNKS
    assert world.step() == 0
    world.now_ns += GPU_GROW_PAUSE_NS
    assert world.growth.next_ns() == world.now_ns
    assert world.step() == GPU_GROW_CHUNKS


def test_what_no_reading_has_shown_yet_counts_as_taken() -> None:
    world = World()
    world.look(GPU_FREE_GROW_BYTES, GPU_GROW_LOOKS)
    before = world.count
    while world.growth.is_growing:
        world.step()
        world.now_ns += GPU_GROW_PAUSE_NS
    grown = world.table.offset(world.count) - world.table.offset(before)
    assert grown == GPU_FREE_GROW_BYTES - GPU_FREE_GOAL_BYTES
    world.look(GPU_FREE_GOAL_BYTES, 10 * GPU_GROW_LOOKS)
    assert world.step() == 0, "the bounds are apart"


def test_it_ends_with_the_last_chunk() -> None:
    world = World(count=len(TABLE) - 3)
    world.look(40 * GIB, GPU_GROW_LOOKS)
    assert world.step() == 3
    world.now_ns += SECOND
    assert world.step() == 0
    assert not world.growth.is_growing


def test_a_large_chunk_that_would_leave_too_little_is_not_made() -> None:
    table = ChunkTable(2 * LARGE_CHUNK_BYTES, small_share=0.5)
    world = World(table, count=32)
    growth = world.growth
    world.look(GPU_FREE_GROW_BYTES, GPU_GROW_LOOKS)
    world.look(GPU_FREE_GOAL_BYTES + LARGE_CHUNK_BYTES - MIB)
    assert growth.is_growing
    assert world.step() == 0
    assert not growth.is_growing


def test_a_gpu_without_memory_for_all_of_them_ends_it() -> None:
    world = World()
    world.look(4 * GIB, GPU_GROW_LOOKS)
    assert world.growth.chunks_at_once(world.count, world.now_ns)
    world.growth.on_grown(0, world.now_ns, is_all=False)
    assert not world.growth.is_growing


def test_it_waits_longer_after_each_time_that_was_too_soon() -> None:
    world = World()
    waits = []
    for _ in range(8):
        waits.append(world.looks_until_it_grows())
        world.step()
        world.growth.on_shrunk(world.now_ns)
    assert waits[:3] == [GPU_GROW_LOOKS, 2 * GPU_GROW_LOOKS, 4 * GPU_GROW_LOOKS]
    assert max(waits) == waits[-1] == GPU_GROW_LOOKS_MAX
    world.looks_until_it_grows()
    world.step()
    world.now_ns += GPU_GROW_REGRET_NS
    world.growth.on_shrunk(world.now_ns)  # that was not too soon
    assert world.looks_until_it_grows() == GPU_GROW_LOOKS
