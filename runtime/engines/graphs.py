"""Calls that are recorded once and replayed: CUDA graphs, by bound model and shape.

A graph holds addresses, and those of a version's weights do not change while it is bound, wherever its
chunks lie: so a graph is good after every eviction and reload.  What is captured for whom, and when it
is given up, is decided here; capturing itself is the backend's.

    a shape of a model:  SEEN n times --[n = GRAPH_AFTER: captured]--> CAPTURED --[evicted]--> SEEN
                         SEEN --[cannot be captured]--> REFUSED

Invariants
 1. A graph is replayed for the model and the shapes that it was captured for, and for no others.
 2. At most `graphs_max` graphs are kept, GRAPH_SHAPES_MAX shapes of a model are watched; what was
    replayed longest ago goes first.
 3. A model's graphs go with the model.

Called by `device_runner`, from the worker's one thread.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Protocol

import torch

from overcommit.runtime.device_limits import GRAPH_AFTER, GRAPH_SHAPES_MAX, GRAPHS_MAX

Tensors = dict[str, torch.Tensor]
Call = Callable[[Tensors], Tensors]


class Graph(Protocol):
    """One captured call."""

    def replay(self, inputs: Tensors) -> Tensors:
        """Run it over these; what it returns is good until any graph is replayed."""
        ...


class CannotCapture(Exception):
    """The call does something that no graph holds."""


class _Shape:
    """One shape of one model."""

    __slots__ = ("__weakref__", "graph", "is_refused", "seen")

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self.is_refused = False
        self.seen = 0


class ModelGraphs:
    """The shapes of one bound model; the model holds it."""

    __slots__ = ("__weakref__", "seat", "shapes")

    def __init__(self) -> None:
        self.shapes: dict[Hashable, _Shape] = {}
        self.seat = 0  # whose stream and memory they are for

    @property
    def has_any(self) -> bool:
        """Whether any shape is captured."""
        return any(shape.graph is not None for shape in self.shapes.values())


class GraphBook:
    """All graphs of a process."""

    def __init__(
        self, capture: Callable[[Call, Tensors], Graph], graphs_max: int = GRAPHS_MAX
    ) -> None:
        """`capture` may raise CannotCapture; anything else it raises is the caller's.

        It waits until nothing is under way, before it does anything.
        """
        self._capture = capture
        self._graphs_max = graphs_max
        self._captured: OrderedDict[int, weakref.ref[_Shape]] = OrderedDict()
        self.captures = self.replays = 0

    def __len__(self) -> int:
        return len(self._captured)

    def is_wanted(self, model: ModelGraphs, key: Hashable) -> bool:
        """Whether this shape is captured, or may be: then `run` it, else call it as it is."""
        shape = model.shapes.get(key)
        if shape is None:
            return len(model.shapes) < GRAPH_SHAPES_MAX
        return not shape.is_refused

    def run(self, model: ModelGraphs, key: Hashable, call: Call, inputs: Tensors) -> Tensors:
        """Replay, or call and perhaps capture for the next time.  Raises what the call raises."""
        shape = model.shapes.get(key)
        if shape is None:
            shape = model.shapes[key] = _Shape()
        if shape.graph is None and shape.seen >= GRAPH_AFTER and not shape.is_refused:
            self._try_capture(shape, call, inputs)
        if shape.graph is None:
            shape.seen += 1
            return call(inputs)
        self._captured.move_to_end(id(shape))
        self.replays += 1
        return shape.graph.replay(inputs)

    def clear(self) -> None:
        """Let go of every graph: the device is short of memory.  They come again when they are used."""
        for reference in self._captured.values():
            shape = reference()
            if shape is not None:
                shape.graph, shape.seen = None, 0
        self._captured.clear()

    def _try_capture(self, shape: _Shape, call: Call, inputs: Tensors) -> None:
        dropped: list[Graph | None] = []
        while len(self._captured) >= self._graphs_max:
            _, reference = self._captured.popitem(last=False)
            oldest = reference()
            if oldest is not None:
                dropped.append(oldest.graph)  # it may be under way until the device is at rest
                oldest.graph, oldest.seen = None, 0
        try:
            shape.graph = self._capture(call, inputs)
        except CannotCapture:
            shape.is_refused = True
            return
        self.captures += 1
        number = id(shape)
        self._captured[number] = weakref.ref(shape)
        weakref.finalize(shape, self._captured.pop, number, None).atexit = False


_LEAST_ROWS: Final = 1


def bucket_of(rows: int, rows_max: int) -> int:
    """Return for how many rows a graph is captured: the next power of two, `rows_max` at most."""
    bucket = _LEAST_ROWS
    while bucket < rows:
        bucket *= 2
    return max(rows, min(bucket, rows_max))
