"""Large tensors there and back, compared to the last bit: what moving bytes costs.

A few different payloads, in random order: a server that answered from a buffer that still held the
one before would be found out.
"""

from __future__ import annotations

import msgspec
import numpy as np

from overcommit.bench.dialect import V2, Array, Dialect
from overcommit.bench.echo import INPUT_SEED
from overcommit.bench.known import KnownWorkload
from overcommit.bench.popularity import InTurn, Popularity

VALUE_BYTES = 4


class PayloadPlan(msgspec.Struct, frozen=True, kw_only=True, tag="payload"):
    """FP32 `[1, nbytes / 4]` there and back, as it is."""

    nbytes: int
    models: tuple[str, ...] = ("echo",)
    payloads: int = 2
    dialect: Dialect = V2(binary=True)
    popularity: Popularity = InTurn()


class PayloadWorkload(KnownWorkload):
    """See `PayloadPlan`."""

    def __init__(self, plan: PayloadPlan, seed: int, part: int = 0, parts: int = 1) -> None:
        random = np.random.default_rng(INPUT_SEED)
        columns = max(1, plan.nbytes // VALUE_BYTES)
        payloads: list[Array] = [
            random.random((1, columns), np.float32) for _ in range(plan.payloads)
        ]
        super().__init__(
            plan.models,
            payloads,
            lambda model, number: payloads[number],
            plan.dialect,
            plan.popularity,
            seed=seed,
            part=part,
            parts=parts,
        )
