"""The cheapest of all models: `y = x * scale`, with a scale of its own for each model.

What it costs is what the server costs.  A scale that is 1 makes it an echo, for servers that have
one built in; distinct scales tell an answer of a wrong model.

The product of two FP32 numbers is rounded once, by NumPy and by PyTorch alike, so an answer is right
to the bit or wrong.
"""

from __future__ import annotations

import msgspec
import numpy as np

from overcommit.bench.dialect import V2, Array, Dialect
from overcommit.bench.errors import BenchError
from overcommit.bench.known import KnownWorkload
from overcommit.bench.popularity import InTurn, Popularity

INPUT_SEED = 20_241
SCALE_STEPS = 1024


def scale_of(number: int) -> float:
    """Return the scale of the model with this number: exact in FP32, and no other has it."""
    return 1.0 + number / SCALE_STEPS


class EchoPlan(msgspec.Struct, frozen=True, kw_only=True, tag="echo"):
    """FP32 `[1, columns]` there and back, multiplied by the model's scale."""

    models: tuple[str, ...] = ("echo",)
    scales: tuple[float, ...] = ()  # empty: 1 for each; exact in FP32
    columns: int = 16
    inputs: int = 64  # how many different ones
    dialect: Dialect = V2()
    popularity: Popularity = InTurn()
    tolerance: float = 0.0


class EchoWorkload(KnownWorkload):
    """See `EchoPlan`."""

    def __init__(self, plan: EchoPlan, seed: int, part: int = 0, parts: int = 1) -> None:
        scales = plan.scales or (1.0,) * len(plan.models)
        if len(scales) != len(plan.models) or not plan.models:
            raise BenchError(f"{len(plan.models)} models need as many scales, not {len(scales)}")
        rows = np.random.default_rng(INPUT_SEED).standard_normal(
            (plan.inputs, 1, plan.columns), np.float32
        )
        factors = np.array(scales, np.float32)

        def expected(model: int, number: int) -> Array:
            answer: Array = rows[number] * factors[model]
            return answer

        super().__init__(
            plan.models,
            list(rows),
            expected,
            plan.dialect,
            plan.popularity,
            seed=seed,
            part=part,
            parts=parts,
            tolerance=plan.tolerance,
        )
