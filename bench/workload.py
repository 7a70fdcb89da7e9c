"""What the load generator asks, and how it knows that an answer is right.

A workload draws the next request and judges its answer.  `EmbeddingPlan` asks many variants of one
text encoder for embeddings; an answer is right when it is its own variant's reference.  A wrong
answer is explained: the variant whose reference is nearest is named, because an answer of another
variant is the bug to fear.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from overcommit.bench.popularity import Zipf
from overcommit.bench.references import OUTPUT, TOLERANCE, References
from overcommit.bench.wire import Template, decode, infer_template


class EmbeddingPlan(msgspec.Struct, frozen=True, kw_only=True, tag="embedding"):
    """Embeddings of the fixed inputs, from variants drawn by a Zipf law."""

    references: str  # the file that References.save wrote
    exponent: float = 1.1
    order_seed: int = 0
    json_share: float = 0.125  # of the requests; the rest is binary
    tolerance: float = TOLERANCE


@dataclass(slots=True, frozen=True)
class Request:
    """One request that was drawn."""

    payload: bytes
    id: bytes
    target: str
    variant: int
    input: int


class Workload(Protocol):
    """Draws requests and judges answers."""

    def draw(self, request_id: bytes) -> Request:
        """Return the next request, with this id in it."""
        ...

    def judge(self, request: Request, headers: dict[bytes, bytes], body: bytes) -> str | None:
        """Return None for the right answer, else what is wrong with it."""
        ...


class EmbeddingWorkload:
    """See `EmbeddingPlan`."""

    def __init__(self, plan: EmbeddingPlan, seed: int) -> None:
        self._references = References.load(Path(plan.references))
        self._tolerance = plan.tolerance
        self._json_share = plan.json_share
        count = len(self._references.names)
        self._zipf = Zipf(count, plan.exponent, seed=seed, order_seed=plan.order_seed)
        self._random = np.random.default_rng((seed, 1))
        self._templates: dict[tuple[int, int, bool], Template] = {}

    def draw(self, request_id: bytes) -> Request:
        """Return a request to a variant by popularity, for a random input."""
        variant = self._zipf.draw()
        number = int(self._random.integers(len(self._references.inputs)))
        binary = self._random.random() >= self._json_share
        key = (variant, number, binary)
        template = self._templates.get(key)
        name = self._references.names[variant]
        if template is None:
            inputs = self._references.inputs[number]
            template = infer_template(name, inputs, OUTPUT, binary=binary)
            self._templates[key] = template
        return Request(template.render(request_id), request_id, name, variant, number)

    def judge(self, request: Request, headers: dict[bytes, bytes], body: bytes) -> str | None:
        """Compare with the variant's own reference."""
        try:
            answer = decode(headers, body)
            output = answer.outputs[OUTPUT]
        except (ValueError, KeyError, msgspec.MsgspecError) as error:
            return f"{request.target}: not a V2 answer: {error!r}"
        if answer.id != request.id.decode():
            return f"{request.target}: answer has id '{answer.id}', asked was {request.id.decode()}"
        outputs = self._references.outputs[request.input]
        expected = outputs[request.variant]
        if output.shape != expected.shape:
            return f"{request.target}: shape {output.shape} instead of {expected.shape}"
        away = float(np.abs(output - expected).max())
        if away <= self._tolerance:  # False for NaN too
            return None
        distances = np.abs(outputs - output).reshape(len(outputs), -1).max(axis=1)
        if np.isnan(distances).all():
            return f"{request.target}: input {request.input}: the answer is not a number"
        nearest = int(np.nanargmin(distances))
        whose = self._references.names[nearest]
        if distances[nearest] <= self._tolerance:
            return f"{request.target}: input {request.input}: got the answer of {whose}"
        return (
            f"{request.target}: input {request.input}: off by {away:.3g}, "
            f"limit {self._tolerance:g}; nearest is {whose}, off by {distances[nearest]:.3g}"
        )


def make_workload(plan: EmbeddingPlan, seed: int) -> Workload:
    """Build the workload that a plan names."""
    return EmbeddingWorkload(plan, seed)
