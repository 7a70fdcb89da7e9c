"""The mover: the process that does all bulk I/O between the tiers.

One control thread blocks in one place; READS_IN_FLIGHT threads take pieces of the loads that are
under way, round robin, so that two loads share the disk and neither starves a third.  In the
background one more thread touches every page of the arenas, in steps, so that no request pays for
page faults; loads go first.

Invariants
 1. LoadDone is sent once for every Load, after the last byte is in place or after its last running
    piece has ended in failure.
 2. Nothing here decides: where bytes go is in the message, and a load may be repeated after this
    process was killed, into the same extents.

The supervisor starts it; `main` returns on Stop.
"""

from __future__ import annotations

import collections
import logging
import os
import queue
import threading
import time

from overcommit.runtime import _shm
from overcommit.runtime.arena import Arena
from overcommit.runtime.config import LARGE_CHUNK_BYTES, READS_IN_FLIGHT
from overcommit.runtime.control import ControlSocket
from overcommit.runtime.errors import ImageError
from overcommit.runtime.loading import LoadState
from overcommit.runtime.messages import Load, Message, Populated, Ready, Start, Stop

log = logging.getLogger("overcommit.mover")


class Mover:
    """The loads under way and the threads that serve them.

    `outbox` collects the messages for the supervisor; `bell` is rung when there is one.
    """

    def __init__(self, device: Arena, host: Arena | None) -> None:
        self._device = device.map_all(True)
        self._host = host.map_all(True) if host is not None else 0
        self._sizes = [(self._device, device.nbytes)]
        if host is not None:
            self._sizes.append((self._host, host.nbytes))
        self._lock = threading.Condition()
        self._loads: collections.deque[LoadState] = collections.deque()
        self.outbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for number in range(READS_IN_FLIGHT):
            threading.Thread(target=self._serve, name=f"io-{number}", daemon=True).start()
        threading.Thread(target=self._populate, name="populate", daemon=True).start()

    def add(self, load: Load) -> None:
        """Begin a load."""
        state = LoadState(load, self._host, self._device)
        if load.source == "disk":
            try:
                state.open()
            except (ImageError, OSError) as error:
                state.fail(str(error))
                self._send(state.close())
                return
        with self._lock:
            self._loads.append(state)
            self._lock.notify_all()

    def _take(self) -> tuple[LoadState, int]:
        with self._lock:
            while True:
                for _ in range(len(self._loads)):
                    state = self._loads[0]
                    self._loads.rotate(-1)
                    piece = state.take()
                    if piece is not None:
                        return state, piece
                self._lock.wait()

    def _serve(self) -> None:
        while True:
            state, piece = self._take()
            message = ""
            try:
                state.run_piece(piece)
            except (ImageError, OSError) as error:
                message = str(error)
            with self._lock:
                if message:
                    state.fail(message)
                is_over = state.finish_piece()
                if is_over:
                    self._loads.remove(state)
                self._lock.notify_all()
            if is_over:
                self._send(state.close())

    def _send(self, message: Message) -> None:
        self.outbox.put(message)
        os.eventfd_write(self.bell, 1)

    def _populate(self) -> None:
        began_ns = time.monotonic_ns()
        for address, nbytes in self._sizes:
            for at in range(0, nbytes, LARGE_CHUNK_BYTES):
                with self._lock:
                    while self._loads:
                        self._lock.wait()
                try:
                    _shm.populate(address + at, min(LARGE_CHUNK_BYTES, nbytes - at), True)
                except OSError as error:
                    # Not fatal: the pages come on first use, if there is memory then.
                    log.error("memory for the arenas is short: %s; lower --device-memory", error)
                    return
        self._send(Populated(seconds=(time.monotonic_ns() - began_ns) / 1e9))


def main(control_fd: int) -> None:
    """Serve loads until Stop or until the supervisor is gone."""
    control = ControlSocket(control_fd)
    received = control.receive()
    assert received is not None
    start, fds = received
    assert isinstance(start, Start)
    device = Arena.from_fd(fds["device"], start.device_bytes)
    host = Arena.from_fd(fds["host"], start.host_bytes) if "host" in fds else None
    mover = Mover(device, host)
    control.send(Ready(pid=os.getpid()))
    while True:
        _shm.wait(mover.bell, control.fileno(), -1)
        while not mover.outbox.empty():
            control.send(mover.outbox.get())
        while (received := control.try_receive()) is not None:
            message, _ = received
            if isinstance(message, Stop):
                return
            if isinstance(message, Load):
                mover.add(message)
