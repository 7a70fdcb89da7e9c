"""The steps of the data path that need one process, for `micro`.

Each is a pair of a name and a function that does it `count` times; state is made once, outside of
what is timed.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from overcommit.bench import wire
from overcommit.runtime import _shm, payload
from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.batcher import Batcher
from overcommit.runtime.blocks import BlockArena
from overcommit.runtime.config import MIB, NEVER_NS, TensorSpec
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.lanes import Job, Limits
from overcommit.runtime.payload import decode, encode, plan
from overcommit.runtime.policy import make_policy
from overcommit.runtime.residency import Residency
from overcommit.runtime.residents import StartLoad, Terms, Usage
from overcommit.server import inference
from overcommit.server.plans import RoutePlans

Step = tuple[str, Callable[[int], None]]

SLOTS: Final = 64
BATCH: Final = 16
MODELS: Final = 200
MODEL_BYTES: Final = 8 * MIB
MODELS_ON_DEVICE: Final = 64
_ROUTE: Final = Route(
    slot=0,
    name="echo",
    version="1",
    state="ready",
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 16)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 16)),),
    max_batch_size=32,
)


def steps() -> Iterator[Step]:
    """Yield all there are."""
    yield from _rings()
    yield from _memory()
    yield from _codec()
    yield from _batcher()
    yield from _residency()


# --- shared memory --------------------------------------------------------------------------------
def _rings() -> Iterator[Step]:
    memory = mmap.mmap(-1, _shm.ring_bytes(SLOTS))
    _shm.create_ring(memory, 0, SLOTS, 1, 7, 9)
    give = _shm.SubmissionRing(memory, 0, True, 7, 9)
    take = _shm.SubmissionRing(memory, 0, False, 7, 9)

    def one(count: int) -> None:
        for number in range(count):
            give.push(number, 1, 2, 3, 4, 5, _shm.SUBMIT, 6, 0)
            take.pop(SLOTS)

    def many(count: int) -> None:
        for start in range(0, count, BATCH):
            for number in range(start, min(start + BATCH, count)):
                give.push(number, 1, 2, 3, 4, 5, _shm.SUBMIT, 6, 0)
            take.pop(SLOTS)

    yield "ring push and pop", one
    yield f"ring push and pop, {BATCH} popped at once", many


def _memory() -> Iterator[Step]:
    arena = BlockArena(64 * MIB)
    chunks = ChunkAllocator(1024 * MIB)
    x = np.zeros((1, 16), np.float32)
    places, nbytes = plan([(0, "FP32", x.nbytes, x.shape)])
    block = memoryview(bytearray(nbytes))

    def reserve(count: int) -> None:
        for _ in range(count):
            reserved = arena.try_reserve(nbytes)
            assert reserved is not None
            arena.release(reserved[0])

    def allocate(count: int) -> None:
        for _ in range(count):
            extents = chunks.try_allocate(MODEL_BYTES)
            assert extents is not None
            chunks.free(extents)

    def payload(count: int) -> None:
        for _ in range(count):
            encode(block, places)
            decode(block)

    yield "payload block, reserve and release", reserve
    yield "payload header, encode and decode", payload
    yield f"weight arena, allocate and free {MODEL_BYTES >> 20} MiB", allocate


# --- front end ------------------------------------------------------------------------------------
def _codec() -> Iterator[Step]:
    x = np.random.default_rng(1).standard_normal((1, 16), np.float32)
    places, total = payload.plan([(0, "FP32", x.nbytes, x.shape)])
    plans = RoutePlans(_ROUTE)
    for binary in (False, True):
        request = wire.infer_request("/", {"x": x}, "y", binary=binary)
        head, _, body = request.partition(b"\r\n\r\n")
        json_bytes = None
        if binary:
            json_bytes = int(head.lower().partition(wire.JSON_LENGTH_HEADER + b": ")[2])
        prepared, _ = inference.prepare(plans, body, json_bytes)
        answer = bytearray(total)
        payload.encode(memoryview(answer), places)
        answer[places[0].offset : places[0].offset + x.nbytes] = x.tobytes()

        def read(count: int, body: bytes = body, json_bytes: int | None = json_bytes) -> None:
            for _ in range(count):
                inference.prepare(plans, body, json_bytes)

        view = memoryview(answer)

        def write(
            count: int, prepared: inference.Prepared = prepared, view: memoryview = view
        ) -> None:
            for _ in range(count):
                inference.respond(prepared, view)

        kind = "binary" if binary else "JSON"
        yield f"decode and check a request, {kind} [1,16]", read
        yield f"encode an answer, {kind} [1,16]", write


# --- worker and supervisor ------------------------------------------------------------------------
def _batcher() -> Iterator[Step]:
    for size in (1, BATCH):
        batcher = Batcher()
        batcher.configure(0, Limits(rows_max=BATCH))
        batcher.set_runnable(0, True, 0)

        def step(count: int, batcher: Batcher = batcher, size: int = size) -> None:
            for start in range(0, count, size):
                for number in range(start, min(start + size, count)):
                    batcher.add(Job(number, 0, 1, NEVER_NS, number), number)
                batch = batcher.next(start)
                assert batch is not None
                batcher.finish(batch, 1000, start)

        yield f"batcher, a job in and out, batches of {size}", step


class _NoLeases:
    """Shared memory in which nothing is in use."""

    def try_evict(self, slot: int, generation: int) -> bool:
        return True

    def usage(self, slot: int) -> Usage:
        return Usage(waiting=0, uses=0, last_used_ns=0, leases=0)

    def set_state(self, slot: int, state: int, generation: int) -> None:
        pass

    def set_hungry(self, hungry: bool) -> None:
        pass


def _residency() -> Iterator[Step]:
    device = ChunkAllocator(MODELS_ON_DEVICE * MODEL_BYTES)
    host = ChunkAllocator(2 * MODELS_ON_DEVICE * MODEL_BYTES)
    residency = Residency(device, host, lambda: make_policy("lru"), _NoLeases())
    for slot in range(MODELS):
        residency.add(slot, f"model-{slot}", MODEL_BYTES, 0, Terms())
    clock = [0]

    def load(count: int) -> None:
        """Ask for the model that was away longest: one leaves DEVICE, one comes."""
        for _ in range(count):
            clock[0] += 1
            (action,) = residency.want(clock[0] % MODELS, 0, clock[0])
            assert isinstance(action, StartLoad)
            residency.on_load_done(action.job, True, "", clock[0], 1000)

    yield f"residency, evict one of {MODELS} and load one", load
