"""Embeddings from many variants of one text encoder, each answer against its variant's reference.

A wrong answer is explained: the variant whose reference is nearest is named, because an answer of
another variant is the bug to fear.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from overcommit.bench.popularity import ByZipf, Popularity, make_draws
from overcommit.bench.references import OUTPUT, TOLERANCE, References
from overcommit.bench.request import Request
from overcommit.bench.wire import Template, decode, infer_template


class EmbeddingPlan(msgspec.Struct, frozen=True, kw_only=True, tag="embedding"):
    """Embeddings of the fixed inputs, from variants drawn by their popularity."""

    references: str  # the file that References.save wrote
    popularity: Popularity | None = None  # None: Zipf with the two values below
    exponent: float = 1.1
    order_seed: int = 0
    json_share: float = 0.125  # of the requests; the rest is binary
    tolerance: float = TOLERANCE


class EmbeddingWorkload:
    """See `EmbeddingPlan`."""

    uses_ids = True

    def __init__(self, plan: EmbeddingPlan, seed: int, part: int = 0, parts: int = 1) -> None:
        self._references = References.load(Path(plan.references))
        self._tolerance = plan.tolerance
        self._json_share = plan.json_share
        count = len(self._references.names)
        popularity = plan.popularity or ByZipf(exponent=plan.exponent, order_seed=plan.order_seed)
        self._models = make_draws(popularity, count, seed, part, parts)
        sizes = [outputs[0].nbytes for outputs in self._references.outputs]
        self.answer_bytes_max = max(sizes, default=0)
        self._random = np.random.default_rng((seed, 1))
        self._templates: dict[tuple[int, int, bool], Template] = {}

    def draw(self, request_id: bytes) -> Request:
        """Return a request to a variant by popularity, for a random input."""
        variant = self._models.draw()
        number = int(self._random.integers(len(self._references.inputs)))
        binary = self._random.random() >= self._json_share
        key = (variant, number, binary)
        template = self._templates.get(key)
        name = self._references.names[variant]
        if template is None:
            inputs = self._references.inputs[number]
            template = infer_template(name, inputs, OUTPUT, binary=binary)
            self._templates[key] = template
        return Request(template.render(request_id), name, request_id, variant, number)

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
