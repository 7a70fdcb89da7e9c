"""An inference for somebody inside this front end: tensors in, tensors out, awaited.

What is not on the hot path (ensembles, embeddings, rehearsals, MessagePack bodies) asks models
through this, over the same rings and with the same checks as everybody.

    _Waiter:  ASKED --[succeed, fail]--> DONE        ASKED --caller is cancelled--> ABANDONED

Invariants
 1. Every answer is a copy: nothing of an egress block is kept after `succeed` returns.
 2. A caller that is cancelled gives its request up; the blocks come back by the dispatch.

Called by `ensembles`, by `rehearsing`, and by the exchanges of MessagePack bodies.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from overcommit.runtime import payload
from overcommit.runtime.errors import OvercommitError
from overcommit.runtime.sequence_terms import Ask
from overcommit.server import codec, sequences
from overcommit.server.inference import Prepared, prepare_decoded

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd
    from overcommit.server.plans import RoutePlans


@dataclass(slots=True, frozen=True)
class Tensor:
    """A named tensor; `data` as the binary extension has it: little-endian, row-major."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


def request_of(
    tensors: Sequence[Tensor],
    outputs: Sequence[str] | None = None,
    *,
    id: str | None = None,
    timeout_us: int | None = None,
    sequence: Ask | None = None,
) -> tuple[codec.InferRequest, memoryview]:
    """Say it as a binary V2 request: its JSON, decoded, and the tensors behind it."""
    parameters = {} if sequence is None else sequences.parameters_of(sequence)
    if timeout_us is not None:
        parameters["timeout"] = _raw(timeout_us)
    request = codec.InferRequest(
        inputs=tuple(
            codec.RequestInput(
                each.name,
                each.datatype,
                each.shape,
                {"binary_data_size": _raw(len(each.data))},
            )
            for each in tensors
        ),
        id=id,
        outputs=None if outputs is None else tuple(codec.RequestOutput(name) for name in outputs),
        parameters=parameters or None,
    )
    return request, memoryview(b"".join([each.data for each in tensors]))


def _raw(value: int) -> msgspec.Raw:
    return msgspec.Raw(b"%d" % value)


def tensors_of(prepared: Prepared, view: memoryview) -> list[Tensor]:
    """Copy the outputs that were asked for out of an egress block."""
    wanted = None if prepared.selection is None else {name for name, _ in prepared.selection}
    specs = prepared.route.outputs
    return [
        Tensor(
            specs[place.index].name,
            place.datatype,
            place.shape,
            bytes(view[place.offset : place.offset + place.nbytes]),
        )
        for place in payload.decode(view)
        if wanted is None or specs[place.index].name in wanted
    ]


class _Waiter:
    """A `Reply` that somebody awaits."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self.answer: asyncio.Future[list[Tensor]] = asyncio.get_running_loop().create_future()

    def succeed(self, view: memoryview) -> None:
        """The model answered."""
        if self.answer.done():
            return
        try:
            self.answer.set_result(tensors_of(self._prepared, view))
        except OvercommitError as error:
            self.answer.set_exception(error)

    def fail(self, error: OvercommitError) -> None:
        """There will be no answer."""
        if not self.answer.done():
            self.answer.set_exception(error)


async def ask(
    front: FrontEnd,
    plans: RoutePlans,
    tensors: Sequence[Tensor],
    outputs: Sequence[str] | None = None,
    *,
    timeout_us: int | None = None,
    sequence: Ask | None = None,
) -> list[Tensor]:
    """Run one request.  Raises what a client would be told."""
    request, tail = request_of(tensors, outputs, timeout_us=timeout_us, sequence=sequence)
    prepared, data = prepare_decoded(plans, request, tail)
    waiter = _Waiter(prepared)
    dispatch = front.dispatch
    now_ns = time.monotonic_ns()
    pending = dispatch.open(plans.route, prepared.plan, waiter, now_ns)
    dispatch.parcels.fill(pending, prepared.plan, data)
    dispatch.send(pending, now_ns + front.timeout_ns(prepared))
    try:
        return await waiter.answer
    except asyncio.CancelledError:
        # A pair of blocks that was answered may be another request's by now.
        if pending.reply is waiter:
            dispatch.abandon(pending)
        raise
