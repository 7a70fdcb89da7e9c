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
 3. The control thread touches no file: a slow disk delays loads, not the answer to Stop.
 4. A thread that dies of our own bug takes the process with it: its load would never end, and the
    supervisor repeats the loads of a mover that died.

The supervisor starts it; `main` returns on Stop.
"""

from __future__ import annotations

import collections
import logging
import os
import queue
import threading
import time
import traceback

from overcommit.runtime import _shm
from overcommit.runtime.arena import Arena
from overcommit.runtime.config import LARGE_CHUNK_BYTES, READS_IN_FLIGHT
from overcommit.runtime.control import ControlSocket
from overcommit.runtime.errors import ImageError, ProtocolError
from overcommit.runtime.loading import Base, LoadState, Outcome
from overcommit.runtime.messages import Load, LoadDone, Message, Populated, Ready, Start, Stop

log = logging.getLogger("overcommit.mover")


class LoadQueue:
    """The loads under way, in turn.  Not thread-safe."""

    def __init__(self) -> None:
        self._loads: collections.deque[LoadState] = collections.deque()

    def __len__(self) -> int:
        return len(self._loads)

    def add(self, state: LoadState) -> None:
        """A load joins at the end of the round."""
        self._loads.append(state)

    def try_take(self) -> tuple[LoadState, int] | None:
        """Take a step of the load whose turn it is; None when no load has one to take now."""
        for _ in range(len(self._loads)):
            state = self._loads[0]
            self._loads.rotate(-1)
            step = state.take()
            if step is not None:
                return state, step
        return None

    def finish(self, state: LoadState, outcome: Outcome) -> bool:
        """A step of this load ended; True when the whole load has, and has left the round."""
        is_over = state.finish(outcome)
        if is_over:
            self._loads.remove(state)
        return is_over


class Mover:
    """The threads that serve the loads.

    `outbox` collects the messages for the supervisor; `bell` is rung when there is one.
    """

    def __init__(self, device: Arena, host: Arena | None) -> None:
        self._device = Base("device", device.map_all(True), device.nbytes)
        self._host = None if host is None else Base("host", host.map_all(True), host.nbytes)
        self._loads = LoadQueue()
        self._changed = threading.Condition()  # guards _loads and _is_closing
        self._is_closing = False
        self.outbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._threads = [
            threading.Thread(target=self._serve, name=f"io-{number}", daemon=True)
            for number in range(READS_IN_FLIGHT)
        ]
        self._threads.append(threading.Thread(target=self._populate, name="populate", daemon=True))
        for thread in self._threads:
            thread.start()

    def add(self, load: Load) -> None:
        """Begin a load."""
        try:
            state = LoadState(load, self._device, self._host)
        except ImageError as error:
            self._send(LoadDone(job=load.job, ok=False, message=f"{load.path}: {error.message}"))
            return
        with self._changed:
            self._loads.add(state)
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads, each after its present step; loads that are under way are forgotten."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        os.close(self.bell)

    def _serve(self) -> None:
        while True:
            with self._changed:
                while (taken := self._loads.try_take()) is None and not self._is_closing:
                    self._changed.wait()
                if taken is None or self._is_closing:
                    return
            state, step = taken
            outcome = state.run(step)
            with self._changed:
                is_over = self._loads.finish(state, outcome)
                self._changed.notify_all()
            if is_over:
                self._send(state.close())

    def _send(self, message: Message) -> None:
        self.outbox.put(message)
        os.eventfd_write(self.bell, 1)

    def _populate(self) -> None:
        began_ns = time.monotonic_ns()
        for base in (self._device, self._host):
            if base is None:
                continue
            for at in range(0, base.nbytes, LARGE_CHUNK_BYTES):
                with self._changed:
                    while self._loads and not self._is_closing:
                        self._changed.wait()
                    if self._is_closing:
                        return
                nbytes = min(LARGE_CHUNK_BYTES, base.nbytes - at)
                try:
                    _shm.populate(base.address + at, nbytes, True)
                except OSError as error:
                    # Not fatal: the pages come on first use, if there is memory then.
                    log.error("memory for the arenas is short: %s; lower --device-memory", error)
                    return
        self._send(Populated(seconds=(time.monotonic_ns() - began_ns) / 1e9))


def _die(args: threading.ExceptHookArgs) -> None:
    traceback.print_exception(args.exc_value)
    os._exit(1)


def main(control_fd: int) -> None:
    """Serve loads until Stop or until the supervisor is gone."""
    threading.excepthook = _die
    control = ControlSocket(control_fd)
    received = control.receive()
    assert received is not None, "waited without a limit"
    start, fds = received
    if not isinstance(start, Start) or "device" not in fds:
        raise ProtocolError(f"the mover's first message was {type(start).__name__}")
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
