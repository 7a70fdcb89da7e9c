"""A request of zeros to a version that nobody is sent to yet, on the supervisor's behalf.

Called by the front end, for each `Rehearse`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from overcommit.runtime.config import smallest
from overcommit.runtime.errors import (
    BadRequest,
    DeadlineExceeded,
    ModelError,
    OvercommitError,
    Overloaded,
    Unavailable,
    WorkerLost,
)
from overcommit.runtime.front_end_messages import Rehearsed, Route
from overcommit.runtime.payload import DATATYPES
from overcommit.runtime.sequence_terms import Ask
from overcommit.server.asking import Tensor, ask
from overcommit.server.plans import RoutePlans

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd

_RETRIED: Final = (Overloaded, Unavailable, DeadlineExceeded, WorkerLost)


def zeros(route: Route) -> list[Tensor]:
    """The smallest request that the version's inputs allow."""
    tensors = []
    for spec in route.inputs:
        if spec.optional:
            continue
        shape = smallest(spec.shape)
        count = math.prod(shape)
        width = DATATYPES[spec.datatype][1]
        data = bytes(count * (width or 4))  # of BYTES: elements without bytes
        tensors.append(Tensor(spec.name, spec.datatype, shape, data))
    return tensors


async def rehearse(front: FrontEnd, route: Route) -> Rehearsed:
    """Run it; say how it went."""
    try:
        sequence = Ask(1, is_start=True, is_end=True) if route.sequence else None
        await ask(front, RoutePlans(route), zeros(route), sequence=sequence)
    except (BadRequest, ModelError) as error:
        # It is loaded and bound; whether zeros mean anything to it is another matter.
        started = "cannot be started" not in error.message
        return Rehearsed(slot=route.slot, ok=started, message=error.message)
    except OvercommitError as error:
        retry = isinstance(error, _RETRIED) and "cannot be started" not in error.message
        return Rehearsed(slot=route.slot, ok=False, message=error.message, retry=retry)
    return Rehearsed(slot=route.slot, ok=True)
