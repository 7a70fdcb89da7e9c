"""One inference that a gRPC call asked for: from its message to the answer, a `Reply` of the dispatch.

    begun --> submitted, or an ensemble's run --[succeed, fail]--> over
    begun --[its image is being made]--> waits for the route --> submitted
    any --[abandon]--> over, and cancelled

Invariants
 1. The owner hears once how it ended, unless it abandoned it.
 2. The blocks are given back by the dispatch alone, whatever becomes of the call.

Called by the calls (in) and by the dispatch (out).
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Protocol

from overcommit.runtime.errors import OvercommitError
from overcommit.server import failures
from overcommit.server.ensembles import Run
from overcommit.server.grpc_answers import Answers
from overcommit.server.grpc_requests import Asked, Requests
from overcommit.server.grpc_wire import CallFailed, failure_of
from overcommit.server.inference import Data, Prepared

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd
    from overcommit.server.parcels import Pending
    from overcommit.server.plans import RoutePlans

log = logging.getLogger("overcommit.grpc")


class Service(Protocol):
    """What calls share: who answers them."""

    front: FrontEnd
    requests: Requests
    answers: Answers


class Owner(Protocol):
    """Who asked for an inference."""

    def on_answer(self, inference: Inference, pieces: list[bytes]) -> None:
        """The model answered: a ModelInferResponse in pieces."""

    def on_failure(self, inference: Inference, failure: CallFailed) -> None:
        """There will be no answer."""


class Inference:
    """One ModelInferRequest; a `Reply` of the dispatch."""

    __slots__ = (
        *("_owner", "_pending", "_prepared", "_run", "_service", "_version"),
        *("answer", "id", "is_over"),
    )

    def __init__(self, service: Service, owner: Owner, version: str | None = None) -> None:
        """`version`: what stands for a version, if the request names none."""
        self._service = service
        self._version = version
        self._owner = owner
        self._pending: Pending | None = None
        self._prepared: Prepared | None = None
        self._run: Run | None = None  # of an ensemble
        self.id = ""
        self.is_over = False
        self.answer: list[bytes] | None = None  # of a stream, until it is its turn

    def begin(self, message: Data, deadline_ns: int) -> None:
        """Check and submit; the owner hears of it, perhaps at once."""
        service = self._service
        front = service.front
        try:
            asked = service.requests.read(message)
            self.id = asked.id
            version = asked.version or self._version
            plans = front.plans.serving.get((asked.name, version))
            if plans is None:
                route = front.find(asked.name, version)
                if route is None:
                    asyncio.get_running_loop().create_task(self._begin_later(asked, deadline_ns))
                    return
                if route.steps:
                    self._run_ensemble(front.plans.of(route), asked, deadline_ns)
                    return
                plans = front.plans.serve(asked.name, version, route)
            self._submit(plans, asked, deadline_ns)
        except OvercommitError as error:
            self.fail(error)
        except Exception:  # the request boundary
            self._fail_badly()

    async def _begin_later(self, asked: Asked, deadline_ns: int) -> None:
        """The version's image is being made: wait for it."""
        front = self._service.front
        try:
            route = await front.wait_for_route(asked.name, asked.version or self._version)
            if not self.is_over and route.steps:
                self._run_ensemble(front.plans.of(route), asked, deadline_ns)
            elif not self.is_over:
                self._submit(front.plans.of(route), asked, deadline_ns)
        except OvercommitError as error:
            self.fail(error)
        except Exception:  # the request boundary
            self._fail_badly()

    def _run_ensemble(self, plans: RoutePlans, asked: Asked, deadline_ns: int) -> None:
        self._prepared, data = self._service.requests.prepare(plans, asked)
        # The message's bytes may be another's when this returns.
        copies = [bytes(each) for each in data]
        self._run = Run(self._service.front, self._prepared, copies, self, deadline_ns)

    def _submit(self, plans: RoutePlans, asked: Asked, deadline_ns: int) -> None:
        front = self._service.front
        self._prepared, data = prepared, _ = self._service.requests.prepare(plans, asked)
        now_ns = time.monotonic_ns()
        dispatch = front.dispatch
        plan = prepared.plan
        self._pending = pending = dispatch.open(plans.route, plan, self, now_ns)
        dispatch.parcels.fill(pending, plan, data)
        if prepared.level:
            dispatch.urge(pending, prepared.level)
        dispatch.send(pending, min(now_ns + front.timeout_ns(prepared), deadline_ns))

    def abandon(self) -> None:
        """Nobody wants the answer any more."""
        self.is_over = True
        self._prepared = None
        pending, self._pending = self._pending, None
        if pending is not None:
            self._service.front.dispatch.abandon(pending)
        if self._run is not None:
            self._run.abandon()

    # --- of the dispatch ------------------------------------------------------------------------
    def succeed(self, view: memoryview) -> None:
        """Encode the answer, whose block is another's afterwards."""
        prepared = self._prepared
        self._pending = self._prepared = None
        if self.is_over:
            return
        assert prepared is not None
        try:
            pieces = self._service.answers.respond(prepared, view, self.id)
        except OvercommitError as error:
            self.fail(error)
            return
        except Exception:  # the request boundary: others wait for their completions
            self._fail_badly()
            return
        self.is_over = True
        self._owner.on_answer(self, pieces)

    def fail(self, error: OvercommitError) -> None:
        """There will be no answer."""
        self._pending = self._prepared = None
        if not self.is_over:
            self.is_over = True
            self._owner.on_failure(self, failure_of(error))

    def _fail_badly(self) -> None:
        log.exception("a gRPC inference failed")
        self.fail(failures.internal())
