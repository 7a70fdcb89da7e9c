"""Copies to the GPU on the fake driver: what is in flight, in which order, and what a load does."""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cuda_rig import started
from fake_driver import FakeDriver, FakeGpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mover_rig import Memory, flip_byte, make_image

from overcommit.runtime import _shm, cuda_copy
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.chunks import Chunks
from overcommit.runtime.config import COPIES_IN_FLIGHT, MIB
from overcommit.runtime.copier import pairs
from overcommit.runtime.cuda_arena import CudaArena
from overcommit.runtime.cuda_copy import CudaCopier
from overcommit.runtime.driver import DriverError
from overcommit.runtime.loading import LoadState
from overcommit.runtime.messages import Extents
from overcommit.runtime.mover_messages import Load, LoadDone, Urgency
from overcommit.runtime.places import Base
from overcommit.runtime.prefetch_limits import PREFETCH_COPIES_IN_FLIGHT

WATCHDOG_S = 60.0
HOST_BYTES = 24 * MIB
PIECE = 2 * MIB  # in place of COPY_BYTES_MAX
PIN = 12 * MIB  # in place of PIN_BYTES


class Box:
    """A mover's process: HOST, DEVICE, and a copier between them."""

    def __init__(self) -> None:
        self.driver: FakeDriver = started(FakeGpu())
        table = ChunkTable(64 * MIB)
        chunks = Chunks(self.driver, table, 0)
        while not chunks.is_complete:
            os.close(chunks.make())
        self.arena = CudaArena(chunks)
        self.device = Base("device", self.arena.map_all(True), table.capacity_bytes)
        self.memory = Memory("host", HOST_BYTES)
        self.host = Base("host", self.memory.address, HOST_BYTES)
        self.copier = CudaCopier(self.driver, 0, self.host.address)

    def pin_all(self) -> None:
        for at in range(0, HOST_BYTES, PIN):
            self.copier.pin(self.host.address + at, PIN)

    def on_device(self, extents: Extents, nbytes: int) -> bytes:
        found = (bytes(_shm.view(self.device.address + at, n, False)) for at, n in extents)
        return b"".join(found)[:nbytes]

    def copy(self, nbytes: int, urgency: Urgency, start: int = 0) -> None:
        spans = [(self.host.address + start, nbytes)], [(self.device.address + start, nbytes)]
        self.copier.copy(*spans, urgency)

    def close(self) -> None:
        self.driver.may_finish.set()
        self.driver.die()
        self.memory.close()


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    monkeypatch.setattr(cuda_copy, "COPY_BYTES_MAX", PIECE)
    monkeypatch.setattr(cuda_copy, "PIN_BYTES", PIN)
    monkeypatch.setattr(cuda_copy, "READ_THREADS", 1)
    made = Box()
    yield made
    made.close()


def in_thread(do: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    return thread


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for other threads to get somewhere; the watchdog is the test's own."""
    pause = threading.Event()
    for _ in range(int(WATCHDOG_S / 0.002)):
        if is_so():
            return
        pause.wait(0.002)
    raise AssertionError("it did not come to that")


# --- copies -------------------------------------------------------------------------------------
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_scattered_bytes_arrive_where_they_belong(box: Box, data: st.DataObject) -> None:
    nbytes = data.draw(st.integers(1, HOST_BYTES))
    if data.draw(st.booleans()) and not box.driver.is_registered_at(box.host.address):
        box.pin_all()

    def cut(base: int, capacity: int) -> list[tuple[int, int]]:
        ends = data.draw(st.lists(st.integers(0, nbytes), max_size=4))
        borders = sorted({0, nbytes, *ends})
        lengths = [b - a for a, b in itertools.pairwise(borders)]
        spans, at = [], base
        for length in lengths:
            spans.append((at, length))
            at += length
        return data.draw(st.permutations(spans)) if len(spans) > 1 else spans

    sources = cut(box.host.address, HOST_BYTES)
    targets = cut(box.device.address, box.device.nbytes)
    seed = data.draw(st.integers(0, 1000))
    box.memory.view[:nbytes] = random.Random(seed).randbytes(nbytes)
    box.copier.copy(sources, targets, "foreground")
    sent = b"".join(bytes(_shm.view(at, n, False)) for at, n in sources)
    assert b"".join(bytes(_shm.view(at, n, False)) for at, n in targets) == sent
    assert all(n <= PIECE for _, _, n in box.driver.copies)


def test_a_copy_keeps_a_few_pieces_in_flight_and_no_more(box: Box) -> None:
    box.pin_all()
    box.copy(24 * MIB, "foreground")
    assert max(box.driver.open_max.values()) == COPIES_IN_FLIGHT
    box.driver.open_max.clear()
    box.copy(24 * MIB, "prefetch")
    assert max(box.driver.open_max.values()) == PREFETCH_COPIES_IN_FLIGHT


def test_a_foreground_copy_goes_before_the_rest_of_a_prefetch(box: Box) -> None:
    box.pin_all()
    box.driver.may_finish.clear()
    ahead = in_thread(lambda: box.copy(12 * MIB, "prefetch"))
    wait_until(lambda: len(box.driver.copies) == PREFETCH_COPIES_IN_FLIGHT)
    urgent = in_thread(lambda: box.copy(8 * MIB, "foreground", start=12 * MIB))
    places = COPIES_IN_FLIGHT - PREFETCH_COPIES_IN_FLIGHT
    wait_until(lambda: len(box.driver.copies) == COPIES_IN_FLIGHT)
    started_at = [source - box.host.address for _, source, _ in box.driver.copies]
    assert [at >= 12 * MIB for at in started_at] == [False] * 2 + [True] * places
    box.driver.may_finish.set()
    ahead.join(WATCHDOG_S)
    urgent.join(WATCHDOG_S)
    assert len(box.driver.copies) == 10


def test_no_prefetch_gets_a_place_while_a_foreground_copy_waits(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.pin_all()
    got: list[Urgency] = []
    is_free = box.copier._places._is_free

    def note(urgency: Urgency) -> bool:  # called under the lock: this is the order of the places
        free = is_free(urgency)
        got.extend([urgency] * free)
        return free

    monkeypatch.setattr(box.copier._places, "_is_free", note)
    box.driver.may_finish.clear()
    threads = [in_thread(lambda: box.copy(8 * MIB, "foreground"))]
    wait_until(lambda: len(box.driver.copies) == COPIES_IN_FLIGHT)
    threads.append(in_thread(lambda: box.copy(2 * MIB, "prefetch", start=8 * MIB)))
    threads.append(in_thread(lambda: box.copy(2 * MIB, "foreground", start=16 * MIB)))
    wait_until(lambda: box.copier._places._waiting == 1)
    box.driver.may_finish.set()
    for thread in threads:
        thread.join(WATCHDOG_S)
    assert got == ["foreground"] * 5 + ["prefetch"]


@pytest.mark.parametrize("number", range(1, 37))
def test_after_a_failure_at_any_call_nothing_is_in_flight(box: Box, number: int) -> None:
    box.pin_all()
    box.driver.fail_at(number)  # of 36: a copy, a record and a wait for each of 12 pieces
    with pytest.raises(DriverError):
        box.copy(24 * MIB, "foreground")
    done = len(box.driver.copies)
    box.memory.fill(9)
    box.copy(24 * MIB, "foreground")
    assert box.on_device(((0, 24 * MIB),), 24 * MIB) == b"\x09" * 24 * MIB
    assert len(box.driver.copies) == done + 12
    assert len(box.copier._places._free) == COPIES_IN_FLIGHT


def test_memory_that_cannot_be_registered_is_copied_all_the_same(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    box.driver.fail_at(1)
    box.pin_all()
    assert "slower" in caplog.text
    assert len(box.driver.registered) == 1, "the stages; nobody tries again"
    box.memory.fill(5)
    box.copy(24 * MIB, "foreground")
    assert box.on_device(((0, 24 * MIB),), 24 * MIB) == b"\x05" * 24 * MIB


def test_pairs_of_spans_that_are_cut_differently() -> None:
    assert list(pairs([(0, 5), (100, 3)], [(50, 2), (70, 6)])) == [
        (50, 0, 2),
        (70, 2, 3),
        (73, 100, 3),
    ]


# --- loads --------------------------------------------------------------------------------------
def run_all(state: LoadState) -> LoadDone:
    while not state.is_over:
        step = state.take_read() or state.take_copy()
        assert step is not None
        state.finish(step, state.run(step))
    return state.close()


DEVICE: Extents = ((40 * MIB, 8 * MIB), (0, 12 * MIB))
HOST: Extents = ((2 * MIB, 14 * MIB), (18 * MIB, 4 * MIB))


@pytest.mark.parametrize("nbytes", [3 * MIB, 17 * MIB + 4096])
@pytest.mark.parametrize("host", [HOST, None])
@pytest.mark.parametrize("verify", [True, False])
def test_a_load_from_disk_reaches_the_device(
    box: Box, tmp_path: Path, nbytes: int, host: Extents | None, verify: bool
) -> None:
    data = make_image(tmp_path / "image", nbytes)
    path = str(tmp_path / "image")
    load = Load(
        job=1,
        slot=0,
        source="disk",
        path=path,
        nbytes=nbytes,
        host=host,
        device=DEVICE,
        verify=verify,
    )
    done = run_all(LoadState(load, box.device, box.host, box.copier))
    assert (done.ok, done.message, done.read_bytes) == (True, "", nbytes)
    assert box.on_device(DEVICE, nbytes) == data
    if host is not None:
        assert box.memory.read(host, nbytes) == data
        again = Load(
            job=2, slot=0, source="host", path=path, nbytes=nbytes, host=host, device=DEVICE
        )
        for offset, length in DEVICE:
            _shm.view(box.device.address + offset, length, True)[:] = bytes(length)
        assert run_all(LoadState(again, box.device, box.host, box.copier)).ok
        assert box.on_device(DEVICE, nbytes) == data


def test_damage_is_found_in_the_stage(box: Box, tmp_path: Path) -> None:
    path = tmp_path / "image"
    make_image(path, 17 * MIB)
    flip_byte(path, 9 * MIB)
    load = Load(job=1, slot=0, source="disk", path=str(path), nbytes=17 * MIB, device=DEVICE)
    done = run_all(LoadState(load, box.device, box.host, box.copier))
    assert not done.ok
    assert "digest" in done.message or "damaged" in done.message, done.message


# --- back to HOST -------------------------------------------------------------------------------
@pytest.mark.parametrize("is_pinned", [True, False])
def test_bytes_come_back_from_the_device_where_they_belong(box: Box, is_pinned: bool) -> None:
    if is_pinned:
        box.pin_all()
    data = os.urandom(5 * MIB)
    lies: Extents = ((40 * MIB, 3 * MIB), (MIB, 2 * MIB))
    done = 0
    for at, nbytes in lies:
        _shm.view(box.device.address + at, nbytes, True)[:] = data[done : done + nbytes]
        done += nbytes
    goes: Extents = ((PIN - MIB, 4 * MIB), (20 * MIB, MIB))  # over a border of registrations
    load = Load(
        job=1,
        slot=0,
        source="device",
        path="",
        nbytes=len(data),
        host=goes,
        device=lies,
        urgency="prefetch",
    )
    state = LoadState(load, box.device, box.host, box.copier)
    assert state.take_read() is None, "no file is read"
    while not state.is_over:
        step = state.take_copy()
        assert step is not None
        state.finish(step, state.run(step))
    assert state.close().ok
    assert box.memory.read(goes, len(data)) == data
    assert box.copier._back in box.driver.open_max or not is_pinned, "on a stream of its own"
