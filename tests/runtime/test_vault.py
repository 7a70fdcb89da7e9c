"""The supervisor's descriptors of chunks, and their way over a control socket."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import pytest
from cuda_rig import started
from fake_driver import FakeGpu

from overcommit.runtime import messages
from overcommit.runtime.chunk_exchange import make_chunks, take_chunks
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.chunks import Chunks
from overcommit.runtime.config import CONTROL_FDS_MAX, LARGE_CHUNK_BYTES, SMALL_CHUNK_BYTES
from overcommit.runtime.control import ControlSocket, socket_pair
from overcommit.runtime.cuda_arena import CudaArena
from overcommit.runtime.driver import DriverError
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.messages import ChunksTaken, Message, Ready, Stop
from overcommit.runtime.vault import Vault

# 96 small chunks: more than one message's worth.
TABLE = ChunkTable(3 * LARGE_CHUNK_BYTES, small_share=1.0)
WATCHDOG_S = 60.0


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize(("first", "count"), [(0, 1), (3, 1), (2, 3)])
def test_chunks_that_do_not_follow_are_refused_and_closed(first: int, count: int) -> None:
    vault = Vault(4)
    kept = [os.eventfd(0) for _ in range(2)]
    vault.accept(0, kept)
    strangers = [os.eventfd(0) for _ in range(count)]
    with pytest.raises(ProtocolError, match="chunks"):
        vault.accept(first, strangers)
    assert not any(map(is_open, strangers))
    assert all(map(is_open, kept))
    assert len(vault) == 2
    vault.close()
    assert not any(map(is_open, kept))


def test_chunks_are_made_once_and_taken_over_by_whoever_comes() -> None:
    gpu = FakeGpu()
    vault = Vault(len(TABLE))
    for role in ("mover", "mover", "worker"):
        ours, theirs = (ControlSocket(fd) for fd in socket_pair())
        driver = started(gpu)
        thread = threading.Thread(
            target=serve, args=(theirs, Chunks(driver, TABLE, 0), len(vault), role), daemon=True
        )
        thread.start()
        supervise(ours, vault)
        thread.join(WATCHDOG_S)
        assert vault.is_full
        assert driver.calls.count("cuMemCreate") == (len(TABLE) if driver is gpu.drivers[0] else 0)
        driver.die()
        ours.close()
        theirs.close()
    assert gpu.used_bytes() == TABLE.capacity_bytes
    vault.close()
    assert gpu.used_bytes() == 0


def serve(control: ControlSocket, chunks: Chunks, held: int, role: str) -> None:
    def receive() -> tuple[Message, dict[str, int]]:
        received = control.receive(WATCHDOG_S)
        assert received is not None
        return received

    assert take_chunks(chunks, len(TABLE) if role == "worker" else held, receive, control.send)
    make_chunks(chunks, control.send)
    control.send(Ready(pid=0))


def supervise(control: ControlSocket, vault: Vault) -> None:
    """What the supervisor does with one child until it is ready."""

    def feed(count: int) -> None:
        fds = vault.after(count)
        if fds:
            names = tuple(map(str, range(len(fds))))
            control.send(messages.Chunks(first=count, fds=names), fds)

    feed(0)
    while True:
        received = control.receive(WATCHDOG_S)
        assert received is not None
        message, fds = received
        if isinstance(message, Ready):
            return
        if isinstance(message, messages.Chunks):
            vault.accept(message.first, list(fds.values()))
        else:
            assert isinstance(message, ChunksTaken)
            assert message.count % CONTROL_FDS_MAX == 0 or message.count == vault.count
            feed(message.count)


def test_who_is_told_to_stop_takes_no_more() -> None:
    chunks = Chunks(started(FakeGpu()), TABLE, 0)
    assert not take_chunks(chunks, 5, lambda: (Stop(), {}), refuse_to_send)


def refuse_to_send(message: Message, fds: Sequence[int]) -> None:
    raise AssertionError("nothing was taken")


@pytest.mark.parametrize("first", [1, 0])
def test_after_a_failure_no_descriptor_is_left_open(first: int) -> None:
    gpu = FakeGpu()
    made, taken = Chunks(started(gpu), TABLE, 0), Chunks(started(gpu), TABLE, 0)
    fds = [made.make() for _ in range(3)]
    gpu.drivers[1].fail_at(2)
    message = messages.Chunks(first=first, fds=("a", "b", "c"))
    with pytest.raises((ProtocolError, DriverError)):
        take_chunks(taken, 3, lambda: (message, dict(zip("abc", fds, strict=True))), refuse_to_send)
    assert not any(map(is_open, fds))
    for driver in gpu.drivers:
        driver.die()
    assert gpu.used_bytes() == 0


def test_a_small_arena_is_one_message() -> None:
    chunks = Chunks(started(FakeGpu()), ChunkTable(5 * SMALL_CHUNK_BYTES), 0)
    sent: list[tuple[Message, int]] = []
    make_chunks(chunks, lambda message, fds: sent.append((message, len(fds))))
    assert sent == [
        (messages.Chunks(first=0, count=5, fds=tuple(f"chunk{n}" for n in range(5))), 5)
    ]
    chunks.close()


def test_a_gpu_without_memory_for_all_chunks_has_fewer_and_says_so() -> None:
    driver = started(FakeGpu(3 * SMALL_CHUNK_BYTES))
    chunks = Chunks(driver, ChunkTable(5 * SMALL_CHUNK_BYTES), 0)
    sent: list[messages.Chunks] = []
    kept: list[int] = []

    def send(message: Message, fds: Sequence[int]) -> None:
        assert isinstance(message, messages.Chunks)
        sent.append(message)
        kept.extend(os.dup(fd) for fd in fds)

    make_chunks(chunks, send)
    assert [(message.first, message.count, len(message.fds)) for message in sent] == [(0, 3, 3)]
    assert chunks.is_complete
    assert CudaArena(chunks).nbytes == 3 * SMALL_CHUNK_BYTES
    for fd in kept:
        os.close(fd)
    chunks.close()


def test_a_gpu_without_memory_for_one_chunk_is_an_error() -> None:
    chunks = Chunks(started(FakeGpu(0)), ChunkTable(5 * SMALL_CHUNK_BYTES), 0)
    with pytest.raises(DriverError, match="OUT_OF_MEMORY"):
        make_chunks(chunks, lambda message, fds: None)


def test_who_waits_for_chunks_that_never_come_is_told() -> None:
    chunks = Chunks(started(FakeGpu()), ChunkTable(5 * SMALL_CHUNK_BYTES), 0)
    made = Chunks(started(FakeGpu()), ChunkTable(5 * SMALL_CHUNK_BYTES), 0)
    answers: list[int] = []
    come: list[tuple[Message, dict[str, int]]] = [
        (messages.Chunks(first=0, fds=("chunk0",)), {"chunk0": made.make()}),
        (messages.Chunks(first=1, count=1), {}),
    ]

    def send(message: Message, fds: Sequence[int]) -> None:
        assert isinstance(message, messages.ChunksTaken)
        answers.append(message.count)

    assert take_chunks(chunks, 5, lambda: come.pop(0), send)
    assert (len(chunks), chunks.limit, answers) == (1, 1, [1, 1])
    chunks.close()
    made.close()
