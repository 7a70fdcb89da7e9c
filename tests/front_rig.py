"""A front-end incarnation for tests: it submits to a worker and collects the answers."""

from __future__ import annotations

import mmap
import os
import time
from typing import Any

import numpy as np

from overcommit.runtime import _shm, payload
from overcommit.runtime.links import link_key
from overcommit.runtime.memory import create_memfd
from overcommit.runtime.signature import NUMPY_TYPES

WATCHDOG_S = 60.0
PAYLOAD_BYTES = 1 << 20
CAPACITY = 4096

Array = np.ndarray[Any, np.dtype[Any]]


class Front:
    """A front-end incarnation: it submits and it collects answers."""

    def __init__(
        self, seat: int, epoch: int, slots: int, worker_epoch: int, worker_bell: int
    ) -> None:
        self.seat, self.epoch, self.slots = seat, epoch, slots
        self.worker_bell = worker_bell
        self.half = _shm.ring_bytes(slots)
        self.fds = {
            "link": create_memfd("link", 2 * self.half),
            "peer_doorbell": os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC),
            "ingress": create_memfd("ingress", PAYLOAD_BYTES),
            "egress": create_memfd("egress", PAYLOAD_BYTES),
        }
        link = mmap.mmap(self.fds["link"], 2 * self.half)
        _shm.create_ring(link, 0, slots, 1, epoch, worker_epoch)
        _shm.create_ring(link, self.half, slots, 2, worker_epoch, epoch)
        self.submissions = _shm.SubmissionRing(link, 0, True, epoch, worker_epoch)
        self.completions = _shm.CompletionRing(link, self.half, False, worker_epoch, epoch)
        self.ingress = memoryview(mmap.mmap(self.fds["ingress"], PAYLOAD_BYTES))
        self.egress = memoryview(mmap.mmap(self.fds["egress"], PAYLOAD_BYTES))
        self.answers: dict[int, _shm.Completion] = {}
        self._sent = 0

    def next_id(self) -> int:
        return link_key(self.seat, self.epoch) << 40 | self._sent

    def submit(
        self,
        slot: int,
        inputs: list[Array] | bytes,
        *,
        datatype: str = "FP32",
        timeout_ns: int = 60_000_000_000,
        capacity: int = CAPACITY,
        flags: int = 0,
    ) -> int:
        """Write a request into the next block and push it; return its id."""
        block = self._sent % (PAYLOAD_BYTES // CAPACITY) * CAPACITY
        length = self.write(block, inputs, datatype)
        return self.push(
            *(self.next_id(), slot, block, length),
            capacity=capacity,
            deadline_ns=time.monotonic_ns() + timeout_ns,
            flags=flags,
        )

    def push(
        self,
        request_id: int,
        slot: int,
        block: int = 0,
        length: int = 0,
        *,
        out: int | None = None,
        capacity: int = CAPACITY,
        deadline_ns: int = 0,
        kind: int = _shm.SUBMIT,
        flags: int = 0,
    ) -> int:
        """Push a submission as it is, right or wrong."""
        assert self.submissions.push(
            *(request_id, deadline_ns, block, block if out is None else out),
            *(length, capacity, kind, slot, flags),
        )
        if self.submissions.must_wake():
            os.eventfd_write(self.worker_bell, 1)
        self._sent += 1
        return request_id

    def write(self, block: int, inputs: list[Array] | bytes, datatype: str = "FP32") -> int:
        """Write a request into its block; return its length."""
        if isinstance(inputs, bytes):
            self.ingress[block : block + len(inputs)] = inputs
            return len(inputs)
        places, length = payload.plan(
            [(index, datatype, array.nbytes, array.shape) for index, array in enumerate(inputs)]
        )
        payload.encode(self.ingress[block : block + length], places)
        for place, array in zip(places, inputs, strict=True):
            start = block + place.offset
            self.ingress[start : start + place.nbytes] = array.tobytes()
        return length

    def collect(self) -> dict[int, _shm.Completion]:
        """Take what has been answered; nothing is answered twice."""
        for completion in self.completions.pop(self.slots):
            assert completion[0] not in self.answers, "answered twice"
            self.answers[completion[0]] = completion
        return self.answers

    def wait(self, *request_ids: int) -> None:
        """Sleep until a worker process has answered these."""
        end_s = time.monotonic() + WATCHDOG_S
        while not all(one in self.collect() for one in request_ids):
            assert time.monotonic() < end_s, "the watchdog barked"
            if _shm.arm((self.completions,)):
                bell = self.fds["peer_doorbell"]
                _shm.wait(bell, bell, int(WATCHDOG_S * 1e9))
                _shm.disarm((self.completions,))

    def status(self, request_id: int) -> int:
        return self.answers[request_id][5]

    def block_of(self, request_id: int) -> int:
        return (request_id & 0xFF_FFFF_FFFF) % (PAYLOAD_BYTES // CAPACITY) * CAPACITY

    def text(self, request_id: int) -> str:
        """The message of an answer that is no result."""
        block = self.block_of(request_id)
        return bytes(self.egress[block : block + self.answers[request_id][4]]).decode()

    def outputs(self, request_id: int) -> list[Array]:
        """The tensors of an answer."""
        assert self.status(request_id) == _shm.OK, self.text(request_id)
        block = self.block_of(request_id)
        view = self.egress[block : block + self.answers[request_id][4]]
        return [
            np.frombuffer(view[place.offset : place.offset + place.nbytes], dtype).reshape(shape)
            for place in payload.decode(view)
            for dtype, shape in ((NUMPY_TYPES[place.datatype], place.shape),)
        ]

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
