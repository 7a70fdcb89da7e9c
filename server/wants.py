"""How a request wants its outputs: which of them, in which form, and where.

Called by `inference`.
"""

from __future__ import annotations

from collections.abc import Sequence

from overcommit.runtime.errors import BadRequest
from overcommit.server import codec
from overcommit.server.answer_plans import Selection, Want
from overcommit.server.classification import Classes
from overcommit.server.plans import RoutePlans
from overcommit.server.regions import Held, window_of


def read(
    plans: RoutePlans, outputs: Sequence[codec.RequestOutput]
) -> tuple[Selection, dict[str, Held]]:
    """Return what is wanted, and the regions held for it, by output.

    Raises BadRequest, NotFound, Forbidden, PayloadTooLarge.
    """
    known = {spec.name for spec in plans.route.outputs}
    held: dict[str, Held] = {}
    for output in outputs:
        if output.name not in known:
            raise BadRequest(f"unknown output '{output.name}'; its outputs are {sorted(known)}")
    return tuple([(each.name, _want(plans, each, held)) for each in outputs]), held


def _want(plans: RoutePlans, output: codec.RequestOutput, held: dict[str, Held]) -> Want:
    """Read how an output is wanted; hold where it goes.  Raises BadRequest, NotFound, Forbidden."""
    parameters = output.parameters
    if not parameters:
        return None
    own = codec.flag(parameters, "binary_data")
    window = window_of(parameters)
    classes = codec.whole(parameters, "classification")
    if window is not None:
        if classes:
            raise BadRequest("Output can't set both 'shared_memory_region' and 'classification'")
        held[output.name] = plans.regions.hold(window)
        return "region"
    return (Classes(classes), own) if classes else own
