"""Ensembles: a request that runs through several models, and comes back as one answer.

    RUNNING: each step waits for its tensors, asks its model, hands on what that gave
        --the last output is there--> DONE       --a step fails--> FAILED, the others are given up
        --[abandon]--> ABANDONED                 --its time is over--> FAILED

Steps that do not need each other run at the same time.  Each is a request like any client's: it has the
checks, the batches, the deadline and the counters of its own model, and brings it into memory if it
was evicted.  A step may be an ensemble.  Steps with state get the request's sequence.

Invariants
 1. The reply gets one answer, or was abandoned.
 2. No step outlives its ensemble's request.
 3. Errors name the ensemble, the step and the step's model.
 4. Which versions its steps ask is settled when it is accepted, as far as they serve then (its cast): who
    is replaced or unloaded meanwhile answers it still.

Called by the exchanges and by whoever asks models from inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from overcommit.runtime import payload, stages
from overcommit.runtime.config import ENSEMBLE_DEPTH_MAX, NEVER_NS, Step
from overcommit.runtime.errors import DeadlineExceeded, ModelError, OvercommitError
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.sequence_terms import Ask
from overcommit.server import failures
from overcommit.server.asking import Tensor, ask, request_of
from overcommit.server.inference import Data, Prepared, prepare_decoded
from overcommit.server.parcels import Reply
from overcommit.server.routing import RouteTable, check_usable

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd
    from overcommit.server.plans import RoutePlans

log = logging.getLogger("overcommit.ensembles")

_US: Final = 1000


Cast = Mapping[tuple[str, str], Route]  # by a step's model and version


def cast_of(table: RouteTable, route: Route) -> Cast:
    """Return whom the steps of a route mean now, and theirs; without those that do not serve."""
    cast: dict[tuple[str, str], Route] = {}
    steps = list(route.steps)
    while steps:
        step = steps.pop()
        key = (step.model, step.version)
        if key not in cast:
            with contextlib.suppress(OvercommitError):  # its turn may not come
                found = table.find(step.model, step.version or None)
                if check_usable(found):
                    cast[key] = found
                    steps += found.steps
    return cast


def slots_of(cast: Cast) -> set[int]:
    """Return the versions of a cast."""
    return {route.slot for route in cast.values()}


class Run:
    """One request to an ensemble, under way."""

    def __init__(
        self,
        front: FrontEnd,
        prepared: Prepared,
        data: Sequence[Data],
        reply: Reply,
        deadline_ns: int = NEVER_NS,
    ) -> None:
        """`deadline_ns`: when its client's patience ends, if the client has said so."""
        self._front = front
        self._reply: Reply | None = reply
        self._began_ns = time.monotonic_ns()
        self._deadline_ns = min(deadline_ns, self._began_ns + front.timeout_ns(prepared))
        self._cast = cast_of(front.table, prepared.route)
        # What it holds is the task's alone, and let go of when that ends.
        self._task = asyncio.get_running_loop().create_task(self._run(prepared, data))

    def abandon(self) -> None:
        """The client is gone."""
        self._reply = None
        self._task.cancel()

    async def _run(self, prepared: Prepared, data: Sequence[Data]) -> None:
        front, deadline_ns = self._front, self._deadline_ns
        slot = prepared.route.slot
        try:
            with front.uses.keep(slots_of(self._cast)):
                tensors = await _through(front, prepared, data, deadline_ns, 1, self._cast)
            block = _block_of(prepared, tensors)
        except OvercommitError as error:
            front.dispatch.tallies.count_failure(slot, self._began_ns)
            if self._reply is not None:
                self._reply.fail(error)
        except Exception:  # the request boundary
            log.exception("a request for the ensemble '%s' failed", prepared.route.name)
            if self._reply is not None:
                self._reply.fail(failures.internal())
        else:
            took_ns = time.monotonic_ns() - self._began_ns
            # Its steps have the times: what an ensemble takes beyond them is in none of its stages.
            front.dispatch.tallies.count(slot, took_ns, 0, 0, 1, stages.pack(1, 1, 0, 0))
            if self._reply is not None:
                self._reply.succeed(block)


async def ask_any(
    front: FrontEnd,
    plans: RoutePlans,
    tensors: Sequence[Tensor],
    outputs: Sequence[str] | None = None,
    *,
    cast: Cast,
    deadline_ns: int | None = None,
    depth: int = 0,
    sequence: Ask | None = None,
) -> list[Tensor]:
    """Run one request of a model or of an ensemble.  Raises what a client would be told."""
    timeout_us = None
    if deadline_ns is not None:
        timeout_us = (deadline_ns - time.monotonic_ns()) // _US
        if timeout_us <= 0:
            raise DeadlineExceeded(
                f"model '{plans.route.name}': no time is left of the request's when its turn comes"
            )
    if not plans.route.steps:
        return await ask(front, plans, tensors, outputs, timeout_us=timeout_us, sequence=sequence)
    request, tail = request_of(tensors, outputs, timeout_us=timeout_us, sequence=sequence)
    prepared, data = prepare_decoded(plans, request, tail)
    end_ns = time.monotonic_ns() + front.timeout_ns(prepared)
    found = await _through(front, prepared, data, end_ns, depth + 1, cast)
    return [found[name] for name in _wanted(prepared)]


async def _through(
    front: FrontEnd,
    prepared: Prepared,
    data: Sequence[Data],
    deadline_ns: int,
    depth: int,
    cast: Cast,
) -> dict[str, Tensor]:
    """Run all steps; return every tensor.  Raises OvercommitError."""
    route = prepared.route
    if depth > ENSEMBLE_DEPTH_MAX:
        raise ModelError(
            f"model '{route.name}': ensembles are nested more than {ENSEMBLE_DEPTH_MAX} deep, or in "
            f"a circle"
        )
    loop = asyncio.get_running_loop()
    made: dict[str, asyncio.Future[Tensor]] = {
        tensor: loop.create_future() for step in route.steps for tensor in step.outputs.values()
    }
    for place, each in zip(prepared.plan.places, data, strict=True):
        name = route.inputs[place.index].name
        made[name] = loop.create_future()
        made[name].set_result(Tensor(name, place.datatype, place.shape, each))
    try:
        async with asyncio.TaskGroup() as group:
            for number, step in enumerate(route.steps):
                work = _step(front, prepared, number, step, made, deadline_ns, depth, cast)
                group.create_task(work)
    except BaseExceptionGroup as errors:
        raise _first_of(errors) from None
    return {name: future.result() for name, future in made.items()}


async def _step(
    front: FrontEnd,
    prepared: Prepared,
    number: int,
    step: Step,
    made: Mapping[str, asyncio.Future[Tensor]],
    deadline_ns: int,
    depth: int,
    cast: Cast,
) -> None:
    where = f"model '{prepared.route.name}', step {number + 1}: "
    try:
        tensors = []
        for model_name, tensor in step.inputs.items():
            if tensor not in made:
                continue  # an optional input that was left out; the model says if it minds
            given = await made[tensor]
            tensors.append(Tensor(model_name, given.datatype, given.shape, given.data))
        route = cast.get((step.model, step.version))
        if route is None:
            route = await front.wait_for_route(step.model, step.version or None)
        answers = await ask_any(
            front,
            front.plans.of(route),
            tensors,
            list(step.outputs),
            cast=cast,
            deadline_ns=deadline_ns,
            depth=depth,
            sequence=prepared.sequence,
        )
    except OvercommitError as error:
        raise type(error)(where + error.message, retry_after_s=error.retry_after_s) from error
    found = {answer.name: answer for answer in answers}
    for model_name, tensor in step.outputs.items():
        answer = found.get(model_name)
        if answer is None:
            raise ModelError(f"{where}model '{step.model}' gave no output '{model_name}'")
        made[tensor].set_result(Tensor(tensor, answer.datatype, answer.shape, answer.data))


def _first_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    for error in errors.exceptions:
        if isinstance(error, OvercommitError):
            return error
    return errors.exceptions[0]


def _wanted(prepared: Prepared) -> list[str]:
    if prepared.selection is not None:
        return [name for name, _ in prepared.selection]
    return [spec.name for spec in prepared.route.outputs]


def _block_of(prepared: Prepared, tensors: Mapping[str, Tensor]) -> memoryview:
    """Lay the outputs out as a worker lays them out in an egress block.  Raises ModelError."""
    route = prepared.route
    wanted = set(_wanted(prepared))
    found: list[tuple[int, Tensor]] = []
    for index, spec in enumerate(route.outputs):
        if spec.name in wanted:
            tensor = tensors[spec.name]
            _check(route.name, spec.name, spec.datatype, spec.shape, tensor)
            found.append((index, tensor))
    places, total = payload.plan(
        [(index, each.datatype, len(each.data), each.shape) for index, each in found]
    )
    block = memoryview(bytearray(total))
    payload.encode(block, places)
    for place, (_, tensor) in zip(places, found, strict=True):
        block[place.offset : place.offset + place.nbytes] = tensor.data
    return block


def _check(model: str, name: str, datatype: str, shape: Sequence[int], tensor: Tensor) -> None:
    fits = len(shape) == len(tensor.shape) and all(
        size in (-1, given) for size, given in zip(shape, tensor.shape, strict=True)
    )
    if tensor.datatype != datatype or not fits:
        raise ModelError(
            f"model '{model}': its steps gave '{name}' as {tensor.datatype} {list(tensor.shape)}, its "
            f"config says {datatype} {list(shape)}"
        )
