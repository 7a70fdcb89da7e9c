"""Arenas and mappings: stable addresses over moving memory."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_probe import permissions, signal_of_child

from overcommit.runtime import _shm
from overcommit.runtime.arena import Arena, Mapping
from overcommit.runtime.config import PAGE_BYTES
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.page_tables import UNIT, PageTables

# It is read-only on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")

ARENA_PAGES = 64


class Writer:
    """An arena with a writable mapping, as the mover has it."""

    def __init__(self, nbytes: int) -> None:
        self.arena = Arena.create("test", nbytes)
        self.bytes = _shm.view(self.arena.map_all(True), nbytes, True)

    def fill(self, extents: list[tuple[int, int]], value: int) -> None:
        for offset, length in extents:
            self.bytes[offset : offset + length] = bytes([value]) * length


@pytest.fixture
def writer() -> Iterator[Writer]:
    made = Writer(ARENA_PAGES * PAGE_BYTES)
    yield made
    made.bytes.release()
    made.arena.close()


def pages(*numbers: int) -> list[tuple[int, int]]:
    return [(number * PAGE_BYTES, PAGE_BYTES) for number in numbers]


# --- arenas -------------------------------------------------------------------------------------
@pytest.mark.parametrize("nbytes", [0, PAGE_BYTES, 2 * ARENA_PAGES * PAGE_BYTES])
def test_a_sealed_arena_cannot_change_its_size(writer: Writer, nbytes: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(writer.arena.fd, nbytes)


def test_two_processes_may_map_one_arena(writer: Writer) -> None:
    other = Arena.from_fd(os.dup(writer.arena.fd), writer.arena.nbytes)
    seen = _shm.view(other.map_all(False), other.nbytes, False)
    writer.bytes[12345] = 77
    assert seen[12345] == 77
    seen.release()
    other.close()


def test_a_descriptor_that_is_too_short_is_refused(writer: Writer) -> None:
    with pytest.raises(ProtocolError, match="descriptor of"):
        Arena.from_fd(writer.arena.fd, writer.arena.nbytes + PAGE_BYTES)


def test_closing_an_arena_gives_its_addresses_back() -> None:
    arena = Arena.create("test", PAGE_BYTES)
    address = arena.map_all(True)
    assert permissions(address) == "rw-s"
    arena.close()
    assert permissions(address) is None


# --- mappings -----------------------------------------------------------------------------------
def test_numpy_and_torch_views_see_the_new_bytes_at_the_old_address(writer: Writer) -> None:
    mapping = Mapping(PageTables(writer.arena.fd), 3 * PAGE_BYTES)
    first, second = pages(5, 1, 9), pages(20, 21, 3)
    writer.fill(first, 1)
    writer.fill(second, 2)
    mapping.map(first, 1)
    array = np.frombuffer(mapping.view(), dtype=np.uint8)
    tensor = torch.frombuffer(mapping.view(), dtype=torch.uint8)
    address = mapping.address
    assert tensor.data_ptr() == array.ctypes.data == address
    assert int(array.sum()) == int(tensor.sum()) == 3 * PAGE_BYTES

    mapping.unmap()
    mapping.map(second, 2)
    assert (mapping.address, mapping.generation) == (address, 2)
    assert tensor.data_ptr() == array.ctypes.data == address
    assert int(array.sum()) == int(tensor.sum()) == 6 * PAGE_BYTES
    mapping.close()


def test_a_new_placement_replaces_the_old_one_without_an_unmap(writer: Writer) -> None:
    mapping = Mapping(PageTables(writer.arena.fd), 2 * PAGE_BYTES)
    writer.fill(pages(7, 8), 9)
    mapping.map(pages(0, 1), 1)
    mapping.map([(7 * PAGE_BYTES, 2 * PAGE_BYTES)], 2)
    assert bytes(mapping.view()) == b"\x09" * 2 * PAGE_BYTES
    mapping.close()


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_extents_appear_one_after_the_other(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, ARENA_PAGES))
    order = data.draw(st.permutations(range(ARENA_PAGES)))[:count]
    nbytes = data.draw(st.integers((count - 1) * PAGE_BYTES + 1, count * PAGE_BYTES))
    populate = data.draw(st.booleans())
    writer = Writer(ARENA_PAGES * PAGE_BYTES)
    for number in range(ARENA_PAGES):
        writer.fill(pages(number), number)
    mapping = Mapping(PageTables(writer.arena.fd), nbytes)
    mapping.map(pages(*order), 1, populate)
    seen = bytes(mapping.view())
    assert seen == b"".join(bytes([number]) * PAGE_BYTES for number in order)[:nbytes]
    mapping.close()
    writer.bytes.release()
    writer.arena.close()


def test_extents_longer_than_the_image_are_mapped_as_far_as_it_goes(writer: Writer) -> None:
    mapping = Mapping(PageTables(writer.arena.fd), PAGE_BYTES + 1)
    mapping.map([(0, 8 * PAGE_BYTES), (8 * PAGE_BYTES, PAGE_BYTES)], 1)
    assert len(mapping.view()) == PAGE_BYTES + 1
    assert permissions(mapping.address + PAGE_BYTES) == "r--s"
    assert permissions(mapping.address + 2 * PAGE_BYTES) is None
    mapping.close()


def test_short_extents_are_refused_and_nothing_stays_mapped(writer: Writer) -> None:
    mapping = Mapping(PageTables(writer.arena.fd), 3 * PAGE_BYTES)
    mapping.map(pages(0, 1, 2), 1)
    with pytest.raises(ValueError, match="extents hold"):
        mapping.map(pages(4, 5), 2)
    assert mapping.generation is None
    assert permissions(mapping.address) == "---p"
    mapping.close()


def test_populate_faults_every_page_in(writer: Writer) -> None:
    mapping = Mapping(PageTables(writer.arena.fd), 16 * PAGE_BYTES)
    resident = {}
    for populate in (False, True):
        mapping.unmap()
        mapping.map([(0, 16 * PAGE_BYTES)], 1, populate)
        resident[populate] = resident_bytes(mapping.address)
    assert resident == {False: 0, True: 16 * PAGE_BYTES}
    mapping.close()


def resident_bytes(address: int) -> int:
    """How much of the mapping that starts here has page table entries, by /proc/self/smaps."""
    is_inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if line.startswith(f"{address:x}-"):
                is_inside = True
            elif is_inside and line.startswith("Rss:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("not mapped")


# --- protection ---------------------------------------------------------------------------------
def test_writing_to_a_mapping_kills_the_writer(writer: Writer) -> None:
    mapping = Mapping(PageTables(writer.arena.fd), PAGE_BYTES)
    mapping.map(pages(3), 1)
    view = mapping.view()
    assert view.readonly
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 1
    assert signal_of_child("read", mapping.address) == 0
    assert signal_of_child("write", mapping.address) == signal.SIGSEGV
    mapping.close()


def test_reading_evicted_weights_kills_the_reader(writer: Writer) -> None:
    mapping = Mapping(PageTables(writer.arena.fd), PAGE_BYTES)
    mapping.map(pages(3), 1)
    mapping.unmap()
    assert mapping.generation is None
    assert signal_of_child("read", mapping.address) == signal.SIGSEGV
    mapping.close()


# --- the end ------------------------------------------------------------------------------------
def test_the_address_range_outlives_its_mapping_until_the_last_view_is_gone(
    writer: Writer,
) -> None:
    mapping = Mapping(PageTables(writer.arena.fd), PAGE_BYTES)
    mapping.map(pages(0), 1)
    address = mapping.address
    tensor = torch.frombuffer(mapping.view(), dtype=torch.float32)
    mapping.close()
    assert permissions(address) == "---p", "a fault, never another version's bytes"
    del tensor
    gc.collect()
    assert permissions(address) is None


def test_closing_twice_is_harmless_and_a_closed_mapping_cannot_be_used(writer: Writer) -> None:
    mapping = Mapping(PageTables(writer.arena.fd), PAGE_BYTES)
    mapping.close()
    mapping.close()
    with pytest.raises(AssertionError):
        mapping.map(pages(0), 1)
    with pytest.raises(AssertionError):
        mapping.view()


def test_a_mapping_that_is_dropped_without_being_closed_leaves_no_page_tables_behind() -> None:
    arena = Arena.create("test", 2 * UNIT)
    tables = PageTables(arena.fd)
    Mapping(tables, UNIT).map([(0, UNIT)], 1)
    gc.collect()
    assert len(tables) == 0, "they would be moved from an address that is somebody else's now"
    later = Mapping(tables, UNIT)
    later.map([(0, UNIT)], 1)
    assert later.view()[0] == 0
    later.close()
    arena.close()
