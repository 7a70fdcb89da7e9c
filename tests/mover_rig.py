"""A mover without a server: images, arenas, and a mover process with its supervisor's end."""

from __future__ import annotations

import functools
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

from overcommit.runtime import _shm, packed
from overcommit.runtime.arena import Arena
from overcommit.runtime.config import PAGE_BYTES, READ_BYTES, Settings
from overcommit.runtime.container import (
    Stored,
    read_stored,
    write_container,
    write_packed_container,
)
from overcommit.runtime.control import ControlSocket, socket_pair
from overcommit.runtime.messages import Extents, Message, Ready, Start, Stop
from overcommit.runtime.mover_messages import Load, LoadDone, Populated

WATCHDOG_S = 60.0
LAUNCH = "import sys; from overcommit.runtime.mover import main; main(int(sys.argv[1]))"

Kind = TypeVar("Kind", bound=Message)


def make_image(path: Path, nbytes: int, seed: int = 0) -> bytes:
    """Write a file as images and parts are, of random bytes; return its payload, with padding."""
    data = random.Random(seed).randbytes(nbytes) + bytes(-nbytes % PAGE_BYTES)
    write_container(path, functools.partial(Stored, len(data)), len(data), [memoryview(data)])
    return data


def bf16(nbytes: int, seed: int = 0) -> bytes:
    """Numbers as weights are: BF16, a few magnitudes; with padding to whole pages."""
    drawn = random.Random(seed)
    values = (drawn.gauss(0, 0.02) for _ in range(1 << 14))
    block = struct.pack(f"<{1 << 14}f", *values)
    halves = b"".join(block[at + 2 : at + 4] for at in range(0, len(block), 4))
    noise = bytearray(drawn.randbytes(nbytes // 2 + 1))
    data = bytearray((halves * (nbytes // len(halves) + 1))[:nbytes])
    data[::2] = noise[: len(data[::2])]  # mantissas do not repeat
    return bytes(data) + bytes(-nbytes % PAGE_BYTES)


def make_packed_image(path: Path, nbytes: int, seed: int = 0) -> tuple[bytes, int]:
    """Write a packed file; return its raw payload, and how long the packed one is."""
    data = bf16(nbytes, seed)
    count = -(-len(data) // READ_BYTES)
    pieces = packed.pieces_of([memoryview(data)])
    _, sizes = write_packed_container(
        path, lambda crcs, sizes: Stored(sum(sizes), crcs, sizes), count, 2 * len(data), pieces
    )
    return data, sum(sizes)


def flip_byte(path: Path, at: int) -> None:
    """Damage one byte of the payload."""
    _, start = read_stored(path)
    with open(path, "r+b") as file:
        file.seek(start + at)
        byte = file.read(1)[0]
        file.seek(start + at)
        file.write(bytes([byte ^ 1]))


class Memory:
    """An arena with a writable view, to look at what the mover did."""

    def __init__(self, name: str, nbytes: int) -> None:
        self.arena = Arena.create(name, nbytes)
        self.address = self.arena.map_all(True)
        self.view = _shm.view(self.address, nbytes, True)

    def fill(self, value: int) -> None:
        """Set every byte, so that what a load leaves out shows."""
        for at in range(0, len(self.view), 1 << 20):
            part = self.view[at : at + (1 << 20)]
            part[:] = bytes([value]) * len(part)

    def read(self, extents: Extents, nbytes: int) -> bytes:
        """The first `nbytes` of the image that lies at these extents."""
        return b"".join(self.view[at : at + length] for at, length in extents)[:nbytes]

    def write(self, extents: Extents, data: bytes) -> None:
        """Put an image there."""
        done = 0
        for at, length in extents:
            part = data[done : done + length]
            self.view[at : at + len(part)] = part
            done += length

    def close(self) -> None:
        """Let go."""
        self.view.release()
        self.arena.close()


class MoverProcess:
    """A real mover over two arenas, or over DEVICE alone."""

    def __init__(self, device: Memory, host: Memory | None, launch: str = LAUNCH) -> None:
        ours, theirs = socket_pair()
        self.process = subprocess.Popen(
            [sys.executable, "-c", launch, str(theirs)], pass_fds=(theirs,)
        )
        os.close(theirs)
        self.control = ControlSocket(ours)
        self.unread: list[Message] = []
        memories = [device] if host is None else [device, host]
        start = Start(
            kind="mover",
            seat=0,
            epoch=1,
            settings=Settings(),
            device_bytes=device.arena.nbytes,
            host_bytes=0 if host is None else host.arena.nbytes,
            fds=("bell", "device", "host")[: 1 + len(memories)],
        )
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.control.send(start, [self.bell, *(memory.arena.fd for memory in memories)])
        self.ready = self.receive(Ready)

    def receive(self, kind: type[Kind]) -> Kind:
        """Wait for the next message of this kind; others are kept."""
        for message in self.unread:
            if isinstance(message, kind):
                self.unread.remove(message)
                return message
        while True:
            received = self.control.receive(WATCHDOG_S)
            assert received is not None, "the mover is silent"
            message = received[0]
            if isinstance(message, kind):
                return message
            self.unread.append(message)

    def load(self, load: Load) -> LoadDone:
        """Send one load and wait for its end."""
        self.control.send(load)
        done = self.receive(LoadDone)
        assert done.job == load.job
        return done

    def wait_populated(self) -> Populated:
        """Wait until every page is there."""
        return self.receive(Populated)

    def kill(self) -> None:
        """SIGKILL; returns when it is reaped."""
        self.process.kill()
        self.process.wait(WATCHDOG_S)

    def close(self) -> None:
        """Stop it if it runs."""
        if self.process.poll() is None:
            self.control.send(Stop())
            self.process.wait(WATCHDOG_S)
        self.control.close()
        os.close(self.bell)
