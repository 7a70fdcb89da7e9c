"""What every mapping does, on host memory and on the fake driver: stable addresses, moving chunks."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from cuda_rig import SMALLS_BEFORE, ArenaRig, CudaRig, MemfdRig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_probe import permissions, signal_of_child

from overcommit.runtime import _shm
from overcommit.runtime.arena import Mapping
from overcommit.runtime.config import KIB, PAGE_BYTES, SMALL_CHUNK_BYTES
from overcommit.runtime.cuda_arena import CudaMapping

CHUNK = SMALL_CHUNK_BYTES
AnyMapping = Mapping | CudaMapping
Extents = list[tuple[int, int]]


@pytest.fixture(params=[MemfdRig, CudaRig], ids=["memfd", "cuda"])
def arena(request: pytest.FixtureRequest) -> Iterator[ArenaRig]:
    rig: ArenaRig = request.param()
    yield rig
    gc.collect()
    rig.close()


def chunks(*numbers: int) -> Extents:
    return [(number * CHUNK, CHUNK) for number in numbers]


def fill(arena: ArenaRig, extents: Extents, value: int) -> None:
    for offset, length in extents:
        arena.write(offset, bytes([value]) * length)


def image(mapping: AnyMapping) -> bytes:
    return bytes(_shm.view(mapping.address, mapping.nbytes, False))


def test_views_see_the_new_bytes_at_the_old_address(arena: ArenaRig) -> None:
    mapping = arena.open(3 * CHUNK - 5)
    first, second = chunks(5, 1, 9), chunks(20, 21, 3)
    fill(arena, first, 1)
    fill(arena, second, 2)
    mapping.map(first, 1)
    address = mapping.address
    array = np.frombuffer(_shm.view(address, mapping.nbytes, False), dtype=np.uint8)
    assert int(array.sum()) == mapping.nbytes
    mapping.unmap()
    mapping.map(second, 2)
    assert (mapping.address, mapping.generation) == (address, 2)
    assert int(array.sum()) == 2 * mapping.nbytes
    mapping.close()


def test_a_new_placement_replaces_the_old_one_without_an_unmap(arena: ArenaRig) -> None:
    mapping = arena.open(2 * CHUNK)
    fill(arena, chunks(7, 8), 9)
    mapping.map(chunks(0, 1), 1)
    mapping.map([(7 * CHUNK, 2 * CHUNK)], 2)
    assert image(mapping) == b"\x09" * 2 * CHUNK
    mapping.close()


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_chunks_appear_one_after_the_other(arena: ArenaRig, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    mapping = arena.open(
        data.draw(st.integers((count - 1) * CHUNK + CHUNK // 2 + 1, count * CHUNK))
    )
    for number in range(SMALLS_BEFORE):
        arena.write(number * CHUNK, bytes([number + 1]))
    for generation in range(data.draw(st.integers(1, 4))):
        order = data.draw(st.permutations(range(SMALLS_BEFORE)))[:count]
        mapping.map(chunks(*order), generation)
        firsts = [_shm.view(mapping.address + k * CHUNK, 1, False)[0] for k in range(count)]
        assert firsts == [number + 1 for number in order]
    mapping.close()


def test_a_large_chunk_and_small_ones_make_one_image(arena: ArenaRig) -> None:
    large = (SMALLS_BEFORE * CHUNK, 32 * CHUNK)
    behind = chunks(SMALLS_BEFORE + 32, 4)
    mapping = arena.open(33 * CHUNK + 100)
    for extents, value in (([large], 1), (behind[:1], 2), (behind[1:], 3)):
        fill(arena, extents, value)
    mapping.map([large, *behind], 1)
    seen = image(mapping)
    assert seen == b"\1" * 32 * CHUNK + b"\2" * CHUNK + b"\3" * 100
    mapping.close()


def test_small_models_share_a_chunk(arena: ArenaRig) -> None:
    first, second = arena.open(300 * KIB), arena.open(8 * KIB)
    one, two = [(3 * CHUNK, 300 * KIB)], [(3 * CHUNK + 512 * KIB, 8 * KIB)]
    fill(arena, one, 1)
    fill(arena, two, 2)
    first.map(one, 1)
    second.map(two, 1)
    assert image(first) == b"\1" * 300 * KIB
    assert image(second) == b"\2" * 8 * KIB
    first.close()
    assert image(second) == b"\2" * 8 * KIB
    second.close()


def test_short_extents_are_refused_and_nothing_stays_mapped(arena: ArenaRig) -> None:
    mapping = arena.open(3 * CHUNK)
    mapping.map(chunks(0, 1, 2), 1)
    with pytest.raises(ValueError, match="extents hold"):
        mapping.map(chunks(4, 5), 2)
    assert mapping.generation is None
    assert permissions(mapping.address) == "---p"
    mapping.close()


def test_writing_faults_and_so_does_reading_what_was_evicted(arena: ArenaRig) -> None:
    mapping = arena.open(2 * CHUNK)
    mapping.map(chunks(3, 4), 1)
    assert signal_of_child("read", mapping.address + CHUNK) == 0
    assert signal_of_child("write", mapping.address) == signal.SIGSEGV
    mapping.unmap()
    assert mapping.generation is None
    assert signal_of_child("read", mapping.address + CHUNK) == signal.SIGSEGV
    mapping.close()


def test_who_lost_its_chunks_cannot_read_those_of_their_new_owner(arena: ArenaRig) -> None:
    former, later = arena.open(2 * CHUNK), arena.open(2 * CHUNK)
    former.map(chunks(3, 4), 1)
    later.map(chunks(4, 5), 1)
    assert signal_of_child("read", former.address + CHUNK) == signal.SIGSEGV
    assert signal_of_child("read", later.address) == 0
    former.map(chunks(6, 7), 2)
    assert signal_of_child("read", later.address) == 0
    former.close()
    later.close()


def test_what_is_shared_is_in_both_ranges(arena: ArenaRig) -> None:
    one, two = arena.open(2 * CHUNK), arena.open(2 * CHUNK)
    fill(arena, chunks(3), 7)
    one.map(chunks(3, 4), 1, shared=(0,))
    two.map(chunks(3, 5), 1, shared=(0,))
    assert image(one)[:CHUNK] == image(two)[:CHUNK] == b"\7" * CHUNK
    one.close()
    assert image(two)[:CHUNK] == b"\7" * CHUNK
    two.close()


def test_a_part_may_lie_twice_in_one_image(arena: ArenaRig) -> None:
    mapping = arena.open(3 * CHUNK)
    fill(arena, chunks(3), 7)
    fill(arena, chunks(4), 8)
    mapping.map(chunks(3, 4, 3), 1, shared=(0, 2))
    assert image(mapping) == b"\7" * CHUNK + b"\10" * CHUNK + b"\7" * CHUNK
    mapping.map(chunks(3, 5, 6), 2, shared=(0,))
    assert image(mapping)[:CHUNK] == b"\7" * CHUNK
    mapping.close()


def test_closing_twice_is_harmless_and_a_closed_mapping_cannot_be_used(arena: ArenaRig) -> None:
    mapping = arena.open(CHUNK + PAGE_BYTES)
    mapping.close()
    mapping.close()
    with pytest.raises(AssertionError):
        mapping.map(chunks(0, 1), 1)
