"""Page tables that move with their chunks: right bytes wherever they went, and faults spared."""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_probe import permissions

from overcommit.runtime import _shm
from overcommit.runtime.arena import Mapping
from overcommit.runtime.config import PAGE_BYTES
from overcommit.runtime.memory import create_memfd
from overcommit.runtime.page_tables import UNIT, PageTables

UNITS = 8
MARKS = (0, UNIT // 2, UNIT - 1)  # where a unit says which one it is


@pytest.fixture(scope="module")
def arena() -> Iterator[int]:
    fd = create_memfd("test", UNITS * UNIT)
    with mmap.mmap(fd, UNITS * UNIT) as memory:
        for unit in range(UNITS):
            for mark in MARKS:
                memory[unit * UNIT + mark] = unit + 1
    yield fd
    os.close(fd)


def seen(mapping: Mapping) -> list[int]:
    """Which units lie there, in order."""
    view = mapping.view()
    units = []
    for start in range(0, mapping.nbytes, UNIT):
        marks = {view[start + mark] for mark in MARKS if start + mark < mapping.nbytes}
        (unit,) = marks
        units.append(unit - 1)
    view.release()
    return units


def extents(units: list[int]) -> list[tuple[int, int]]:
    return [(unit * UNIT, UNIT) for unit in units]


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_a_chunk_brings_its_page_tables_to_the_next_version(arena: int) -> None:
    tables = PageTables(arena)
    first, second = Mapping(tables, 2 * UNIT), Mapping(tables, 2 * UNIT)
    first.map([(0, 2 * UNIT)], 1)
    second.map([(0, 2 * UNIT)], 1)
    assert tables.moved_bytes == 2 * UNIT
    before = faults()
    assert seen(second) == [0, 1]
    total = sum(second.view()[::PAGE_BYTES])
    assert total > 0
    assert faults() - before < 2 * UNIT // PAGE_BYTES // 16, "every page would have faulted"
    assert permissions(first.address) == "---p", "who lost its chunks must not read another's"
    for mapping in (first, second):
        mapping.close()
    assert len(tables) == 0


def test_a_version_that_changes_the_order_of_its_own_chunks_is_right(arena: int) -> None:
    tables = PageTables(arena)
    mapping = Mapping(tables, 4 * UNIT)
    for order in ([0, 1, 2, 3], [1, 0, 3, 2], [3, 2, 1, 0], [0, 2, 1, 3], [4, 0, 1, 2]):
        mapping.map(extents(order), 1)
        assert seen(mapping) == order
    mapping.close()


def test_the_last_unit_may_be_used_in_part_and_small_versions_share_units(arena: int) -> None:
    tables = PageTables(arena)
    large = Mapping(tables, UNIT + PAGE_BYTES)
    large.map(extents([5, 6]), 1)
    assert seen(large) == [5, 6]
    small = Mapping(tables, PAGE_BYTES)
    small.map([(6 * UNIT, PAGE_BYTES)], 1)
    assert small.view()[0] == 7
    assert seen(large) == [5, 6], "a slab does not take a unit away"
    small.map([(5 * UNIT, PAGE_BYTES)], 2)
    assert small.view()[0] == 6
    for mapping in (large, small):
        mapping.close()
    assert len(tables) == 0


def test_what_was_mapped_ahead_counts_only_while_nothing_else_was_mapped(arena: int) -> None:
    tables = PageTables(arena)
    first, second = Mapping(tables, 2 * UNIT), Mapping(tables, UNIT)
    where = ((0, UNIT), (3 * UNIT, UNIT))
    assert not first.is_at(where, 1, ())
    first.map(where, 1, shared=())
    assert first.is_at(where, 1, ())
    assert not first.is_at(where, 2, ())
    assert not first.is_at(where, 1, (0,))
    assert not first.is_at(where[::-1], 1, ())
    # The load failed, and another version has got a chunk of it.
    second.map(where[1:], 1)
    assert permissions(first.address + UNIT) == "---p"
    assert not first.is_at(where, 1, ()), "half of it is not mapped any more"
    first.map(where, 1, shared=())
    assert (first.is_at(where, 1, ()), seen(first)) == (True, [0, 3])
    second.close()
    assert not first.is_at(where, 1, ())
    first.map(where, 1, shared=())
    first.unmap()
    assert not first.is_at(where, 1, ())
    first.close()
    assert len(tables) == 0


def mover_of(nbytes_max: int) -> Callable[[int, int, int], None]:
    """A kernel that moves no more than this at once."""
    move = _shm.move_fixed

    def try_move(source: int, destination: int, nbytes: int) -> None:
        if nbytes > nbytes_max:
            raise OSError(14, "Bad address")
        move(source, destination, nbytes)

    return try_move


def test_where_the_kernel_cannot_move_everything_is_mapped_anew(
    arena: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_shm, "move_fixed", mover_of(0))
    tables = PageTables(arena)
    first, second = Mapping(tables, 3 * UNIT), Mapping(tables, 3 * UNIT)
    first.map([(0, 3 * UNIT)], 1)
    second.map([(UNIT, 3 * UNIT)], 1)
    assert seen(second) == [1, 2, 3]
    assert tables.moved_bytes == 0
    assert permissions(first.address) == "r--s"
    assert permissions(first.address + UNIT) == "---p", "another's weights can be read there"
    first.map([(UNIT, 3 * UNIT)], 2)
    assert seen(first) == [1, 2, 3]
    for mapping in (first, second):
        mapping.close()


def test_where_the_kernel_moves_parts_of_a_range_only_they_are_moved_one_by_one(
    arena: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_shm, "move_fixed", mover_of(UNIT))
    tables = PageTables(arena)
    first, second = Mapping(tables, 3 * UNIT), Mapping(tables, 3 * UNIT)
    first.map([(0, 3 * UNIT)], 1)
    second.map([(UNIT, 3 * UNIT)], 1)
    assert seen(second) == [1, 2, 3]
    assert tables.moved_bytes == 2 * UNIT
    assert permissions(first.address + UNIT) == "---p"
    for mapping in (first, second):
        mapping.close()
    assert len(tables) == 0


def test_versions_that_share_a_chunk_have_it_at_the_same_time(arena: int) -> None:
    tables = PageTables(arena)
    first, second = Mapping(tables, 3 * UNIT), Mapping(tables, 2 * UNIT + PAGE_BYTES)
    first.map(extents([0, 1, 2]), 1)  # alone
    second.map([(0, 2 * UNIT), (7 * UNIT, PAGE_BYTES)], 1, shared={0})
    assert (seen(first), seen(second)) == ([0, 1, 2], [0, 1, 7])
    assert tables.moved_bytes == 0
    before = faults()
    second.map([(0, 2 * UNIT), (6 * UNIT, PAGE_BYTES)], 2, shared={0})
    assert seen(second) == [0, 1, 6]
    assert faults() - before < 8, "what is there already is not mapped again"
    first.close()
    assert seen(second) == [0, 1, 6], "it loses nothing when the other goes"
    second.close()
    assert len(tables) == 0


def test_chunks_that_were_shared_are_taken_from_all_when_one_alone_gets_them(arena: int) -> None:
    tables = PageTables(arena)
    mappings = [Mapping(tables, 2 * UNIT) for _ in range(4)]
    for mapping in mappings[:3]:
        mapping.map(extents([3, 4]), 1, shared={0, 1})
    mappings[3].map(extents([4, 5]), 1)
    assert seen(mappings[3]) == [4, 5]
    for mapping in mappings[:3]:
        assert permissions(mapping.address) == "r--s"
        assert permissions(mapping.address + UNIT) == "---p", "another's weights can be read there"
    mappings[1].map(extents([3, 2]), 2)
    assert [permissions(m.address) for m in mappings[:3]] == ["---p", "r--s", "---p"]
    for mapping in mappings:
        mapping.close()
    assert len(tables) == 0
    assert not tables._more


def test_a_part_may_come_twice_in_one_version(arena: int) -> None:
    tables = PageTables(arena)
    mapping = Mapping(tables, 4 * UNIT)
    mapping.map(extents([1, 2, 1, 2]), 1, shared={0, 1, 2, 3})
    assert seen(mapping) == [1, 2, 1, 2]
    mapping.map(extents([1, 2, 3, 4]), 2)
    assert seen(mapping) == [1, 2, 3, 4]
    mapping.close()
    assert len(tables) == 0


@pytest.mark.parametrize("moves_max", [0, UNIT, UNITS * UNIT])
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.permutations(range(UNITS)), st.sampled_from("unmap")),
        max_size=40,
    )
)
@settings(deadline=None)
def test_whatever_moves_where_each_version_reads_its_own(
    arena: int, moves_max: int, steps: list[tuple[int, list[int], str]]
) -> None:
    """Steps are (mapping, order of the units, u: unmap, n or m: share nothing, a or p: share it)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_shm, "move_fixed", mover_of(moves_max))
        move_about(arena, steps)


def move_about(arena: int, steps: list[tuple[int, list[int], str]]) -> None:
    tables = PageTables(arena)
    sizes = (1, 2, 3, 5)
    mappings = [Mapping(tables, size * UNIT - PAGE_BYTES) for size in sizes]
    placed: list[list[int]] = [[] for _ in sizes]
    for number, order, step in steps:
        mapping, mine = mappings[number], order[: sizes[number]]
        shared = range(len(mine)) if step in "ap" else ()
        if step == "u":
            mapping.unmap()
            mine = []
        else:
            mapping.map(extents(mine), 1, populate=False, shared=shared)
        placed[number] = mine
        for other in range(len(sizes)):
            if other != number and set(placed[other]) & set(mine) and not shared:
                placed[
                    other
                ] = []  # its chunks are another's now: it is placed again before it runs
            if placed[other]:
                assert seen(mappings[other]) == placed[other]
        held = [(address, unit) for unit, address in tables._address_of.items()]
        held += [(address, unit) for unit, more in tables._more.items() for address in more]
        assert dict(held) == tables._unit_at
        assert len(held) == len(tables._unit_at)
        assert all(tables._more.values())
    for mapping in mappings:
        mapping.close()
    assert len(tables) == 0
