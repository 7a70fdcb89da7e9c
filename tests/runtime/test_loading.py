"""One load step by step: where bytes go, fall-backs, turns, and the order of ends."""

from __future__ import annotations

import errno
import os
import queue
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mover_rig import WATCHDOG_S, Memory, flip_byte, make_image

from overcommit.runtime import _shm, container, image_file, loading
from overcommit.runtime.arena import Arena
from overcommit.runtime.config import (
    COPY_BYTES_MAX,
    KIB,
    MIB,
    PAGE_BYTES,
    READ_BYTES,
    READS_IN_FLIGHT,
)
from overcommit.runtime.errors import ImageError
from overcommit.runtime.loading import LoadState, Outcome, State, Step, Work
from overcommit.runtime.messages import Extents, Message
from overcommit.runtime.mover import POPULATE_NICE, Mover
from overcommit.runtime.mover_messages import CANCELLED, Load, LoadDone, Populated, Urgency
from overcommit.runtime.places import Base, Places
from overcommit.runtime.prefetch_limits import PREFETCH_READS_IN_FLIGHT

ARENA_BYTES = 32 * MIB


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory("device", ARENA_BYTES)
    yield made
    made.close()


def base(memory: Memory, name: str = "device") -> Base:
    return Base(name, memory.address, memory.arena.nbytes)


def state_of(
    memory: Memory, path: Path, payload: bytes, job: int = 1, urgency: Urgency = "foreground"
) -> LoadState:
    load = Load(
        job=job,
        slot=0,
        source="disk",
        path=str(path),
        nbytes=len(payload),
        device=((0, ARENA_BYTES),),
        urgency=urgency,
    )
    return LoadState(load, base(memory), None)


def take(state: LoadState) -> Step | None:
    """Take a read, else what needs no disk."""
    return state.take_read() or state.take_copy()


def do(state: LoadState, step: Step | None) -> bool:
    """Do one step; True when the load is over."""
    assert step is not None
    return state.finish(step, state.run(step))


def run_all(state: LoadState) -> LoadDone:
    """Do every step, one after the other."""
    while (step := take(state)) is not None:
        do(state, step)
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
    for module in (container, image_file, loading):  # many pieces from few bytes
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
    do(state, state.take_read())
    direct_fd = state._file._direct_fd
    refused = threading.Barrier(3, timeout=WATCHDOG_S)

    def preadv(fd: int, views: Sequence[memoryview], at: int) -> int:
        if fd == direct_fd:
            refused.wait()  # all three have asked before the first falls back
            raise OSError(errno.EINVAL, "Invalid argument")
        return REAL_PREADV(fd, views, at)

    monkeypatch.setattr(os, "preadv", preadv)
    before = len(os.listdir("/proc/self/fd"))
    outcomes: dict[Step, Outcome] = {}

    def run(step: Step) -> None:
        outcomes[step] = state.run(step)

    reads = [step for _ in range(3) if (step := state.take_read()) is not None]
    threads = [threading.Thread(target=run, args=(step,)) for step in reads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG_S)
    assert len(os.listdir("/proc/self/fd")) == before + 1, "opened once"
    assert [state.finish(step, outcomes[step]) for step in reads] == [False, False, False]
    done = run_all(state)
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
    do(state, state.take_read())
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
def test_no_piece_is_read_before_the_image_is_open(memory: Memory, tmp_path: Path) -> None:
    payload = make_image(tmp_path / "an.image", 2 * READ_BYTES)
    state = state_of(memory, tmp_path / "an.image", payload)
    opening = state.take_read()
    assert opening == Step(Work.OPEN)
    assert take(state) is None
    assert not do(state, opening)
    assert take(state) == Step(Work.READ, 0, READ_BYTES)


def test_an_image_of_one_piece_is_loaded_in_one_step_with_one_read(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = make_image(tmp_path / "an.image", 10_000)
    reads: list[tuple[int, int]] = []

    def preadv(fd: int, views: Sequence[memoryview], at: int) -> int:
        reads.append((at, len(views)))
        return REAL_PREADV(fd, views, at)

    monkeypatch.setattr(os, "preadv", preadv)
    state = state_of(memory, tmp_path / "an.image", payload)
    step = state.take_read()
    assert step is not None
    assert step.work is Work.WHOLE
    assert take(state) is None
    assert do(state, step)
    assert state.close().ok
    assert reads == [(0, 2)]
    assert memory.view[: len(payload)] == payload


def test_a_piece_is_copied_on_while_later_ones_are_read(memory: Memory, tmp_path: Path) -> None:
    host = Memory("host", ARENA_BYTES)
    payload = make_image(tmp_path / "an.image", 3 * READ_BYTES)
    load = Load(
        job=1,
        slot=0,
        source="disk",
        path=str(tmp_path / "an.image"),
        nbytes=len(payload),
        host=((0, ARENA_BYTES),),
        device=((0, ARENA_BYTES),),
    )
    state = LoadState(load, base(memory), base(host, "host"))
    do(state, state.take_read())
    first, second = state.take_read(), state.take_read()
    assert second is not None
    do(state, first)
    settle = state.take_copy()
    assert settle == Step(Work.SETTLE, 0, READ_BYTES)
    assert not do(state, settle)  # while `second` is under way, and the third is not yet asked for
    assert memory.view[:READ_BYTES] == payload[:READ_BYTES]
    assert state.take_copy() is None
    do(state, second)
    assert run_all(state).ok
    assert memory.view[: len(payload)] == payload
    host.close()


def test_a_load_has_no_more_reads_in_flight_than_its_urgency_allows(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (container, image_file, loading):
        monkeypatch.setattr(module, "READ_BYTES", 16 * KIB)
    path = tmp_path / "an.image"
    payload = make_image(path, 20 * 16 * KIB)

    def reads_of(state: LoadState) -> int:
        count = 0
        while state.take_read() is not None:
            count += 1
        return count

    for urgency, limit in (("foreground", READS_IN_FLIGHT), ("prefetch", PREFETCH_READS_IN_FLIGHT)):
        state = state_of(memory, path, payload, 1, urgency)  # type: ignore[arg-type]
        do(state, state.take_read())
        assert reads_of(state) == limit


def test_ranges_of_a_copy_shrink_towards_the_end_and_cover_the_image(memory: Memory) -> None:
    host = Memory("host", ARENA_BYTES)
    load = Load(
        job=1,
        slot=0,
        source="host",
        path="/nowhere",
        nbytes=30 * MIB,
        host=((0, ARENA_BYTES),),
        device=((0, ARENA_BYTES),),
    )
    state = LoadState(load, base(memory), base(host, "host"))
    steps = []
    while (step := take(state)) is not None:
        steps.append(step)
    assert [step.start for step in steps] == [
        sum(step.nbytes for step in steps[:n]) for n in range(len(steps))
    ]
    assert sum(step.nbytes for step in steps) == 30 * MIB
    assert [step.nbytes for step in steps] == sorted((s.nbytes for s in steps), reverse=True)
    assert max(step.nbytes for step in steps) <= COPY_BYTES_MAX
    host.close()


def test_a_failed_load_is_over_only_when_its_running_pieces_are(
    memory: Memory, tmp_path: Path
) -> None:
    path = tmp_path / "an.image"
    payload = make_image(path, 4 * READ_BYTES - PAGE_BYTES)
    flip_byte(path, 1)
    state = state_of(memory, path, payload)
    do(state, state.take_read())
    first, second, third = (state.take_read() for _ in range(3))
    assert not do(state, first)
    settle = state.take_copy()
    assert not do(state, settle), "the digest is wrong, but two reads still run"
    assert take(state) is None, "no new piece of a load that has failed"
    assert not do(state, second)
    assert do(state, third)
    fds = len(os.listdir("/proc/self/fd"))
    done = state.close()
    assert not done.ok
    assert "piece 0" in done.message
    assert len(os.listdir("/proc/self/fd")) == fds - 1


def test_a_cancelled_load_ends_with_its_last_running_step(memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "an.image"
    payload = make_image(path, 3 * READ_BYTES)
    untouched, running = state_of(memory, path, payload), state_of(memory, path, payload)
    assert untouched.cancel()
    assert take(untouched) is None
    assert (untouched.close().ok, untouched.close().message) == (False, CANCELLED)
    do(running, running.take_read())
    read = running.take_read()
    assert not running.cancel()
    assert take(running) is None
    assert do(running, read)
    assert running.state is State.FAILED
    assert running.close().message == CANCELLED


# --- threads ------------------------------------------------------------------------------------
def wait_for(sent: queue.SimpleQueue[Message], kind: type[Message]) -> None:
    while not isinstance(sent.get(timeout=WATCHDOG_S), kind):
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
    sent: queue.SimpleQueue[Message] = queue.SimpleQueue()
    mover = Mover(Base("device", arena.map_all(True), arena.nbytes), None, sent.put)
    assert in_step.wait(WATCHDOG_S)
    mover.add(state_of(device, path, payload).load)
    assert in_read.wait(WATCHDOG_S), "a load does not wait for the population"
    step_may_end.set()
    read_may_end.set()
    wait_for(sent, Populated)
    mover.close()
    arena.close()
    assert log == ["populate", "read", "populate", "populate"]
    device.close()


def test_pages_are_touched_at_a_low_priority_where_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int, int]] = []

    def refuse(which: int, who: int, priority: int) -> None:
        asked.append((which, who, priority))
        raise PermissionError("not here")

    monkeypatch.setattr(os, "setpriority", refuse)
    device = Memory("device", 4 * MIB)
    arena = Arena.from_fd(os.dup(device.arena.fd), device.arena.nbytes)
    sent: queue.SimpleQueue[Message] = queue.SimpleQueue()
    mover = Mover(Base("device", arena.map_all(True), arena.nbytes), None, sent.put)
    wait_for(sent, Populated)
    mover.close()
    arena.close()
    device.close()
    ((which, thread, priority),) = asked
    assert (which, priority) == (os.PRIO_PROCESS, POPULATE_NICE)
    assert thread != os.getpid(), "the thread alone, not the mover"
