"""DEVICE on the fake driver: the probe, and a real mover process that is killed and succeeded."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda_rig import started
from fake_driver import FakeDriver, FakeGpu
from mover_rig import WATCHDOG_S, Memory, make_image

from overcommit.runtime import _shm, messages
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.config import LARGE_CHUNK_BYTES, MIB, SMALL_CHUNK_BYTES, Settings
from overcommit.runtime.control import ControlSocket, socket_pair
from overcommit.runtime.cuda_tier import open_for_worker, probe
from overcommit.runtime.driver import Result
from overcommit.runtime.messages import ChunksTaken, Extents, Message, Ready, Start, Stop
from overcommit.runtime.mover_messages import Load, LoadDone, Populated
from overcommit.runtime.vault import Vault

CAPACITY = 3 * LARGE_CHUNK_BYTES
TABLE = ChunkTable(CAPACITY)
HOST_BYTES = 32 * MIB
TESTS = str(Path(__file__).parents[1])
LAUNCH = (
    f"import sys; sys.path.insert(0, {TESTS!r});"
    "from overcommit.runtime.mover import main;"
    "main(int(sys.argv[1]))"
)


# --- the probe ----------------------------------------------------------------------------------
def test_a_gpu_that_can_do_everything_is_usable_and_nothing_is_left() -> None:
    driver = FakeDriver(FakeGpu())
    assert probe(driver, 0) == ""
    assert (driver.gpu.used_bytes(), driver.handle_count, driver.reserved_bytes) == (0, 0, 0)


@pytest.mark.parametrize(
    ("gpu", "device", "why"),
    [
        (FakeGpu(has_vmm=False), 0, "no virtual memory management"),
        (FakeGpu(has_fd_export=False), 0, "no export as file descriptors"),
        (FakeGpu(total_bytes=0), 0, "cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY"),
        (FakeGpu(), 1, "there is no GPU 1: the driver shows 1"),
    ],
)
def test_what_is_missing_is_said(gpu: FakeGpu, device: int, why: str) -> None:
    assert why in probe(FakeDriver(gpu), device)


@pytest.mark.parametrize("number", range(1, 12))
def test_a_probe_that_fails_at_any_call_says_why_and_leaves_nothing(number: int) -> None:
    driver = FakeDriver(FakeGpu())
    driver.fail_at(number, Result.UNKNOWN)
    assert "CUDA_ERROR_UNKNOWN" in probe(driver, 0)
    assert (driver.gpu.used_bytes(), driver.handle_count, driver.reserved_bytes) == (0, 0, 0)


# --- processes ----------------------------------------------------------------------------------
class Movers:
    """The supervisor's end: a vault, HOST, and one mover after the other."""

    def __init__(self) -> None:
        self.vault = Vault(len(TABLE))
        self.driver = "gpu_server:open_fake"
        self.host = Memory("host", HOST_BYTES)
        self.process: subprocess.Popen[bytes] | None = None
        self.control: ControlSocket | None = None
        self.unread: list[Message] = []

    def start(self) -> None:
        ours, theirs = socket_pair()
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(theirs)], pass_fds=(theirs,)
        )
        os.close(theirs)
        self.control = ControlSocket(ours)
        self.unread.clear()
        start = Start(
            kind="mover",
            seat=0,
            epoch=1,
            settings=Settings(cuda_driver=self.driver),
            device_bytes=CAPACITY,
            cuda_device=0,
            chunks_held=len(self.vault),
            chunks_count=self.vault.count,
            host_bytes=HOST_BYTES,
            fds=("host",),
        )
        self.control.send(start, [self.host.arena.fd])
        self.feed(0)

    def feed(self, count: int) -> None:
        fds = self.vault.after(count)
        if fds:
            assert self.control is not None
            names = tuple(map(str, range(len(fds))))
            self.control.send(messages.Chunks(first=count, fds=names), fds)

    def receive(self, kind: type[Message]) -> Message:
        """Wait for one message of this kind; do what the supervisor does with chunks."""
        assert self.control is not None
        while True:
            for message in self.unread:
                if isinstance(message, kind):
                    self.unread.remove(message)
                    return message
            received = self.control.receive(WATCHDOG_S)
            assert received is not None, "the mover is silent"
            message, fds = received
            if isinstance(message, messages.Chunks):
                self.vault.accept(message.first, list(fds.values()))
            elif isinstance(message, ChunksTaken):
                self.feed(message.count)
            self.unread.append(message)

    def load(self, load: Load) -> LoadDone:
        assert self.control is not None
        self.control.send(load)
        done = self.receive(LoadDone)
        assert isinstance(done, LoadDone)
        return done

    def kill(self) -> None:
        assert self.process is not None
        assert self.control is not None
        self.process.kill()
        self.process.wait(WATCHDOG_S)
        while True:  # what it said before it died still counts
            try:
                received = self.control.try_receive()
            except EOFError:
                break
            if received is None:
                break
            message, fds = received
            if isinstance(message, messages.Chunks):
                self.vault.accept(message.first, list(fds.values()))
        self.control.close()

    def stop(self) -> None:
        assert self.process is not None
        assert self.control is not None
        self.control.send(Stop())
        assert self.process.wait(WATCHDOG_S) == 0
        self.control.close()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self.vault.close()
        self.host.close()


@pytest.fixture
def movers() -> Iterator[Movers]:
    made = Movers()
    yield made
    made.close()


def test_a_child_whose_socket_has_a_high_number_serves() -> None:
    # As a supervisor that holds thousands of chunks makes it; `select` takes none over 1023.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    ours, theirs = socket_pair()
    high = fcntl.fcntl(theirs, fcntl.F_DUPFD, 2000)
    os.close(theirs)
    host = Memory("host", HOST_BYTES)
    command = [sys.executable, "-P", "-m", "overcommit.runtime.child", "mover", str(high)]
    with subprocess.Popen([*command, str(os.getpid())], pass_fds=(high,)) as process:
        os.close(high)
        control = ControlSocket(ours)
        device = Memory("device", HOST_BYTES)
        start = Start(
            kind="mover",
            seat=0,
            epoch=1,
            settings=Settings(),
            device_bytes=HOST_BYTES,
            host_bytes=HOST_BYTES,
            fds=("device", "host"),
        )
        control.send(start, [device.arena.fd, host.arena.fd])
        while not isinstance((control.receive(WATCHDOG_S) or (None,))[0], Populated):
            pass  # by then it waits for messages
        control.send(Stop())
        assert process.wait(WATCHDOG_S) == 0
        control.close()
    device.close()
    host.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def worker_sees(movers: Movers, extents: Extents, nbytes: int) -> bytes:
    """Map the image in a worker that takes its chunks from the vault."""
    driver = started(FakeGpu())

    def receive() -> tuple[Message, dict[str, int]]:
        fds = [os.dup(fd) for fd in movers.vault.after(taken)]
        names = tuple(map(str, range(len(fds))))
        return messages.Chunks(first=taken, fds=names), dict(zip(names, fds, strict=True))

    taken = 0

    def send(message: Message, fds: object) -> None:
        nonlocal taken
        assert isinstance(message, ChunksTaken)
        taken = message.count

    ranges = open_for_worker(driver, 0, CAPACITY, movers.vault.count, receive, send)
    assert ranges is not None
    mapping = ranges.open(nbytes)
    mapping.map(extents, 1)
    seen = bytes(_shm.view(mapping.address, nbytes, False))
    mapping.close()
    ranges.chunks.close()
    return seen


def test_weights_outlive_the_mover_and_its_successor_goes_on(
    movers: Movers, tmp_path: Path
) -> None:
    small = (SMALL_CHUNK_BYTES * 3, SMALL_CHUNK_BYTES)
    large = (LARGE_CHUNK_BYTES, LARGE_CHUNK_BYTES)
    nbytes = 20 * MIB
    data = make_image(tmp_path / "image", nbytes)
    path = str(tmp_path / "image")
    movers.start()
    movers.receive(Ready)
    assert movers.vault.is_full
    inodes = [os.fstat(movers.vault.after(n)[0]).st_ino for n in range(len(TABLE))]
    host: Extents = ((0, nbytes),)
    load = Load(job=1, slot=0, source="disk", path=path, nbytes=nbytes, host=host, device=(large,))
    assert movers.load(load).ok
    movers.receive(Populated)
    assert worker_sees(movers, (large,), nbytes) == data
    movers.kill()
    assert worker_sees(movers, (large,), nbytes) == data, "without one byte read again"

    movers.start()
    movers.receive(Ready)
    assert [os.fstat(movers.vault.after(n)[0]).st_ino for n in range(len(TABLE))] == inodes
    tail = tuple((SMALL_CHUNK_BYTES * n, SMALL_CHUNK_BYTES) for n in range(10, 20))
    again = Load(job=2, slot=1, source="host", path=path, nbytes=nbytes, host=host, device=tail)
    assert movers.load(again).ok
    assert worker_sees(movers, tail, nbytes) == data
    straight = Load(
        job=3, slot=2, source="disk", path=path, nbytes=MIB, device=(small,), verify=False
    )
    done = movers.load(straight)
    assert not done.ok, "the file holds another image than that"
    assert worker_sees(movers, (large,), nbytes) == data
    movers.stop()


def test_a_mover_that_is_killed_while_it_makes_chunks_is_succeeded(movers: Movers) -> None:
    for _ in range(3):
        movers.start()
        movers.kill()  # wherever it was
    movers.start()
    movers.receive(Ready)
    assert movers.vault.is_full
    inodes = {os.fstat(movers.vault.after(n)[0]).st_ino for n in range(len(TABLE))}
    assert len(inodes) == len(TABLE)
    sizes = [os.fstat(movers.vault.after(n)[0]).st_size for n in range(len(TABLE))]
    assert sizes == [TABLE.nbytes(n) for n in range(len(TABLE))]
    movers.stop()
