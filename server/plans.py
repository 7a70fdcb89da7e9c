"""How the requests for one version lie in a block, and which plans there are of its answers.

Requests for a version differ in their numbers and seldom in anything else.  What depends only on
names, datatypes and shapes is worked out once, checked, and kept: the block's header and places for
requests, the fixed pieces of the JSON for answers (`answer_plans.py`).

Invariants
 1. An `InputPlan` exists only for inputs that fit the version: names, datatypes, ranks, fixed
    sizes, one size for each named axis, no input missing or twice.
 2. An `OutputPlan` is used only for a block whose header is byte for byte the one that it was made
    from, after `payload.decode` had checked that.
 3. At most PLANS_MAX plans of each kind are kept for a version.

Called by `inference`; one `RoutePlans` for each route that is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from overcommit.runtime import payload, sequence_terms
from overcommit.runtime.config import RANK_MAX, TensorSpec
from overcommit.runtime.errors import BadRequest
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.payload import DATATYPES, TensorPlace
from overcommit.server import classification, codec
from overcommit.server.answer_plans import Classify, OutputPlan, Outputs, Selection, write_plan
from overcommit.server.classification import Labels
from overcommit.server.limits import DIMENSION_MAX, PLANNED_ROUTES_MAX, PLANS_MAX
from overcommit.server.regions import Regions
from overcommit.server.templates import Template, Templates

if TYPE_CHECKING:
    from overcommit.server.inference import Prepared

Key = tuple[tuple[str, str, tuple[int, ...]], ...]  # of each input: name, datatype, shape
_UNKNOWN_AXIS = 128  # guess for an output axis that no input decides


@dataclass(slots=True, frozen=True)
class InputPlan:
    """Where the tensors of a request lie.  `header` reaches up to the first tensor."""

    places: tuple[TensorPlace, ...]  # in the order of the request
    header: bytes
    nbytes: int
    out_bytes: int  # a guess of the egress needed
    counts: tuple[int, ...]  # elements of each tensor


@dataclass(slots=True)
class Shape:
    """What routes that take and give the same share.

    What thousands of fine-tunes have in common stays in the processor's cache; a request to each in
    turn finds nothing else there, so what a route has of its own is kept short.
    """

    inputs: dict[Key, InputPlan] = field(default_factory=dict)
    outputs: Outputs = field(default_factory=dict)
    selections: dict[Selection, Selection] = field(default_factory=dict)  # those of `outputs`
    header_words: int = 0  # of the answer seen last: the next one is most likely as long
    templates: Templates = field(default_factory=Templates)

    def find(
        self, known: Outputs, view: memoryview, selection: Selection, all_binary: bool
    ) -> OutputPlan | None:
        """Return the plan among these of an answer that is laid out like the last one."""
        plan = known.get((bytes(view[: self.header_words]), selection, all_binary))
        if plan is None or (plan.parts and plan.parts[-1].end > len(view)):
            return None
        return plan


class RoutePlans:
    """The plans of one route."""

    __slots__ = (
        *("_outputs", "_prepared", "_specs", "answer_head", "ask_shape"),
        *("labels", "recent", "regions", "route", "shape", "templates"),
    )

    def __init__(
        self,
        route: Route,
        shape: Shape | None = None,
        regions: Regions | None = None,
        labels: Labels | None = None,
    ) -> None:
        self.route = route
        self.regions = regions or Regions()
        self.labels = labels or Labels()
        self._specs = {spec.name: (index, spec) for index, spec in enumerate(route.inputs)}
        # Of a model with state: the shape of the tensor that tells a worker of the sequence.
        self.ask_shape: tuple[int, ...] | None = None
        if route.sequence:
            self.ask_shape = sequence_terms.ask_shape(route.max_batch_size > 0)
        self.shape = shape = shape or Shape()
        self.templates = shape.templates
        # What a template's requests have in common; the last one's beside the others.
        self._prepared: dict[Template, Prepared] = {}
        self.recent: tuple[Template | None, Prepared | None] = (None, None)
        # Answers with classes, which have labels of the version.
        self._outputs: Outputs = {}
        self.answer_head = b'{"model_name":%b,"model_version":%b' % (
            *(codec.encode(route.name), codec.encode(route.version)),
        )

    # --- requests -------------------------------------------------------------------------------
    def known(self, key: Key) -> InputPlan | None:
        """The plan of these inputs, if there is one."""
        return self.shape.inputs.get(key)

    def check(self, key: Key) -> None:
        """Raise BadRequest when these inputs do not fit the version."""
        specs = self._specs
        axes: dict[str, int] = {}
        seen: set[str] = set()
        for name, datatype, shape in key:
            found = specs.get(name)
            if found is None:
                raise BadRequest(f"unknown input '{name}'; its inputs are {sorted(specs)}")
            if name in seen:
                raise BadRequest(f"input '{name}' is given twice")
            seen.add(name)
            _check(self.route, found[1], datatype, shape, axes)
        for name, (_, spec) in specs.items():
            if name not in seen and not spec.optional:
                raise BadRequest(f"input '{name}' is missing; its inputs are {sorted(specs)}")

    def adapt(self, key: Key) -> Key:
        """Say one tensor of numbers as what the version takes, whatever it is called and holds.

        What cannot be is left as it is.
        """
        if len(key) != 1 or len(self._specs) != 1:
            return key
        (given,), (spec,) = key, self.route.inputs
        is_number = given[1] in codec.NUMBERS and spec.datatype in codec.FLOATS
        return ((spec.name, spec.datatype, given[2]),) if is_number else key

    def make(self, key: Key, sizes: Sequence[int]) -> InputPlan:
        """Make the plan of inputs that were checked and take this many bytes.

        Raises BadRequest when a shape needs another number of them.
        """
        tensors: list[tuple[int, str, int, tuple[int, ...]]] = []
        counts: list[int] = []
        axes: dict[str, int] = {}
        for (name, datatype, shape), nbytes in zip(key, sizes, strict=True):
            index, spec = self._specs[name] if name != sequence_terms.ASK_NAME else self._ask
            count = math.prod(shape)
            width = DATATYPES[datatype][1]
            if width and nbytes != count * width:
                raise BadRequest(
                    f"input '{name}' has {nbytes // width} elements, its shape {list(shape)} "
                    f"needs {count}"
                )
            counts.append(count)
            tensors.append((index, datatype, nbytes, shape))
            axes |= {axis: size for axis, size in zip(spec.axes, shape, strict=False) if axis}
        places, total = payload.plan(tensors)
        header = bytearray(payload.header_bytes([len(shape) for *_, shape in tensors]))
        payload.encode(memoryview(header), places)
        plan = InputPlan(places, bytes(header), total, _guess(self.route, axes), tuple(counts))
        # The bytes of a BYTES tensor differ from request to request.
        if all(spec.datatype != "BYTES" for _, spec in self._specs.values()):
            inputs = self.shape.inputs
            if len(inputs) >= PLANS_MAX:
                inputs.clear()
            inputs[key] = plan
        return plan

    @property
    def _ask(self) -> tuple[int, TensorSpec]:
        return len(self.route.inputs), sequence_terms.ask_spec(self.route.max_batch_size > 0)

    def remember(self, template: Template, prepared: Prepared) -> None:
        """Keep what requests that this template reads have in common."""
        if len(self._prepared) >= PLANS_MAX:
            self._prepared.clear()
        self._prepared[template] = prepared

    def recall(self, template: Template) -> Prepared | None:
        """Return what was remembered with this template."""
        recent, prepared = self.recent
        if template is not recent:
            prepared = self._prepared.get(template)
            if prepared is not None:
                self.recent = (template, prepared)
        return prepared

    # --- answers --------------------------------------------------------------------------------
    def select(self, selection: Selection) -> tuple[Selection, Outputs]:
        """Return what stands for a selection from now on, and the plans of answers to it."""
        if selection is None:
            return None, self.shape.outputs
        if any(isinstance(want, tuple) for _, want in selection):
            return selection, self._outputs
        same = self.shape.selections
        if len(same) >= PLANS_MAX:
            same.clear()
        return same.setdefault(selection, selection), self.shape.outputs

    def write(
        self, known: Outputs, view: memoryview, selection: Selection, all_binary: bool
    ) -> OutputPlan:
        """Make the plan of an answer, and keep it among these, which `select` gave.

        Raises ProtocolError when the block is not an answer.
        """
        places = payload.decode(view)
        words = payload.WORD_BYTES * (2 + sum(5 + len(place.shape) for place in places))
        plan = write_plan(self.route.outputs, places, selection, all_binary, self.classes)
        self.shape.header_words = words
        if len(known) >= PLANS_MAX:
            known.clear()
        known[bytes(view[:words]), selection, all_binary] = plan
        return plan

    def classes(self, place: TensorPlace, count: int) -> tuple[Classify, tuple[int, ...]]:
        """How an output's highest values are found, and their shape.  Raises RepositoryError."""
        batches = self.route.max_batch_size > 0
        labels = self.labels.of(self.route, place.index)

        def classify(data: memoryview) -> list[bytes]:
            return classification.classify(
                *(data, place.datatype, place.shape, count, labels), batches=batches
            )

        return classify, classification.shape_of(place.shape, count, batches=batches)


class Plans:
    """The plans of the routes asked lately."""

    def __init__(self, regions: Regions | None = None) -> None:
        self._regions = regions or Regions()
        self.labels = Labels()
        self._routes: dict[int, RoutePlans] = {}
        self._shapes: dict[bytes, Shape] = {}
        # Who is asked by name and serves: kept until a route changes.
        self.serving: dict[tuple[str, str | None], RoutePlans] = {}
        self.epoch = 1  # goes on with each change: what names mean may be another
        self.is_split: Callable[[str], bool] = lambda name: False

    def forget_names(self) -> None:
        """A route has changed."""
        self.serving.clear()
        self.epoch += 1

    def serve(self, name: str, version: str | None, route: Route) -> RoutePlans:
        """Return the plans of the route that this name means now."""
        if version is None and self.is_split(name):
            return self.of(route)  # the next request may be for another
        if len(self.serving) >= PLANNED_ROUTES_MAX:
            self.serving.clear()
        plans = self.serving[name, version] = self.of(route)
        return plans

    def of(self, route: Route) -> RoutePlans:
        """Return a route's plans; a route that was announced anew gets new ones."""
        plans = self._routes.get(route.slot)
        if plans is None or plans.route is not route:
            if len(self._routes) >= PLANNED_ROUTES_MAX:
                self._routes.clear()
                self._shapes.clear()
            key = (route.inputs, route.outputs, route.max_batch_size)
            shape = self._shapes.setdefault(msgspec.msgpack.encode(key), Shape())
            plans = self._routes[route.slot] = RoutePlans(
                *(route, shape, self._regions, self.labels),
            )
        return plans


def _check(
    route: Route, spec: TensorSpec, datatype: str, shape: tuple[int, ...], axes: dict[str, int]
) -> None:
    if datatype != spec.datatype:
        raise BadRequest(f"input '{spec.name}' is {datatype}, it must be {spec.datatype}")
    if len(shape) > RANK_MAX:
        raise BadRequest(f"input '{spec.name}' has {len(shape)} axes, the limit is {RANK_MAX}")
    misfit = f"input '{spec.name}' has shape {list(shape)}, it must fit {list(spec.shape)}"
    if len(shape) != len(spec.shape):
        raise BadRequest(misfit)
    for axis, (given, wanted) in enumerate(zip(shape, spec.shape, strict=True)):
        if not 0 <= given <= DIMENSION_MAX:
            raise BadRequest(
                f"input '{spec.name}' has shape {list(shape)}, but the sizes of a request are whole "
                f"numbers from 0 to {DIMENSION_MAX}"
            )
        if wanted >= 0 and given != wanted:
            raise BadRequest(misfit)
        name = spec.axes[axis] if spec.axes else None
        if name is not None and axes.setdefault(name, given) != given:
            raise BadRequest(
                f"input '{spec.name}' has {given} for the axis '{name}', another input has "
                f"{axes[name]}"
            )
    if route.max_batch_size and shape and shape[0] > route.max_batch_size:
        raise BadRequest(
            f"input '{spec.name}' has {shape[0]} rows, max_batch_size is {route.max_batch_size}; "
            f"send fewer rows or raise it in model.toml"
        )


def _guess(route: Route, axes: dict[str, int]) -> int:
    total = payload.header_bytes([len(spec.shape) for spec in route.outputs])
    for spec in route.outputs:
        nbytes = DATATYPES[spec.datatype][1] or 64
        names = spec.axes or (None,) * len(spec.shape)
        for name, size in zip(names, spec.shape, strict=True):
            nbytes *= size if size >= 0 else axes.get(name or "", _UNKNOWN_AXIS)
        total += nbytes + 64
    return total
