"""One load step by step: where bytes go, fall-backs, turns, and the order of ends."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mover_rig import WATCHDOG_S, Memory, flip_byte, make_image

from overcommit.runtime import _shm, image, loading
from overcommit.runtime.arena import Arena
from overcommit.runtime.config import KIB, MIB, PAGE_BYTES, READ_BYTES
from overcommit.runtime.errors import ImageError
from overcommit.runtime.loading import OPEN, Base, LoadState, Outcome, Places
from overcommit.runtime.messages import Extents, Load, LoadDone, Message, Populated
from overcommit.runtime.mover import LoadQueue, Mover

ARENA_BYTES = 32 * MIB


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory("device", ARENA_BYTES)
    yield made
    made.close()


def base(memory: Memory, name: str = "device") -> Base:
    return Base(name, memory.address, memory.arena.nbytes)


def state_of(memory: Memory, path: Path, payload: bytes, job: int = 1) -> LoadState:
    load = Load(
        job=job,
        slot=0,
        source="disk",
        path=str(path),
        nbytes=len(payload),
        device=((0, ARENA_BYTES),),
    )
    return LoadState(load, base(memory), None)


def run_all(state: LoadState) -> LoadDone:
    """Do every step, one after the other."""
    while (step := state.take()) is not None:
        state.finish(state.run(step))
    return state.close()


def scatter(pages: list[int], cuts: list[int]) -> Extents:
    """Extents over these arena pages, in this order; neighbours are joined except at the cuts."""
    extents: list[tuple[int, int]] = []
    for index, page in enumerate(pages):
        at = page * PAGE_BYTES
        if extents and sum(extents[-1]) == at and index not in cuts:
            extents[-1] = (extents[-1][0], extents[-1][1] + PAGE_BYTES)
        else:
            extents.append((at, PAGE_BYTES))
    return tuple(extents)


# --- where bytes go -----------------------------------------------------------------------------
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_extents_get_the_image_and_nothing_else_changes(
    data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (image, loading):  # many pieces from few bytes
        monkeypatch.setattr(module, "READ_BYTES", 16 * KIB)
    arena_pages = 48
    nbytes = data.draw(st.integers(1, arena_pages * PAGE_BYTES))
    path = tmp_path / "an.image"
    payload = make_image(path, nbytes, seed=nbytes)
    count = len(payload) // PAGE_BYTES
    device, host = (Memory(name, arena_pages * PAGE_BYTES) for name in ("device", "host"))
    places: dict[str, Extents] = {}
    expected: dict[str, bytearray] = {}
    for name, memory in (("device", device), ("host", host)):
        memory.fill(0xEE)
        run = data.draw(st.integers(0, arena_pages - count))
        is_scattered = data.draw(st.booleans())
        order = random.Random(data.draw(st.integers(0, 99))).sample(range(arena_pages), count)
        pages = order if is_scattered else list(range(run, run + count))
        places[name] = scatter(pages, data.draw(st.lists(st.integers(1, count), max_size=4)))
        expected[name] = bytearray(memory.view)
        for index, page in enumerate(pages):
            part = payload[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]
            expected[name][page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = part
    load = Load(
        job=1,
        slot=0,
        source="disk",
        path=str(path),
        nbytes=len(payload),
        host=places["host"],
        device=places["device"],
    )
    done = run_all(LoadState(load, base(device), base(host, "host")))
    assert (done.ok, done.message, done.read_bytes) == (True, "", len(payload))
    assert device.view == expected["device"]
    assert host.view == expected["host"]
    for memory in (device, host):
        memory.close()


def test_spans_cross_extents_in_the_image_s_order() -> None:
    places = Places(Base("device", 1 << 40, 100), ((50, 10), (0, 5), (80, 20)), 30)
    at = 1 << 40
    assert places.spans(0, 10) == [(at + 50, 10)]
    assert places.spans(8, 9) == [(at + 58, 2), (at, 5), (at + 80, 2)]
    assert places.spans(10, 1) == [(at, 1)]
    assert places.spans(29, 1) == [(at + 94, 1)]


def test_a_load_into_an_arena_that_is_not_there_is_refused() -> None:
    with pytest.raises(ImageError, match="does not have"):
        Places(None, ((0, 1),), 1)


# --- reading ------------------------------------------------------------------------------------
def refuse_direct_open(path: str, flags: int, *rest: int) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return REAL_OPEN(path, flags, *rest)


REAL_OPEN = os.open
REAL_PREADV = os.preadv


def test_where_open_refuses_direct_reads_the_load_is_buffered(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = make_image(tmp_path / "an.image", READ_BYTES + 1)
    monkeypatch.setattr(os, "open", refuse_direct_open)
    done = run_all(state_of(memory, tmp_path / "an.image", payload))
    assert (done.ok, done.direct) == (True, False)
    assert memory.view[: len(payload)] == payload


def test_where_the_first_direct_read_is_refused_all_threads_fall_back(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = make_image(tmp_path / "an.image", 3 * READ_BYTES)
    state = state_of(memory, tmp_path / "an.image", payload)
    assert state.take() == OPEN
    state.finish(state.run(OPEN))
    direct_fd = state._direct_fd
    refused = threading.Barrier(3, timeout=WATCHDOG_S)

    def preadv(fd: int, views: Sequence[memoryview], at: int) -> int:
        if fd == direct_fd:
            refused.wait()  # all three have asked before the first falls back
            raise OSError(errno.EINVAL, "Invalid argument")
        return REAL_PREADV(fd, views, at)

    monkeypatch.setattr(os, "preadv", preadv)
    before = len(os.listdir("/proc/self/fd"))
    outcomes: dict[int, Outcome] = {}

    def run(piece: int) -> None:
        outcomes[piece] = state.run(piece)

    pieces = [state.take() for _ in range(3)]
    threads = [threading.Thread(target=run, args=(piece,)) for piece in pieces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG_S)
    assert len(os.listdir("/proc/self/fd")) == before + 1, "opened once"
    assert [state.finish(outcomes[piece]) for piece in range(3)] == [False, False, True]
    done = state.close()
    assert (done.ok, done.message, done.direct) == (True, "", False)
    assert memory.view[: len(payload)] == payload


def test_short_reads_are_continued(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = make_image(tmp_path / "an.image", 100 * KIB)

    def preadv(fd: int, views: Sequence[memoryview], at: int) -> int:
        return REAL_PREADV(fd, [views[0][:5000]], at)  # ends inside a page

    monkeypatch.setattr(os, "preadv", preadv)
    done = run_all(state_of(memory, tmp_path / "an.image", payload))
    assert (done.ok, done.message, done.direct) == (True, "", False)
    assert memory.view[: len(payload)] == payload


def test_a_file_cut_off_after_it_was_opened_fails_its_load(memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "an.image"
    payload = make_image(path, 2 * READ_BYTES)
    state = state_of(memory, path, payload)
    assert state.take() == OPEN
    state.finish(state.run(OPEN))
    os.truncate(path, path.stat().st_size - PAGE_BYTES)
    done = run_all(state)
    assert not done.ok
    assert "cut off" in done.message


def test_a_disk_error_names_the_file(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "an.image"
    payload = make_image(path, 10)

    def preadv(fd: int, views: Sequence[memoryview], at: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)
    done = run_all(state_of(memory, path, payload))
    assert done.message == f"{path} cannot be read: Input/output error"


# --- states -------------------------------------------------------------------------------------
def test_no_piece_is_taken_before_the_image_is_open(memory: Memory, tmp_path: Path) -> None:
    payload = make_image(tmp_path / "an.image", 10)
    state = state_of(memory, tmp_path / "an.image", payload)
    assert state.take() == OPEN
    assert state.take() is None
    assert not state.finish(state.run(OPEN))
    assert state.take() == 0
    assert state.take() is None
    assert state.finish(state.run(0))
    assert state.close().ok


def test_a_failed_load_is_over_only_when_its_running_pieces_are(
    memory: Memory, tmp_path: Path
) -> None:
    path = tmp_path / "an.image"
    payload = make_image(path, 4 * READ_BYTES - PAGE_BYTES)
    flip_byte(path, 1)
    state = state_of(memory, path, payload)
    assert state.take() == OPEN
    state.finish(state.run(OPEN))
    first, second, third = state.take(), state.take(), state.take()
    assert (first, second, third) == (0, 1, 2)
    assert not state.finish(state.run(0))
    assert state.take() is None, "no new piece of a load that has failed"
    assert not state.finish(state.run(1))
    assert state.finish(state.run(2))
    fds = len(os.listdir("/proc/self/fd"))
    done = state.close()
    assert not done.ok
    assert "piece 0" in done.message
    assert len(os.listdir("/proc/self/fd")) == fds - 1


def test_loads_take_turns_piece_by_piece(memory: Memory, tmp_path: Path) -> None:
    loads = LoadQueue()
    assert loads.try_take() is None
    for job in range(3):
        path = tmp_path / f"{job}.image"
        loads.add(state_of(memory, path, make_image(path, (1 + job % 2) * READ_BYTES), job))
    turns = []
    while (taken := loads.try_take()) is not None:
        state, step = taken
        turns.append((state.load.job, step))
        if loads.finish(state, state.run(step)):
            assert state.close().ok
    opened = [(job, OPEN) for job in range(3)]
    assert turns == [*opened, (0, 0), (1, 0), (2, 0), (1, 1)]
    assert len(loads) == 0


# --- threads ------------------------------------------------------------------------------------
def wait_for(mover: Mover, kind: type[Message]) -> None:
    while not isinstance(mover.outbox.get(timeout=WATCHDOG_S), kind):
        pass


def test_background_population_waits_while_a_load_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Memory("device", 192 * MIB)
    path = tmp_path / "an.image"
    payload = make_image(path, 10)
    log: list[str] = []
    in_step, step_may_end = threading.Event(), threading.Event()
    in_read, read_may_end = threading.Event(), threading.Event()

    def populate(address: int, nbytes: int, writable: bool) -> None:
        log.append("populate")
        in_step.set()
        step_may_end.wait(WATCHDOG_S)

    def preadv(fd: int, views: Sequence[memoryview], at: int) -> int:
        in_read.set()
        read_may_end.wait(WATCHDOG_S)
        log.append("read")
        return REAL_PREADV(fd, views, at)

    monkeypatch.setattr(_shm, "populate", populate)
    monkeypatch.setattr(os, "preadv", preadv)
    arena = Arena.from_fd(os.dup(device.arena.fd), device.arena.nbytes)
    mover = Mover(arena, None)
    assert in_step.wait(WATCHDOG_S)
    mover.add(state_of(device, path, payload).load)
    assert in_read.wait(WATCHDOG_S), "a load does not wait for the population"
    step_may_end.set()
    read_may_end.set()
    wait_for(mover, Populated)
    mover.close()
    arena.close()
    assert log == ["populate", "read", "populate", "populate"]
    device.close()
