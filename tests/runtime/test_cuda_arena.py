"""CUDA arenas on the fake driver: which calls are made, in which order, and what failures leave."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from cuda_rig import SMALLS_BEFORE, TABLE, CudaRig, passed, started
from fake_driver import FakeGpu
from memory_probe import permissions

from overcommit.runtime import _shm
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.chunks import Chunks
from overcommit.runtime.config import (
    KIB,
    LARGE_CHUNK_BYTES,
    MIB,
    SLAB_MODEL_BYTES_MAX,
    SMALL_CHUNK_BYTES,
)
from overcommit.runtime.cuda_arena import CudaArena, CudaRanges
from overcommit.runtime.driver import DriverError, Result

CHUNK = SMALL_CHUNK_BYTES
LARGE = (SMALLS_BEFORE * CHUNK, LARGE_CHUNK_BYTES)


@pytest.fixture
def rig() -> Iterator[CudaRig]:
    made = CudaRig()
    yield made
    gc.collect()
    made.close()
    assert made.worker.reserved_bytes == 0, "addresses were leaked"


def chunks(*numbers: int) -> list[tuple[int, int]]:
    return [(number * CHUNK, CHUNK) for number in numbers]


def calls_of(rig: CudaRig, since: int) -> list[str]:
    return rig.worker.calls[since:]


def test_a_placement_is_one_map_a_chunk_and_one_access_for_all(rig: CudaRig) -> None:
    mapping = rig.open(LARGE_CHUNK_BYTES + 3 * CHUNK)
    since = len(rig.worker.calls)
    mapping.map([LARGE, *chunks(9, 4, 7)], 1)
    assert calls_of(rig, since) == ["cuMemMap"] * 4 + ["cuMemSetAccess"]
    mapping.close()


def test_a_reload_into_the_same_chunks_costs_no_call(rig: CudaRig) -> None:
    mapping = rig.open(3 * CHUNK)
    mapping.map(chunks(9, 4, 7), 1)
    since = len(rig.worker.calls)
    mapping.map(chunks(9, 4, 7), 2)
    assert calls_of(rig, since) == []
    assert mapping.generation == 2
    mapping.close()


def test_what_is_in_place_at_the_front_stays(rig: CudaRig) -> None:
    mapping = rig.open(3 * CHUNK)
    mapping.map(chunks(9, 4, 7), 1)
    since = len(rig.worker.calls)
    mapping.map(chunks(9, 5, 7), 2)
    assert calls_of(rig, since) == ["cuMemUnmap", "cuMemMap", "cuMemMap", "cuMemSetAccess"]
    mapping.close()


def test_an_unmap_waits_for_the_work_that_was_noted(rig: CudaRig) -> None:
    mapping = rig.open(2 * CHUNK)
    mapping.map(chunks(1, 2), 1)
    rig.write(CHUNK, b"\x2a")
    stream = rig.worker.stream_create(is_urgent=False)
    seen: list[int] = []
    rig.worker.enqueue(stream, lambda: seen.append(_shm.view(mapping.address, 1, False)[0]))
    mapping.note_work(stream)
    other = rig.open(2 * CHUNK)
    assert seen == []
    other.map(chunks(2, 3), 1)  # takes a chunk away
    assert seen == [42], "unmapped under a kernel that reads it"
    assert mapping.generation is None
    mapping.close()
    other.close()


def test_a_slab_model_needs_another_mapping_where_it_lies_elsewhere_inside(rig: CudaRig) -> None:
    mapping = rig.open(40 * KIB)
    assert mapping.can_hold([(5 * CHUNK, 40 * KIB)])
    mapping.map([(5 * CHUNK + 64 * KIB, 40 * KIB)], 1)
    address = mapping.address
    elsewhere = [(7 * CHUNK + 64 * KIB, 40 * KIB)]
    assert mapping.can_hold(elsewhere)
    mapping.map(elsewhere, 2)
    assert mapping.address == address
    assert not mapping.can_hold([(7 * CHUNK, 40 * KIB)])
    with pytest.raises(ValueError, match="another mapping"):
        mapping.map([(7 * CHUNK, 40 * KIB)], 3)
    mapping.close()


def test_a_slab_in_a_lent_large_chunk_is_mapped(rig: CudaRig) -> None:
    rig.write(LARGE[0] + 10 * MIB, b"\7" * 40 * KIB)
    mapping = rig.open(40 * KIB)
    mapping.map([(LARGE[0] + 10 * MIB, 40 * KIB)], 1)
    assert bytes(_shm.view(mapping.address, 40 * KIB, False)) == b"\7" * 40 * KIB
    mapping.close()


def test_a_part_of_a_chunk_is_refused(rig: CudaRig) -> None:
    mapping = rig.open(SLAB_MODEL_BYTES_MAX + 1)
    with pytest.raises(ValueError, match="mapped whole"):
        mapping.map([(4096, CHUNK)], 1)
    mapping.close()


def test_the_range_is_given_back_with_its_last_holder(rig: CudaRig) -> None:
    mapping = rig.open(2 * CHUNK)
    mapping.map(chunks(0, 1), 1)
    keeper, address = mapping.keeper, mapping.address
    mapping.close()
    gc.collect()
    assert permissions(address) == "---p", "a fault, never another version's bytes"
    del keeper
    gc.collect()
    assert permissions(address) is None


# --- failures -----------------------------------------------------------------------------------
@pytest.mark.parametrize("number", range(1, 8))
def test_a_placement_that_fails_at_any_call_leaves_nothing_mapped(
    rig: CudaRig, number: int
) -> None:
    mapping = rig.open(5 * CHUNK)
    mapping.map(chunks(1, 2, 3, 4, 5), 1)
    before = rig.worker.mapped()
    rig.worker.fail_at(number)  # one unmap, five maps, one access
    with pytest.raises(DriverError, match="failed"):
        mapping.map(chunks(11, 2, 13, 14, 11), 2, shared=(0, 4))
    assert mapping.generation is None
    assert rig.worker.mapped() == {}, before
    assert len(rig.ranges) == 0
    mapping.map(chunks(11, 12, 13, 14, 15), 3)
    assert mapping.generation == 3
    mapping.close()


@pytest.mark.parametrize("number", range(1, len(TABLE) + 3))
def test_an_arena_that_cannot_be_mapped_leaves_nothing(rig: CudaRig, number: int) -> None:
    driver = started(rig.gpu)
    made = Chunks(driver, TABLE, 0)
    for chunk in range(len(TABLE)):
        fd = rig.mover.mem_export(rig.arena.chunks.handle(chunk))
        made.take(fd)
    driver.fail_at(number)
    with pytest.raises(DriverError):
        CudaArena(made).map_all(True)
    assert driver.mapped() == {}
    assert driver.reserved_bytes == 0
    made.close()
    assert driver.handle_count == 0


@pytest.mark.parametrize("number", [1, 2])
def test_a_chunk_that_cannot_be_made_or_exported_leaves_nothing(number: int) -> None:
    gpu = FakeGpu()
    driver = started(gpu)
    made = Chunks(driver, ChunkTable(4 * CHUNK), 0)
    driver.fail_at(number)
    with pytest.raises(DriverError):
        made.make()
    assert len(made) == driver.handle_count == gpu.used_bytes() == 0


def test_a_descriptor_that_cannot_be_imported_is_closed(rig: CudaRig) -> None:
    taken = Chunks(started(rig.gpu), TABLE, 0)
    stranger, other = os.pipe()
    with pytest.raises(DriverError, match="cuMemImport"):
        taken.take(stranger)
    os.close(other)
    with pytest.raises(OSError):
        os.fstat(stranger)


def test_memory_that_is_short_is_said(rig: CudaRig) -> None:
    gpu = FakeGpu(total_bytes=3 * CHUNK)
    made = Chunks(started(gpu), ChunkTable(4 * CHUNK), 0)
    fds = [made.make() for _ in range(3)]
    with pytest.raises(DriverError) as raised:
        made.make()
    assert (raised.value.call, raised.value.result) == ("cuMemCreate", Result.OUT_OF_MEMORY)
    for fd in fds:
        os.close(fd)


# --- deaths -------------------------------------------------------------------------------------
def test_weights_outlive_everybody_but_the_descriptors(rig: CudaRig) -> None:
    table = ChunkTable(4 * CHUNK)
    first = started(rig.gpu)
    made = Chunks(first, table, 0)
    fds = [passed(made.make()) for _ in range(4)]
    _shm.view(CudaArena(made).map_all(True), 1, True)[0] = 99
    first.die()
    second = started(rig.gpu)
    taken = Chunks(second, table, 0)
    for fd in fds:
        taken.take(fd)
    ranges = CudaRanges(taken)
    mapping = ranges.open(2 * CHUNK)
    mapping.map(chunks(0, 1), 1)
    assert _shm.view(mapping.address, 1, False)[0] == 99
    mapping.close()
    taken.close()
