"""What residency places in an arena of whole chunks can be mapped, parts and private rests too."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from cuda_rig import started
from fake_driver import FakeGpu
from hypothesis import given, settings
from hypothesis import strategies as st

from overcommit.runtime import _shm
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.chunks import Chunks
from overcommit.runtime.config import KIB, LARGE_CHUNK_BYTES, MIB, SMALL_CHUNK_BYTES
from overcommit.runtime.cuda_arena import CudaArena, CudaRanges
from overcommit.runtime.holdings import Holdings
from overcommit.runtime.parts import PartInfo, PartTable, round_up
from overcommit.runtime.residents import Extents, Terms, Version

CAPACITY = 4 * LARGE_CHUNK_BYTES
SHARE = 0.5
sizes = st.sampled_from([16 * MIB, 17 * MIB + 4096, 30 * MIB, 64 * MIB, 66 * MIB])


@pytest.fixture(scope="module")
def mapped() -> Iterator[tuple[int, CudaRanges]]:
    """The arena's address in a mover, and ranges over its chunks."""
    driver = started(FakeGpu())
    chunks = Chunks(driver, ChunkTable(CAPACITY, SHARE), 0)
    while not chunks.is_complete:
        os.close(chunks.make())
    arena = CudaArena(chunks)
    yield arena.map_all(True), CudaRanges(chunks)
    arena.close()
    assert driver.gpu.used_bytes() == 0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(sizes, max_size=2), st.sampled_from([0, 8 * KIB, MIB, 3 * MIB, 70 * MIB])
        ).filter(lambda version: version[0] or version[1]),
        min_size=1,
        max_size=4,
    )
)
def test_every_byte_of_a_version_is_at_its_place(
    mapped: tuple[int, CudaRanges], versions: list[tuple[list[int], int]]
) -> None:
    base, ranges = mapped
    holdings = Holdings(ChunkAllocator(CAPACITY, can_split=False, small_share=SHARE))
    table = PartTable()
    marks: dict[int, int] = {}
    for number, (shared_sizes, private) in enumerate(versions):
        infos = tuple(PartInfo(str(size), size) for size in shared_sizes)
        nbytes = sum(round_up(size, SMALL_CHUNK_BYTES) for size in shared_sizes) + private
        parts = table.parts_of(nbytes, infos)
        version = Version(number, f"v{number}", nbytes, Terms(), 0, parts)
        if not holdings.try_hold(version, version.distinct_parts):
            continue
        for part in version.distinct_parts:
            if id(part) not in marks:
                marks[id(part)] = len(marks) + 1
                mark(base, holdings.places[part].extents, part.nbytes, marks[id(part)])
        extents, shared = holdings.extents_of(parts)
        mapping = ranges.open(nbytes)
        mapping.map(extents, 1, shared=shared)
        at = mapping.address
        for part in parts:
            assert set(bytes(_shm.view(at, part.nbytes, False)[::4096])) == {marks[id(part)]}
            at += round_up(part.nbytes, SMALL_CHUNK_BYTES)
        mapping.close()


def mark(base: int, extents: Extents, nbytes: int, value: int) -> None:
    """Write the first byte of each page."""
    for offset, length in extents:
        for at in range(offset, offset + min(nbytes, length), 4096):
            _shm.view(base + at, 1, True)[0] = value
        nbytes = max(0, nbytes - length)
