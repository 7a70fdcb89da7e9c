"""Models that share a frozen trunk: eight tables of 8 MiB, and a small head of their own.

    r = int(x[b, 0])
    y[b, :] = x[b, :] * trunk[0][r mod rows, :] * ... * trunk[7][r mod rows, :] * head[r mod 4096, :]

The trunk's file is one, linked into every model's folder, as it is where heads are trained on a frozen
model.  An answer needs a row of each layer of the trunk and one of the head, whose values are those
of `tables.rows_of`; products of FP32 in this order are the same everywhere, so an answer is right to
the bit or wrong.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from overcommit.bench.dialect import V2, Array, Dialect
from overcommit.bench.echo import INPUT_SEED
from overcommit.bench.known import KnownWorkload
from overcommit.bench.models_repo import TABLE_TOML, Advance, check_space
from overcommit.bench.popularity import ByUniform, Popularity
from overcommit.bench.tables import COLUMNS, ROW_BYTES, rows_of

LAYERS: Final = 8
LAYER_ROWS: Final = 131_072  # 8 MiB
HEAD_ROWS: Final = 4096  # 256 KiB
TRUNK_SEED: Final = 1_000_000  # of the first layer; heads have theirs from 0 on

CODE: Final = f"""\
import torch
from torch import nn


class Table(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(rows, {COLUMNS}))

    def forward(self, numbers):
        return self.rows[numbers.remainder(self.rows.shape[0])]


class Headed(nn.Module):
    def __init__(self, layers={LAYERS}, rows=ROWS):
        super().__init__()
        self.trunk = nn.ModuleList(Table(rows) for _ in range(layers))
        self.head = Table({HEAD_ROWS})

    def forward(self, x):
        numbers = x[:, 0].to(torch.int64)
        y = x
        for layer in self.trunk:
            y = y * layer(numbers)
        return {{"y": y * self.head(numbers)}}
"""


class HeadedPlan(msgspec.Struct, frozen=True, kw_only=True, tag="headed"):
    """One row of the trunk's layers and of each model's head, chosen by the input."""

    models: tuple[str, ...]
    seeds: tuple[int, ...]  # of the heads
    rows: int = LAYER_ROWS
    inputs: int = 64
    dialect: Dialect = V2()
    popularity: Popularity = ByUniform()


class HeadedWorkload(KnownWorkload):
    """See `HeadedPlan`."""

    def __init__(self, plan: HeadedPlan, seed: int, part: int = 0, parts: int = 1) -> None:
        random = np.random.default_rng(INPUT_SEED)
        chosen = random.integers(plan.rows, size=plan.inputs)
        inputs = random.standard_normal((plan.inputs, 1, COLUMNS), np.float32)
        inputs[:, 0, 0] = chosen
        through = inputs[:, 0, :]
        for layer in range(LAYERS):
            through = through * rows_of(TRUNK_SEED + layer, chosen)
        heads: dict[int, Array] = {}

        def expected(model: int, number: int) -> Array:
            if model not in heads:
                heads[model] = through * _head(plan.seeds[model])[chosen % HEAD_ROWS]
            return heads[model][number : number + 1]

        super().__init__(
            *(plan.models, list(inputs), expected, plan.dialect, plan.popularity),
            seed=seed,
            part=part,
            parts=parts,
        )


def _head(seed: int) -> Array:
    rows: NDArray[np.int64] = np.arange(HEAD_ROWS)
    return rows_of(seed, rows)


def make_headed(
    root: Path, count: int, *, rows: int = LAYER_ROWS, on_progress: Advance = lambda d, t: None
) -> dict[str, int]:
    """Make `count` models over one trunk in a root of their own; return each one's head's seed.

    Raises BenchError when the disk has no room.
    """
    seeds = {f"headed-{rows}-{number:03}": number for number in range(count)}
    check_space(root, 3 * LAYERS * rows * ROW_BYTES + 3 * count * HEAD_ROWS * ROW_BYTES)
    trunk = root.parent / f"trunk-{rows}.safetensors"
    if not trunk.exists():
        layers: NDArray[np.int64] = np.arange(rows)
        names = [f"trunk.{layer}.rows" for layer in range(LAYERS)]
        tensors = {name: rows_of(TRUNK_SEED + n, layers) for n, name in enumerate(names)}
        aside = trunk.with_name(f".{trunk.name}")
        save_file(tensors, aside)
        aside.rename(trunk)
    for done, (name, seed) in enumerate(seeds.items()):
        on_progress(done, count)
        if not (root / name).exists():
            _make(root / name, trunk, rows, seed)
    on_progress(count, count)
    return seeds


def _make(folder: Path, trunk: Path, rows: int, seed: int) -> None:
    aside = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    (aside / "model.py").write_text(CODE.replace("ROWS", str(rows)))
    (aside / "model.toml").write_text(
        f'entry = "model.py:Headed"\n{TABLE_TOML.format(batch=32, columns=COLUMNS)}'
    )
    os.link(trunk, aside / "a-trunk.safetensors")
    save_file({"head.rows": _head(seed)}, aside / "b-head.safetensors")
    aside.rename(folder)


def plan_of(seeds: dict[str, int], popularity: Popularity, names: Sequence[str] = ()) -> HeadedPlan:
    """Ask these models, or all of them."""
    chosen = tuple(names) or tuple(seeds)
    return HeadedPlan(
        models=chosen, seeds=tuple(seeds[name] for name in chosen), popularity=popularity
    )
