"""Placing in one piece: every allocation is a run, and the books balance whatever is given back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.allocator import Extent
from overcommit.runtime.config import KIB, LARGE_CHUNK_BYTES, MIB, SMALL_CHUNK_BYTES
from overcommit.runtime.holdings import Holdings
from overcommit.runtime.parts import PartInfo, PartTable
from overcommit.runtime.residents import Terms, Version
from overcommit.runtime.run_allocator import RunAllocator

CAPACITY = 2 * LARGE_CHUNK_BYTES + 6 * MIB


def test_the_first_run_that_is_long_enough_is_taken() -> None:
    arena = RunAllocator(CAPACITY)
    held = [arena.try_allocate(20 * MIB) for _ in range(6)]
    assert [e and e[0].offset for e in held] == [n * 20 * MIB for n in range(6)]
    assert arena.try_allocate(20 * MIB) is None
    for number in (1, 3, 4):
        extents = held[number]
        assert extents is not None
        arena.free(extents)
    arena.check()
    assert arena.try_allocate(30 * MIB) == ((60 * MIB, 30 * MIB),), "20 MiB are too short"
    assert arena.try_allocate(34 * MIB) is None, "enough bytes, and no run"


@given(
    st.lists(
        st.tuples(
            st.sampled_from([8 * KIB, 900 * KIB, 3 * MIB, 30 * MIB, 64 * MIB, 100 * MIB]),
            st.integers(0, 50),
            st.integers(1, 31),
        ),
        max_size=60,
    )
)
def test_the_books_balance_when_runs_are_given_back_in_pieces(
    steps: list[tuple[int, int, int]],
) -> None:
    arena = RunAllocator(CAPACITY)
    held: list[Extent] = []
    for nbytes, number, cut in steps:
        if number < len(held):
            offset, length = held.pop(number)
            at = min(cut * SMALL_CHUNK_BYTES, length) if length >= SMALL_CHUNK_BYTES else length
            arena.free([(offset, at)])
            if length > at:
                held.append(Extent(offset + at, length - at))
        elif (extents := arena.try_allocate(nbytes)) is not None:
            (extent,) = extents
            assert all(sum(extent) <= e.offset or sum(e) <= extent.offset for e in held)
            held.append(extent)
        arena.check()
    for extent in held:
        arena.free([extent])
    arena.check()
    assert (arena.used_bytes, arena.try_allocate(CAPACITY)) == (0, ((0, CAPACITY),))


def test_parts_of_a_version_lie_behind_each_other_and_are_nobody_elses() -> None:
    arena = RunAllocator(CAPACITY)
    holdings, table = Holdings(arena), PartTable(shares=False)
    infos = [PartInfo("a", 5 * MIB), PartInfo("b", 20 * MIB)]
    versions = [
        Version(slot, "m", 27 * MIB, Terms(), 0, table.parts_of(27 * MIB, infos)) for slot in (0, 1)
    ]
    for version in versions:
        assert holdings.try_hold(version, version.parts)
        extents, shared = holdings.extents_of(version.parts)
        start = version.slot * 28 * MIB
        assert extents == (
            (start, 6 * MIB),
            (start + 6 * MIB, 20 * MIB),
            (start + 26 * MIB, 2 * MIB),
        )
        assert not shared
    first = versions[0]
    holdings.let_go(first, first.parts)
    table.forget(first.parts)
    arena.check()
    assert arena.used_bytes == 28 * MIB
