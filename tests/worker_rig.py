"""A worker without a server: plays its supervisor and its front ends, over real shared memory.

In a test the worker's loop runs in this process (`Rig`) or in one of its own (`Rig(command=...)`,
which runs this file).  The engine is a fake that multiplies by the first number of the weights, so
an answer tells which bytes were mapped.
"""

from __future__ import annotations

import mmap
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import cast

import numpy as np
from front_rig import PAYLOAD_BYTES, WATCHDOG_S, Array, Front

from overcommit.runtime import _shm, child
from overcommit.runtime.bound import Opened
from overcommit.runtime.config import (
    PAGE_BYTES,
    VERSIONS_MAX,
    Batching,
    ModelConfig,
    Settings,
    TensorSpec,
)
from overcommit.runtime.control import ControlSocket, socket_pair
from overcommit.runtime.links import link_key
from overcommit.runtime.memory import create_memfd
from overcommit.runtime.messages import LinkDown, LinkUp, Message, Start
from overcommit.runtime.payload_pins import PayloadPins
from overcommit.runtime.worker import Worker
from overcommit.runtime.worker_messages import Activate, Attaches, Placed, VersionInfo
from overcommit.runtime.worker_process import serve

ARENA_BYTES = 1024 * PAGE_BYTES
# This file as a child process: a real worker but for its engine.
FAKE_COMMAND = [sys.executable, __file__]

Run = Callable[[dict[str, Array]], dict[str, Array]]


class FakeModel:
    """y = x * weight, or whatever `run` says."""

    def __init__(self, memory: memoryview, run: Run | None) -> None:
        self.memory = memory
        self.override = run

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        if self.override is not None:
            return self.override(inputs)
        return {"y": inputs["x"] * np.frombuffer(self.memory, np.float32, 1)[0]}


class FakeProgram:
    """Binds to anything and counts how often."""

    key = "fake"

    def __init__(self, run: Run | None = None) -> None:
        self.run = run
        self.bindings = 0

    def mixed(self, header: object) -> None:
        return None

    def bind(self, header: object, memory: memoryview) -> FakeModel:
        self.bindings += 1
        return FakeModel(memory, self.run)


def opened(program: FakeProgram) -> Opened:
    """What the loader returns for a fake program."""
    return cast(Opened, (None, program))


class Programs:
    """The opener: one fake program per slot, made on demand; `error` fails the next ones."""

    def __init__(self) -> None:
        self.by_slot: dict[int, FakeProgram] = {}
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def __getitem__(self, slot: int) -> FakeProgram:
        return self.by_slot.setdefault(slot, FakeProgram())

    def __call__(self, version: VersionInfo) -> Opened:
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        return opened(self[version.slot])


X = np.array([[1, 2, 3, 4]], np.float32)


def vector_config(**batching: int) -> ModelConfig:
    """A model that takes rows of four numbers and gives as many."""
    fields = {"datatype": "FP32", "shape": (-1, 4), "axes": ("batch", None)}
    return ModelConfig(
        inputs=(TensorSpec(name="x", **fields),),  # type: ignore[arg-type]
        outputs=(TensorSpec(name="y", **fields),),  # type: ignore[arg-type]
        batching=Batching(**batching),
        warm_up=False,
    )


def info(slot: int, config: ModelConfig | None = None) -> VersionInfo:
    """A version in this slot."""
    return VersionInfo(
        slot=slot,
        name=f"m{slot}",
        version="1",
        image_path="nowhere",
        nbytes=PAGE_BYTES,
        config=config or vector_config(),
    )


class Rig:
    """Plays the supervisor: owns the memory, places versions, links front ends."""

    def __init__(
        self,
        open_program: Callable[[VersionInfo], Opened] | None = None,
        *,
        command: list[str] | None = None,
        pins: PayloadPins | None = None,
        arena_bytes: int = ARENA_BYTES,
    ) -> None:
        """`pins`: of a GPU's worker, whose models are begun on the device that `places` chose."""
        self._pins = pins
        bell = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        table_bytes = _shm.table_bytes(VERSIONS_MAX)
        self.fds = {
            "doorbell": os.eventfd(0, bell),
            "supervisor_bell": os.eventfd(0, bell),
            "residency": create_memfd("residency", table_bytes),
            "device": create_memfd("device", arena_bytes),
        }
        self.table = _shm.ResidencyTable(
            mmap.mmap(self.fds["residency"], table_bytes), 0, VERSIONS_MAX, True
        )
        self.device = memoryview(mmap.mmap(self.fds["device"], arena_bytes))
        self.fronts: list[Front] = []
        self.epoch = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._command = command
        self._make_worker(open_program)

    def _make_worker(self, open_program: Callable[[VersionInfo], Opened] | None) -> None:
        """Start an incarnation of the worker, with a page of its own."""
        self.epoch += 1
        page_bytes = _shm.STATUS_BYTES + _shm.lease_page_bytes(VERSIONS_MAX)
        if "page" in self.fds:
            os.close(self.fds["page"])
        self.fds["page"] = create_memfd("page", page_bytes)
        page = mmap.mmap(self.fds["page"], page_bytes, prot=mmap.PROT_READ)
        self.leases = _shm.LeasePage(page, _shm.STATUS_BYTES, VERSIONS_MAX, False)
        self.status = _shm.StatusPage(page, 0, False)
        ours, theirs = socket_pair()
        self.control = ControlSocket(ours)
        start = Start(
            kind="worker",
            seat=0,
            epoch=self.epoch,
            settings=Settings(spin_ns=0),
            device_bytes=len(self.device),
            fds=tuple(self.fds),
        )
        if self._command is not None:
            command = [*self._command, str(theirs), str(os.getpid())]
            self.process = subprocess.Popen(command, pass_fds=(theirs,))
            os.close(theirs)
            self.control.send(start, tuple(self.fds.values()))
            assert self.receive() is not None, "the worker did not get ready"
            return
        assert open_program is not None
        copies = {name: os.dup(fd) for name, fd in self.fds.items()}
        self.worker = Worker(ControlSocket(theirs), start, copies, open_program, pins=self._pins)
        self._copies = copies

    def restart(self) -> None:
        """The process has died: start the next incarnation."""
        assert self.process is not None
        self.process.wait(WATCHDOG_S)
        self.control.close()
        self._make_worker(None)

    # --- the supervisor's messages --------------------------------------------------------------
    def receive(self) -> Message | None:
        """The worker's next message, without deadlines; None after the watchdog.

        Attaches are passed over: the clock says when they come.
        """
        while (received := self.control.receive(WATCHDOG_S)) is not None:
            if not isinstance(received[0], Attaches):
                return plain(received[0])
        return None

    def heard(self) -> list[Message]:
        """Everything that the worker has said, without deadlines."""
        return [plain(message) for message in self.heard_in_full()]

    def heard_in_full(self) -> list[Message]:
        """Everything that the worker has said."""
        messages: list[Message] = []
        while (received := self.control.try_receive()) is not None:
            messages.append(received[0])
        return messages

    def link(self, seat: int = 0, epoch: int = 1, slots: int = 64) -> Front:
        front = Front(seat, epoch, slots, self.epoch, self.fds["doorbell"])
        self.fronts.append(front)
        message = LinkUp(
            seat=seat,
            epoch=epoch,
            slot_count=slots,
            completion_offset=front.half,
            payload_bytes=PAYLOAD_BYTES,
            fds=tuple(front.fds),
        )
        self.control.send(message, tuple(front.fds.values()))
        return front

    def unlink(self, front: Front) -> None:
        self.control.send(LinkDown(seat=front.seat, epoch=front.epoch))

    def publish(self, slot: int, generation: int, weight: float, page: int | None = None) -> Placed:
        """Put weights on a page of the arena and make the version resident there."""
        start = (slot if page is None else page) * PAGE_BYTES
        self.device[start : start + 4] = np.float32(weight).tobytes()
        self.table.set(slot, _shm.RESIDENT, generation)
        return Placed(slot=slot, generation=generation, extents=((start, PAGE_BYTES),))

    def serve(
        self,
        slot: int,
        *,
        weight: float = 2.0,
        config: ModelConfig | None = None,
        generation: int = 1,
    ) -> None:
        """Tell the worker of a version and place it."""
        self.control.send(info(slot, config))
        self.control.send(self.publish(slot, generation, weight))

    # --- time -----------------------------------------------------------------------------------
    def until(self, done: Callable[[], bool]) -> None:
        """Let the worker's loop turn until this holds."""
        end_s = time.monotonic() + WATCHDOG_S
        while not done():
            assert time.monotonic() < end_s, "the watchdog barked"
            if not self.worker.turn() and not done():
                self.worker.sleep()

    def answered(self, front: Front, *request_ids: int) -> None:
        """Let the worker's loop turn until these are answered."""
        self.until(lambda: all(one in front.collect() for one in request_ids))

    def settle(self) -> None:
        """Let the worker do everything that it can do now."""
        while self.worker.turn() or select.select((self.worker.control,), (), (), 0)[0]:
            pass

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(WATCHDOG_S)
        else:
            for front in self.fronts:
                self.worker.links.drop(link_key(front.seat, front.epoch))
            self.worker.close()
            self.worker.control.close()
            for fd in self._copies.values():
                os.close(fd)
        self.control.close()
        for front in self.fronts:
            front.close()
        for fd in self.fds.values():
            os.close(fd)


def plain(message: Message) -> Message:
    """A message without what differs from run to run."""
    return Activate(slot=message.slot) if isinstance(message, Activate) else message


def ready(rig: Rig, front: Front, slot: int = 3, **serve: object) -> None:
    """Serve a version and wait until it has answered once."""
    rig.serve(slot, **serve)  # type: ignore[arg-type]
    rig.answered(front, front.submit(slot, [X]))
    rig.heard()


def main(control_fd: int) -> None:
    """Be a worker process with the fake engine."""
    control = ControlSocket(control_fd)
    start, fds = control.receive(WATCHDOG_S) or (None, {})
    assert isinstance(start, Start)
    serve(control, start, fds, lambda _: opened(Deadly()))


class Deadly(FakeProgram):
    """A program whose model hangs on NaN, so that a test can kill it in the middle of a batch."""

    def bind(self, header: object, memory: memoryview) -> FakeModel:
        model = FakeModel(memory, None)

        def run(inputs: dict[str, Array]) -> dict[str, Array]:
            while np.isnan(inputs["x"]).any():
                time.sleep(60)
            return FakeModel(memory, None).run(inputs)

        model.override = run
        return model


if __name__ == "__main__":
    # As any child, but that `main` is the one above.
    child.MODULE_OF_KIND["worker"] = "__main__"
    child.run_child("worker", int(sys.argv[1]), int(sys.argv[2]))
