"""The mover: the process that does all bulk I/O between the tiers.

The control thread blocks in one place, its socket.  READ_THREADS threads take the steps of loads that
read the disk, COPY_THREADS those that do not, so that no copy keeps a read from being asked for;
whose turn it is, `load_queue` decides.  In the background one more thread touches every page of the
arenas, in steps, so that no request pays for page faults; loads go first.

While the supervisor decides, its bell wakes this process: the last load is rehearsed, all but the bytes, so
that code and books are in the cache again, and the message finds somebody who looks for it.

A load from HOST needs no thread to wake up first: the control thread begins it itself, and looks at
its socket between steps.  Whoever ends a load publishes it, if that is the mover's (`publishing`), and
sends its LoadDone.

Invariants
 1. LoadDone is sent once for every Load, after the last byte is in place or after its last running
    piece has ended in failure.
 2. Nothing here decides: where bytes go is in the message, and a load may be repeated after this
    process was killed, into the same extents.
 3. The control thread touches no file: a slow disk delays loads, not the answer to Stop.  It copies
    a piece at most between two looks at its socket.
 4. A thread that dies of our own bug takes the process with it: its load would never end, and the
    supervisor repeats the loads of a mover that died.

The supervisor starts it; `main` returns on Stop.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import select
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from overcommit.runtime import _shm
from overcommit.runtime.arena import Arena
from overcommit.runtime.config import (
    COPY_HERE_BYTES,
    DECISION_SPIN_NS,
    LARGE_CHUNK_BYTES,
    PIN_BYTES,
    READ_THREADS,
    READS_IN_FLIGHT,
    VERSIONS_MAX,
)
from overcommit.runtime.control import ControlSocket, echo
from overcommit.runtime.copier import MEMCPY, Copier
from overcommit.runtime.cuda_tier import one_allocation, open_for_mover, open_ipc_for_mover
from overcommit.runtime.drivers import open_driver
from overcommit.runtime.errors import ImageError, ProtocolError
from overcommit.runtime.load_queue import LoadQueue, Taken
from overcommit.runtime.loading import COPY_THREADS, LoadState, Work
from overcommit.runtime.messages import (
    Chunks,
    LogLevel,
    MakeChunks,
    Message,
    Ready,
    Start,
    Stop,
)
from overcommit.runtime.mover_messages import (
    CancelLoad,
    Load,
    LoadDone,
    Populated,
    PromoteLoad,
    WorkerBell,
)
from overcommit.runtime.numa import move_to_site
from overcommit.runtime.places import Base
from overcommit.runtime.prefetch_limits import PREFETCH_READS_IN_FLIGHT
from overcommit.runtime.publishing import Publisher

log = logging.getLogger("overcommit.mover")

POPULATE_NICE: Final = 5

Resize = Callable[[int], int]  # so many chunks of a GPU -> bytes


class Mover:
    """The threads that serve the loads.  `send` is called by any of them, by one at a time."""

    def __init__(
        self,
        device: Base,
        host: Base | None,
        send: Callable[[Message], None],
        copier: Copier = MEMCPY,
        publisher: Publisher | None = None,
    ) -> None:
        self.publisher = publisher or Publisher()
        self._device = device
        self._host = host
        self._copier = copier
        self._loads = LoadQueue()
        self._lock = threading.Lock()  # guards _loads and _is_closing
        # Those who wait for a step that reads, for one that does not, for nothing to be under way.
        self._may_read = threading.Condition(self._lock)
        self._may_copy = threading.Condition(self._lock)
        self._is_idle = threading.Condition(self._lock)
        self._is_closing = False
        self._last: Load | None = None  # that was begun here
        self._send_now = send
        self._send_lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._read, name=f"read-{n}", daemon=True)
            for n in range(READ_THREADS)
        ]
        self._threads += [
            threading.Thread(target=self._copy, name=f"copy-{n}", daemon=True)
            for n in range(COPY_THREADS)
        ]
        self._threads.append(threading.Thread(target=self._populate, name="populate", daemon=True))
        for thread in self._threads:
            thread.start()

    # --- the control thread's -------------------------------------------------------------------
    def add(self, load: Load) -> None:
        """Begin a load; one from HOST in this very thread."""
        if load.source == "host" and load.nbytes > COPY_HERE_BYTES:
            # They wake up while this thread prepares the first step.
            with self._lock:
                self._may_copy.notify(COPY_THREADS - 1)
        try:
            state = LoadState(load, self._device, self._host, self._copier)
        except ImageError as error:
            self._send(LoadDone(job=load.job, ok=False, message=f"{load.path}: {error.message}"))
            return
        if load.source != "device":
            self._last = load
        with self._lock:
            self._loads.add(state)
            if load.source == "disk":
                self._may_read.notify()
            elif load.nbytes > COPY_HERE_BYTES or load.source == "device":
                self._may_copy.notify(COPY_THREADS - 1)
        if load.source == "host":
            self.try_copy()

    def rehearse(self) -> bool:
        """Go through the last load from HOST up to its first byte; False: there was none."""
        load = self._last
        if load is None or load.source != "host":
            return False
        with self._lock:
            self._may_copy.notify(COPY_THREADS - 1)
        echo(load)
        LoadState(load, self._device, self._host, self._copier).rehearse()
        return True

    def try_copy(self) -> bool:
        """Take and do one step that needs no disk; False when there is none."""
        with self._lock:
            taken = self._loads.try_take_copy()
        if taken is None:
            return False
        state, step = taken
        if step.nbytes == state.load.nbytes and self.publisher.announce(state.load):
            self.publisher.ring(state.load)  # nobody else copies: they wake up meanwhile
        self._do(taken)
        return True

    def cancel(self, job: int) -> None:
        """Stop a load."""
        with self._lock:
            state = self._loads.cancel(job)
            self._wake_prefetch()
        if state is not None:
            self._end(state)

    def promote(self, job: int) -> None:
        """Requests wait for this load now."""
        with self._lock:
            self._loads.promote(job)
            self._may_read.notify_all()
            self._may_copy.notify_all()

    def resize(self, nbytes: int) -> None:
        """DEVICE has so many bytes for the loads to come."""
        self._device = replace(self._device, nbytes=nbytes)

    def close(self) -> None:
        """End the threads, each after its present step; loads that are under way are forgotten."""
        with self._lock:
            self._is_closing = True
            for condition in (self._may_read, self._may_copy, self._is_idle):
                condition.notify_all()
        for thread in self._threads:
            thread.join()

    # --- any thread's ---------------------------------------------------------------------------
    def _do(self, taken: Taken) -> None:
        state, step = taken
        outcome = state.run(step)
        with self._lock:
            is_over = self._loads.finish(state, step, outcome)
            # Who ends a step takes the next one; here are those who must wake up beside.
            if step.work is Work.OPEN:
                self._may_read.notify(READS_IN_FLIGHT - 1)
            elif step.work is Work.READ:
                self._may_copy.notify()
            self._wake_prefetch()
            # Here, where who has the last step cannot end it; later it may have been published.
            is_announced = state.is_near_end and self.publisher.announce(state.load)
        if is_over:
            self._end(state)
        elif is_announced:
            self.publisher.ring(state.load)

    def _end(self, state: LoadState) -> None:
        done = state.close()
        if done.ok:
            self.publisher.publish(state.load)
        # Before the workers are woken: who asks the supervisor after an answer finds it informed.
        self._send(done)
        if done.ok:
            self.publisher.ring(state.load)
        with self._lock:
            if not len(self._loads):
                self._is_idle.notify_all()

    def _wake_prefetch(self) -> None:
        if self._loads.may_prefetch_read:
            self._may_read.notify(PREFETCH_READS_IN_FLIGHT)

    def _send(self, message: Message) -> None:
        with self._send_lock:
            self._send_now(message)

    def _read(self) -> None:
        while (taken := self._wait(self._may_read, self._loads.try_take_read)) is not None:
            self._do(taken)

    def _copy(self) -> None:
        while (taken := self._wait(self._may_copy, self._loads.try_take_copy)) is not None:
            self._do(taken)

    def _wait(
        self, condition: threading.Condition, take: Callable[[], Taken | None]
    ) -> Taken | None:
        """Wait for a step; None when this mover closes."""
        with self._lock:
            while not self._is_closing:
                if (taken := take()) is not None:
                    return taken
                condition.wait()
        return None

    def _populate(self) -> None:
        # While a server starts, all others have more to do: it takes what they leave.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), POPULATE_NICE)
        began_ns = time.monotonic_ns()
        for base in (None if self._copier.is_remote else self._device, self._host):
            if base is not None and not self._populate_one(base):
                return
        self._send(Populated(seconds=(time.monotonic_ns() - began_ns) / 1e9))

    def _populate_one(self, base: Base) -> bool:
        """Touch every page of an arena, and have each piece that is touched pinned; loads go first."""
        pinned = 0
        for at in range(0, base.nbytes, LARGE_CHUNK_BYTES):
            with self._lock:
                while len(self._loads) and not self._is_closing:
                    self._is_idle.wait()
                if self._is_closing:
                    return False
            end = min(at + LARGE_CHUNK_BYTES, base.nbytes)
            try:
                _shm.populate(base.address + at, end - at, True)
            except OSError as error:
                # Not fatal: the pages come on first use, if there is memory then.
                log.error("memory for the arenas is short: %s; lower --device-memory", error)
                return False
            if end == base.nbytes or end - pinned == PIN_BYTES:
                self._copier.pin(base.address + pinned, end - pinned)
                pinned = end
        return True


def _die(args: threading.ExceptHookArgs) -> None:
    if not isinstance(
        args.exc_value, ConnectionError
    ):  # else the supervisor is gone, as we are now
        traceback.print_exception(args.exc_value)
    os._exit(1)


def main(control_fd: int) -> None:
    """Serve loads until Stop or until the supervisor is gone."""
    threading.excepthook = _die
    control = ControlSocket(control_fd)
    start, fds = _receive(control)
    if not isinstance(start, Start) or ("device" in fds) is not (start.cuda_device is None):
        raise ProtocolError(f"the mover's first message was {type(start).__name__}")
    host = None
    if "host" in fds:
        arena = Arena.from_fd(fds["host"], start.host_bytes)
        host = Base("host", arena.map_all(True), arena.nbytes)
    copier: Copier = MEMCPY
    shrink: Resize = one_allocation
    grow: Resize = one_allocation
    if start.cuda_device is None:
        move_to_site(start.site, start.sites)
        memory = Arena.from_fd(fds["device"], start.device_bytes)
        device = Base("device", memory.map_all(True), memory.nbytes)
    else:
        driver, host_address = open_driver(start.settings), 0 if host is None else host.address
        if start.shares == "ipc":
            tier = open_ipc_for_mover(
                driver, start.cuda_device, start.device_bytes, host_address, control.send
            )
        elif (
            opened := open_for_mover(
                *(driver, start.cuda_device, start.device_bytes, start.chunks_held),
                *(start.chunks_count, host_address, lambda: _receive(control), control.send),
            )
        ) is not None:
            tier = opened
        else:
            return
        device, copier, shrink, grow = tier
    table = None
    if "residency" in fds:
        words = mmap.mmap(fds["residency"], _shm.table_bytes(VERSIONS_MAX))
        table = _shm.ResidencyTable(words, 0, VERSIONS_MAX, True)
    control.send(Ready(pid=os.getpid()))
    mover = Mover(device, host, control.send, copier, Publisher(table))
    bell = fds.get("bell")
    while _serve(mover, control, shrink, grow):
        # Copies that are left: these go on here between looks, until nobody has a step to take.
        while not select.select((control,), (), (), 0)[0] and mover.try_copy():
            pass
        _wait(mover, control, bell)


def _wait(mover: Mover, control: ControlSocket, bell: int | None) -> None:
    """Wait for a message; after the bell without sleep, for DECISION_SPIN_NS at most."""
    if bell is None:
        select.select((control,), (), ())
        return
    both: list[ControlSocket | int] = [control, bell]
    if bell not in select.select(both, (), ())[0]:
        return
    os.eventfd_read(bell)
    until_ns = time.monotonic_ns() + DECISION_SPIN_NS
    if select.select((control,), (), (), 0)[0] or not mover.rehearse():
        return
    while time.monotonic_ns() < until_ns and not select.select((control,), (), (), 0)[0]:
        pass


def _receive(control: ControlSocket) -> tuple[Message, dict[str, int]]:
    received = control.receive()
    assert received is not None, "waited without a limit"
    return received


def _serve(mover: Mover, control: ControlSocket, shrink: Resize, grow: Resize) -> bool:
    """Take every message that is there; False for Stop."""
    while (received := control.try_receive()) is not None:
        message, given = received
        if isinstance(message, Stop):
            return False
        if isinstance(message, Load):
            mover.add(message)
        elif isinstance(message, CancelLoad):
            mover.cancel(message.job)
        elif isinstance(message, PromoteLoad):
            mover.promote(message.job)
        elif isinstance(message, WorkerBell):
            mover.publisher.on_bell(message.seat, given["bell"])
        elif isinstance(message, Chunks):
            mover.resize(shrink(message.count))
        elif isinstance(message, MakeChunks):
            mover.resize(grow(message.count))
        elif isinstance(message, LogLevel):
            logging.getLogger().setLevel(message.level)
    return True
