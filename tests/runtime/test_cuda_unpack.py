"""Packed weights to the GPU, on the fake driver: by the kernel's own source, in slots, whatever fails."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda_rig import started
from fake_driver import FakeDriver, FakeGpu
from fake_unpacker import FakeUnpacker, Kernel, by_cpu
from kernel_rig import needs_gcc, on_host
from mover_rig import Memory, make_packed_image

from overcommit.kernels import _unpack
from overcommit.kernels.unpack import SOURCE
from overcommit.runtime import _shm, cuda_copy, gpu_probe
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.chunks import Chunks
from overcommit.runtime.config import COPIES_IN_FLIGHT, MIB
from overcommit.runtime.cuda_arena import CudaArena
from overcommit.runtime.cuda_copy import CudaCopier
from overcommit.runtime.driver import DriverError, Stream
from overcommit.runtime.loading import LoadState
from overcommit.runtime.messages import Extents
from overcommit.runtime.mover_messages import Load, LoadDone, Urgency
from overcommit.runtime.places import Base
from overcommit.runtime.prefetch_limits import PREFETCH_COPIES_IN_FLIGHT

WATCHDOG_S = 60.0
HOST_BYTES = 24 * MIB
PIN = 12 * MIB
DEVICE: Extents = ((40 * MIB, 8 * MIB), (0, 12 * MIB))
HOST: Extents = ((2 * MIB, 2 * MIB), (10 * MIB, 12 * MIB))


class Box:
    """A mover's process on the fake driver."""

    def __init__(self) -> None:
        self.driver: FakeDriver = started(FakeGpu())
        chunks = Chunks(self.driver, ChunkTable(64 * MIB), 0)
        while not chunks.is_complete:
            os.close(chunks.make())
        self.arena = CudaArena(chunks)
        self.device = Base("device", self.arena.map_all(True), 64 * MIB)
        self.memory = Memory("host", HOST_BYTES)
        self.host = Base("host", self.memory.address, HOST_BYTES)
        self.unpacker = FakeUnpacker(self.driver)
        self.driver.unpacker = lambda device: self.unpacker  # type: ignore[method-assign, assignment]
        self.copier = CudaCopier(self.driver, 0, self.host.address)
        for at in range(0, HOST_BYTES, PIN):
            self.copier.pin(self.host.address + at, PIN)

    def run(self, load: Load) -> LoadDone:
        state = LoadState(load, self.device, self.host, self.copier)
        while not state.is_over:
            step = state.take_read() or state.take_copy()
            assert step is not None
            state.finish(step, state.run(step))
        return state.close()

    def on_device(self, nbytes: int) -> bytes:
        found = (bytes(_shm.view(self.device.address + at, n, False)) for at, n in DEVICE)
        return b"".join(found)[:nbytes]

    def wipe(self) -> None:
        for at, nbytes in DEVICE:
            _shm.view(self.device.address + at, nbytes, True)[:] = bytes(nbytes)

    def close(self) -> None:
        self.driver.may_finish.set()
        self.driver.die()
        self.memory.close()


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    monkeypatch.setattr(cuda_copy, "PIN_BYTES", PIN)
    monkeypatch.setattr(cuda_copy, "READ_THREADS", 1)
    made = Box()
    yield made
    made.close()


def load_of(path: Path, nbytes: int, size: int, source: str = "disk", **fields: object) -> Load:
    values = {"job": 1, "slot": 0, "source": source, "path": str(path), "device": DEVICE}
    values |= {"verify": False, **fields}
    return Load(nbytes=nbytes, packed_bytes=size, **values)  # type: ignore[arg-type]


def by_source() -> Kernel:
    """The kernel's own text, compiled for the CPU."""
    kernel = on_host(SOURCE, "unpack")

    def run(packed: int, target: int, first: int, count: int) -> None:
        kernel((count, 1), _unpack.STREAMS, packed, target, first)

    return run


@needs_gcc
@pytest.mark.parametrize("host", [HOST, None])
def test_the_kernel_writes_what_was_packed(box: Box, tmp_path: Path, host: Extents | None) -> None:
    box.unpacker.kernel = by_source()
    data, size = make_packed_image(tmp_path / "file", 9 * MIB + 4096)
    assert box.run(load_of(tmp_path / "file", len(data), size, host=host)).ok
    assert box.on_device(len(data)) == data
    assert len(box.unpacker.launches) == 2


@pytest.mark.parametrize("nbytes", [3 * MIB, 17 * MIB + 4096])
@pytest.mark.parametrize("host", [HOST, None])
@pytest.mark.parametrize("decodes", [True, False])
def test_packed_weights_reach_the_device_from_disk_and_from_host(
    box: Box, tmp_path: Path, nbytes: int, host: Extents | None, decodes: bool
) -> None:
    if not decodes:
        box.driver.unpacker = lambda device: None  # type: ignore[method-assign, assignment]
    data, size = make_packed_image(tmp_path / "file", nbytes)
    done = box.run(load_of(tmp_path / "file", nbytes, size, host=host))
    assert (done.ok, done.message, done.read_bytes) == (True, "", size)
    assert box.on_device(nbytes) == data
    copied = sum(n for _, _, n in box.driver.copies)
    assert copied == (size if decodes else nbytes), "bytes over the link"
    if host is not None:
        box.wipe()
        assert box.run(load_of(tmp_path / "file", nbytes, size, "host", host=host)).ok
        assert box.on_device(nbytes) == data
    assert bool(box.unpacker.launches) is decodes


def test_what_the_device_decoded_is_read_back_and_checked(box: Box, tmp_path: Path) -> None:
    data, size = make_packed_image(tmp_path / "file", 9 * MIB)

    def wrong(packed: int, target: int, first: int, count: int) -> None:
        by_cpu(packed, target, first, count)
        _shm.view(target + 5000, 1, True)[:] = b"?"

    box.unpacker.kernel = wrong
    load = load_of(tmp_path / "file", len(data), size, host=HOST, verify=True)
    done = box.run(load)
    assert not done.ok
    assert "not decoded to what" in done.message
    assert box.run(load_of(tmp_path / "file", len(data), size, host=HOST, verify=False)).ok


def test_no_copy_reaches_over_two_registrations(box: Box, tmp_path: Path) -> None:
    data, size = make_packed_image(tmp_path / "file", 17 * MIB)
    host: Extents = ((4 * MIB, 16 * MIB),)
    assert box.run(load_of(tmp_path / "file", len(data), size, host=host)).ok
    borders = [box.host.address + PIN]
    for _, source, nbytes in box.driver.copies:
        assert not any(source < border < source + nbytes for border in borders)


@pytest.mark.parametrize("urgency", ["foreground", "prefetch"])
def test_a_few_pieces_are_in_flight_and_no_more(box: Box, tmp_path: Path, urgency: Urgency) -> None:
    nbytes = 1 * MIB
    _, size = make_packed_image(tmp_path / "file", nbytes)
    assert box.run(load_of(tmp_path / "file", nbytes, size, host=HOST, device=None)).ok
    most = COPIES_IN_FLIGHT if urgency == "foreground" else PREFETCH_COPIES_IN_FLIGHT
    source = [(box.host.address + HOST[0][0], size)]

    def unpack(number: int) -> None:
        target = [(box.device.address + number * nbytes, nbytes)]
        box.copier.unpack(source, target, 0, urgency)

    unpack(0)
    box.driver.may_finish.clear()
    box.unpacker.launches.clear()
    threads = [threading.Thread(target=unpack, args=(n,), daemon=True) for n in range(most + 2)]
    for thread in threads:
        thread.start()
    pause = threading.Event()
    for _ in range(int(WATCHDOG_S / 0.002)):
        if len(box.unpacker.launches) == most:
            break
        pause.wait(0.002)
    assert len(box.unpacker.launches) == most
    box.driver.may_finish.set()
    for thread in threads:
        thread.join(WATCHDOG_S)
    assert len(box.unpacker.launches) == most + 2
    weights = bytes(_shm.view(box.device.address, nbytes, False))
    for number in range(1, most + 2):
        assert bytes(_shm.view(box.device.address + number * nbytes, nbytes, False)) == weights


def test_after_a_failure_at_any_call_nothing_is_in_flight(box: Box, tmp_path: Path) -> None:
    data, size = make_packed_image(tmp_path / "file", 17 * MIB)
    assert box.run(load_of(tmp_path / "file", len(data), size, host=HOST)).ok
    again = load_of(tmp_path / "file", len(data), size, "host", host=HOST)
    before = len(box.driver.calls)
    assert box.run(again).ok
    calls = len(box.driver.calls) - before
    assert calls > 10
    for number in range(1, calls + 1):
        box.driver.fail_at(number)
        with pytest.raises(DriverError):
            box.run(again)
        unpacking = box.copier._unpacking
        assert unpacking is not None
        assert len(unpacking._places._free) == COPIES_IN_FLIGHT
        box.wipe()
        assert box.run(again).ok
        assert box.on_device(len(data)) == data


@pytest.mark.parametrize("number", [1, 4, 9, 14])
def test_a_mover_that_dies_at_a_call_has_its_load_repeated(
    box: Box, tmp_path: Path, number: int
) -> None:
    data, size = make_packed_image(tmp_path / "file", 17 * MIB)
    assert box.run(load_of(tmp_path / "file", len(data), size, host=HOST)).ok
    stored = box.memory.read(HOST, size)
    again = load_of(tmp_path / "file", len(data), size, "host", host=HOST)
    box.driver.die_at(number)
    with pytest.raises(BaseException, match=r"cu"):
        box.run(again)
    assert box.memory.read(HOST, size) == stored
    successor = Box()
    try:
        successor.memory.write(HOST, stored)
        assert successor.run(again).ok
        assert successor.on_device(len(data)) == data
    finally:
        successor.close()


def test_the_probe_asks_what_packing_gains_only_where_it_matters(box: Box) -> None:
    box.unpacker = FakeUnpacker(box.driver, gain=1.4)
    (found,) = gpu_probe.look(box.driver, [0], asks_gain=True)
    assert (found.why, found.unpack_gain) == ("", 1.4)
    (found,) = gpu_probe.look(box.driver, [0])
    assert found.unpack_gain == 0.0
    box.driver.unpacker = lambda device: None  # type: ignore[method-assign, assignment]
    (found,) = gpu_probe.look(box.driver, [0], asks_gain=True)
    assert (found.why, found.unpack_gain) == ("", 0.0)


def test_a_kernel_that_writes_elsewhere_is_refused(box: Box) -> None:
    stream = box.driver.stream_create(is_urgent=True)
    with pytest.raises(DriverError, match="may not write"):
        box.unpacker.launch(box.unpacker.allocate(MIB), 4096, 0, 1, Stream(stream))
