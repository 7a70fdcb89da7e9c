"""The mover as a process: every way of loading, every way of failing, and its death."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from mover_rig import LAUNCH, WATCHDOG_S, Memory, MoverProcess, flip_byte, make_image

from overcommit.runtime.config import MIB, PAGE_BYTES, READ_BYTES, SMALL_CHUNK_BYTES
from overcommit.runtime.messages import Extents, Stop
from overcommit.runtime.mover_messages import (
    CANCELLED,
    CancelLoad,
    Load,
    LoadDone,
    PromoteLoad,
)

ARENA_BYTES = 144 * MIB


def chunks(seed: int, nbytes: int) -> Extents:
    """Enough 2 MiB chunks for so much, scattered over the arena."""
    order = list(range(ARENA_BYTES // SMALL_CHUNK_BYTES))
    random.Random(seed).shuffle(order)
    count = -(-nbytes // SMALL_CHUNK_BYTES)
    return tuple((chunk * SMALL_CHUNK_BYTES, SMALL_CHUNK_BYTES) for chunk in order[:count])


# Image bytes, host extents, device extents: the three ways in which the allocator places images.
PLACEMENTS: dict[str, tuple[int, Extents, Extents]] = {
    "slab": (
        300_001,
        ((2 * MIB + 7 * PAGE_BYTES, 74 * PAGE_BYTES),),
        ((6 * MIB + 100 * PAGE_BYTES, 74 * PAGE_BYTES),),
    ),
    "scattered 2 MiB": (21 * MIB + 12_345, chunks(1, 22 * MIB), chunks(2, 22 * MIB)),
    "64 MiB and a tail": (
        65 * MIB + 1,
        ((64 * MIB, 64 * MIB), (10 * MIB, 2 * MIB)),
        ((2 * MIB, 2 * MIB), (64 * MIB, 64 * MIB)),
    ),
}


@pytest.fixture(scope="module")
def memories() -> Iterator[tuple[Memory, Memory]]:
    device, host = Memory("device", ARENA_BYTES), Memory("host", ARENA_BYTES)
    yield device, host
    device.close()
    host.close()


@pytest.fixture(scope="module")
def mover(memories: tuple[Memory, Memory]) -> Iterator[MoverProcess]:
    process = MoverProcess(*memories)
    yield process
    process.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, bytes]]:
    """For each placement an image file and its payload."""
    folder = tmp_path_factory.mktemp("images")
    return {
        name: (folder / f"{number}.image", make_image(folder / f"{number}.image", nbytes, number))
        for number, (name, (nbytes, _, _)) in enumerate(PLACEMENTS.items())
    }


def load_of(job: int, path: Path, payload: bytes, **fields: object) -> Load:
    values = {"source": "disk", "slot": 0, **fields}
    return Load(job=job, path=str(path), nbytes=len(payload), **values)  # type: ignore[arg-type]


# --- the three paths ----------------------------------------------------------------------------
@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("verify", [True, False])
def test_a_load_through_the_host_tier_leaves_the_image_in_both(
    name: str,
    verify: bool,
    mover: MoverProcess,
    memories: tuple[Memory, Memory],
    images: dict[str, tuple[Path, bytes]],
) -> None:
    device, host = memories
    device.fill(1)
    host.fill(2)
    path, payload = images[name]
    _, in_host, in_device = PLACEMENTS[name]
    done = mover.load(load_of(1, path, payload, host=in_host, device=in_device, verify=verify))
    assert (done.ok, done.message) == (True, "")
    assert done.read_bytes == len(payload)
    assert done.read_ns > 0
    assert done.copy_ns > 0
    assert host.read(in_host, len(payload)) == payload
    assert device.read(in_device, len(payload)) == payload


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_load_without_a_host_copy_leaves_the_host_tier_alone(
    name: str,
    mover: MoverProcess,
    memories: tuple[Memory, Memory],
    images: dict[str, tuple[Path, bytes]],
) -> None:
    device, host = memories
    device.fill(1)
    host.fill(2)
    path, payload = images[name]
    in_device = PLACEMENTS[name][2]
    done = mover.load(load_of(2, path, payload, device=in_device))
    assert (done.ok, done.copy_ns) == (True, 0)
    assert device.read(in_device, len(payload)) == payload
    assert bytes(host.view) == b"\2" * ARENA_BYTES


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_load_from_the_host_tier_reads_no_file(
    name: str,
    mover: MoverProcess,
    memories: tuple[Memory, Memory],
    images: dict[str, tuple[Path, bytes]],
) -> None:
    device, host = memories
    device.fill(1)
    _, payload = images[name]
    _, in_host, in_device = PLACEMENTS[name]
    host.write(in_host, payload)
    load = load_of(3, Path("/nowhere"), payload, source="host", host=in_host, device=in_device)
    done = mover.load(load)
    assert (done.ok, done.read_bytes, done.read_ns) == (True, 0, 0)
    assert device.read(in_device, len(payload)) == payload


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_is_on_device_alone_is_copied_to_host_and_no_file_is_read(
    placement: str, memories: tuple[Memory, Memory], mover: MoverProcess
) -> None:
    device, host = memories
    nbytes, on_host, on_device = PLACEMENTS[placement]
    data = random.Random(nbytes).randbytes(-(-nbytes // PAGE_BYTES) * PAGE_BYTES)
    device.write(on_device, data)
    host.fill(0)
    load = Load(
        job=70,
        slot=0,
        source="device",
        path="/no/such/file",
        nbytes=len(data),
        host=on_host,
        device=on_device,
        urgency="prefetch",
    )
    done = mover.load(load)
    assert (done.ok, done.message, done.read_bytes) == (True, "", 0)
    assert host.read(on_host, len(data)) == data


def test_a_load_writes_nothing_but_its_image(
    mover: MoverProcess, memories: tuple[Memory, Memory], images: dict[str, tuple[Path, bytes]]
) -> None:
    device, _ = memories
    device.fill(7)
    path, payload = images["slab"]
    ((start, _),) = in_device = PLACEMENTS["slab"][2]
    assert mover.load(load_of(4, path, payload, device=in_device)).ok
    expected = bytearray(b"\7" * ARENA_BYTES)
    expected[start : start + len(payload)] = payload
    assert device.view == expected


def test_several_loads_at_once_all_end_once(
    mover: MoverProcess, memories: tuple[Memory, Memory], tmp_path: Path
) -> None:
    device, _ = memories
    device.fill(0)
    order = chunks(5, 4 * 12 * MIB)
    loads: dict[int, tuple[Load, bytes]] = {}
    for job in range(4):
        path = tmp_path / f"{job}.image"
        payload = make_image(path, 12 * MIB - job * 1000, job)
        extents = order[job * 6 : (job + 1) * 6]
        loads[job] = load_of(job, path, payload, device=extents), payload
    for load, _ in loads.values():
        mover.control.send(load)
    done = [mover.receive(LoadDone) for _ in loads]
    assert sorted(report.job for report in done) == list(loads)
    assert all(report.ok for report in done)
    for load, payload in loads.values():
        assert load.device is not None
        assert device.read(load.device, load.nbytes) == payload


def test_a_load_without_device_fills_the_host_tier_alone(
    mover: MoverProcess, memories: tuple[Memory, Memory], images: dict[str, tuple[Path, bytes]]
) -> None:
    device, host = memories
    device.fill(1)
    host.fill(2)
    path, payload = images["64 MiB and a tail"]
    in_host = PLACEMENTS["64 MiB and a tail"][1]
    done = mover.load(load_of(5, path, payload, host=in_host, urgency="prefetch"))
    assert (done.ok, done.read_bytes, done.copy_ns) == (True, len(payload), 0)
    assert done.received_ns <= done.began_ns < done.ended_ns
    assert host.read(in_host, len(payload)) == payload
    assert bytes(device.view) == b"\1" * ARENA_BYTES


# --- urgency ------------------------------------------------------------------------------------
class Pipe:
    """An image that is a named pipe: the load's open waits until the test lets it go on."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path

    def release(self) -> None:
        """Let whoever opens it go on, and see that it is no image."""
        self.fd = os.open(self.path, os.O_RDWR)
        os.write(self.fd, bytes(4096))

    def close(self) -> None:
        """The load is over."""
        os.close(self.fd)


def test_a_cancelled_load_ends_as_cancelled_once_its_running_step_has(
    mover: MoverProcess, tmp_path: Path
) -> None:
    pipe = Pipe(tmp_path / "a.pipe")
    places: Extents = ((0, 64 * MIB),)
    mover.control.send(load_of(30, pipe.path, bytes(64 * MIB), device=places))
    mover.control.send(CancelLoad(job=30))
    mover.control.send(CancelLoad(job=77))  # nobody's
    # Messages are taken in order: when this one has ended, the others were seen.
    at: Extents = ((0, PAGE_BYTES),)
    by_host = load_of(31, pipe.path, bytes(PAGE_BYTES), source="host", host=at, device=at)
    mover.control.send(by_host)
    first = mover.receive(LoadDone)
    pipe.release()
    ends = {done.job: done for done in (first, mover.receive(LoadDone))}
    assert (ends[30].ok, ends[30].message) == (False, CANCELLED)
    assert ends[31].ok
    pipe.close()


def test_a_prefetch_waits_for_the_foreground_unless_it_is_promoted_or_cancelled(
    mover: MoverProcess, memories: tuple[Memory, Memory], images: dict[str, tuple[Path, bytes]]
) -> None:
    pipe = Pipe(images["slab"][0].with_name("foreground.pipe"))
    path, payload = images["64 MiB and a tail"]
    _, in_host, in_device = PLACEMENTS["64 MiB and a tail"]
    foreground = load_of(40, pipe.path, bytes(64 * MIB), device=((80 * MIB, 64 * MIB),))
    mover.control.send(foreground)  # wants the disk until the pipe is released
    for job in (41, 42):
        mover.control.send(load_of(job, path, payload, device=in_device, urgency="prefetch"))
    mover.control.send(CancelLoad(job=41))
    mover.control.send(PromoteLoad(job=42))
    cancelled = mover.receive(LoadDone)
    assert (cancelled.job, cancelled.ok, cancelled.read_bytes) == (41, False, 0)
    promoted = mover.receive(LoadDone)
    assert (promoted.job, promoted.ok) == (42, True)
    mover.control.send(load_of(43, path, payload, host=in_host, urgency="prefetch"))
    pipe.release()
    order = [mover.receive(LoadDone) for _ in range(2)]
    pipe.close()
    assert [(done.job, done.ok) for done in order] == [(40, False), (43, True)]
    assert order[1].began_ns >= order[0].ended_ns
    assert memories[0].read(in_device, len(payload)) == payload


# --- failures -----------------------------------------------------------------------------------
def test_a_failed_digest_names_the_file_and_the_piece_and_a_repaired_file_loads(
    mover: MoverProcess, memories: tuple[Memory, Memory], tmp_path: Path
) -> None:
    path = tmp_path / "bad.image"
    payload = make_image(path, 3 * READ_BYTES)
    extents: Extents = ((0, 3 * READ_BYTES),)
    flip_byte(path, 2 * READ_BYTES + 99)
    done = mover.load(load_of(10, path, payload, device=extents))
    assert not done.ok
    assert str(path) in done.message
    assert "piece 2" in done.message
    assert mover.load(load_of(11, path, payload, device=extents, verify=False)).ok
    flip_byte(path, 2 * READ_BYTES + 99)
    assert mover.load(load_of(12, path, payload, device=extents)).ok
    assert memories[0].read(extents, len(payload)) == payload


def test_files_that_are_wrong_fail_their_load_and_no_other(
    mover: MoverProcess, memories: tuple[Memory, Memory], tmp_path: Path
) -> None:
    good, short, other, torn = (tmp_path / f"{name}.image" for name in ("g", "s", "o", "t"))
    payload = make_image(good, 5 * MIB)
    for path in (short, torn):
        make_image(path, 5 * MIB)
    os.truncate(short, short.stat().st_size - 1)
    os.truncate(torn, 20)
    make_image(other, 4 * MIB)
    extents: Extents = ((0, 6 * MIB),)
    wanted = {
        good: "",
        short: "cut off",
        torn: "too short for an image",
        other: "was replaced",
        tmp_path / "gone.image": "is gone from the cache",
    }
    for job, path in enumerate(wanted):
        at: Extents = ((job * 6 * MIB, 6 * MIB),)
        mover.control.send(load_of(job, path, payload, device=at))
    done = {report.job: report for report in (mover.receive(LoadDone) for _ in wanted)}
    for job, (path, reason) in enumerate(wanted.items()):
        assert done[job].ok == (path == good)
        assert reason in done[job].message
        assert done[job].ok or str(path) in done[job].message
    assert memories[0].read(extents, len(payload)) == payload


@pytest.mark.parametrize(
    "fields",
    [
        {"device": ((ARENA_BYTES - PAGE_BYTES, 6 * MIB),)},
        {"device": ((-PAGE_BYTES, 6 * MIB),)},
        {"device": ((0, 4 * MIB),)},
        {"device": ()},
        {"host": ((0, 6 * MIB),), "source": "host"},
        {"device": ((0, 6 * MIB),), "source": "host"},
        {},
    ],
)
def test_a_load_that_makes_no_sense_fails_and_the_mover_lives(
    fields: dict[str, object], mover: MoverProcess, tmp_path: Path
) -> None:
    path = tmp_path / "an.image"
    payload = make_image(path, 5 * MIB)
    done = mover.load(load_of(20, path, payload, **fields))
    assert not done.ok
    assert str(path) in done.message
    assert mover.process.poll() is None


# --- life and death -----------------------------------------------------------------------------
@pytest.fixture
def small() -> Iterator[Memory]:
    memory = Memory("small", 80 * MIB)
    yield memory
    memory.close()


def test_a_mover_killed_in_a_load_can_be_replaced_and_the_job_repeated(
    small: Memory, tmp_path: Path
) -> None:
    path = tmp_path / "an.image"
    payload = make_image(path, 64 * MIB + 5)
    extents: Extents = ((6 * MIB, 66 * MIB),)
    load = load_of(1, path, payload, device=extents)
    first = MoverProcess(small, None)
    first.wait_populated()
    first.control.send(load)
    # Until the first piece is coming in; a report says that all is over, so that this ends.
    while not small.view[6 * MIB + 100] and first.control.try_receive() is None:
        assert first.process.poll() is None
    first.kill()
    first.close()
    second = MoverProcess(small, None)
    done = second.load(load)
    second.close()
    assert done.ok
    assert small.read(extents, len(payload)) == payload


def test_populated_comes_when_every_page_exists(small: Memory) -> None:
    host = Memory("host", 4 * MIB)
    mover = MoverProcess(small, host)
    assert mover.wait_populated().seconds > 0
    for memory in (small, host):
        assert os.fstat(memory.arena.fd).st_blocks * 512 >= memory.arena.nbytes
    mover.close()
    host.close()


def test_a_mover_stops_when_told(small: Memory) -> None:
    mover = MoverProcess(small, None)
    assert mover.ready.pid == mover.process.pid
    mover.control.send(Stop())
    assert mover.process.wait(WATCHDOG_S) == 0
    mover.close()


def test_a_mover_goes_when_its_supervisor_is_gone(small: Memory) -> None:
    mover = MoverProcess(small, None)
    mover.control.close()
    mover.process.wait(WATCHDOG_S)


def test_a_bug_in_an_io_thread_ends_the_process_not_only_the_thread(
    small: Memory, tmp_path: Path
) -> None:
    break_it = "import overcommit.runtime.loading as l; l.LoadState.run = None;"
    mover = MoverProcess(small, None, break_it + LAUNCH)
    payload = make_image(tmp_path / "an.image", 10)
    mover.control.send(load_of(1, tmp_path / "an.image", payload, device=((0, SMALL_CHUNK_BYTES),)))
    assert mover.process.wait(WATCHDOG_S) == 1
    mover.close()
