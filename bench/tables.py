"""Models that are mostly weights: a table of many rows, of which an answer needs one.

    y[b, :] = x[b, :] * table[int(x[b, 0]) mod rows, :]         x: FP32 [b, 16]

So loading costs what the table's bytes cost and computing costs nothing, and an answer is right only
if the right row of the right model's table was there.  A table's values are a formula of its seed,
row and column (`rows_of`), multiples of 1/256 in [1, 257): the client needs no table, and products
are rounded once, so an answer is right to the bit or wrong.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from overcommit.bench.dialect import V2, Array, Dialect
from overcommit.bench.echo import INPUT_SEED
from overcommit.bench.errors import BenchError
from overcommit.bench.known import KnownWorkload
from overcommit.bench.popularity import ByZipf, Popularity

COLUMNS: Final = 16
assert COLUMNS == 1 << 4
ROW_BYTES: Final = COLUMNS * 4
ROWS: Final = 131_072  # 8 MiB
ROWS_MAX: Final = 1 << 24  # a row's number is exact in FP32


def rows_of(seed: int, rows: NDArray[np.int64]) -> Array:
    """Return these rows of the table with this seed, FP32 `[len(rows), 16]`."""
    columns = np.arange(COLUMNS, dtype=np.uint64)
    cells: NDArray[np.uint64] = np.add.outer(rows.astype(np.uint64) << np.uint64(4), columns)
    # The finalizer of MurmurHash3, over 64 bits: any two tables differ in nearly every cell.
    cells += np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    cells ^= cells >> np.uint64(33)
    cells *= np.uint64(0xFF51AFD7ED558CCD)
    cells ^= cells >> np.uint64(33)
    cells *= np.uint64(0xC4CEB9FE1A85EC53)
    cells ^= cells >> np.uint64(33)
    values: Array = (cells & np.uint64(0xFFFF)).astype(np.float32) / np.float32(256) + np.float32(1)
    return values


class TablePlan(msgspec.Struct, frozen=True, kw_only=True, tag="table"):
    """One row of each model's table, chosen by the input."""

    models: tuple[str, ...]
    seeds: tuple[int, ...]  # of the tables
    rows: int = ROWS
    inputs: int = 64
    dialect: Dialect = V2()
    popularity: Popularity = ByZipf()


class TableWorkload(KnownWorkload):
    """See `TablePlan`."""

    def __init__(self, plan: TablePlan, seed: int, part: int = 0, parts: int = 1) -> None:
        if len(plan.seeds) != len(plan.models) or not plan.models:
            raise BenchError(f"{len(plan.models)} tables need as many seeds: {len(plan.seeds)}")
        if not 1 <= plan.rows <= ROWS_MAX:
            raise BenchError(f"a table has 1 to {ROWS_MAX} rows, not {plan.rows}")
        random = np.random.default_rng(INPUT_SEED)
        chosen = random.integers(plan.rows, size=plan.inputs)
        inputs = random.standard_normal((plan.inputs, 1, COLUMNS), np.float32)
        inputs[:, 0, 0] = chosen
        weights: dict[int, Array] = {}

        def expected(model: int, number: int) -> Array:
            rows = weights.get(model)
            if rows is None:
                rows = weights[model] = rows_of(plan.seeds[model], chosen)
            answer: Array = inputs[number] * rows[number]
            return answer

        super().__init__(
            plan.models,
            list(inputs),
            expected,
            plan.dialect,
            plan.popularity,
            seed=seed,
            part=part,
            parts=parts,
        )
