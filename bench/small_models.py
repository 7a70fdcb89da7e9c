"""Thousands of small models of a few architectures, each with weights of its own.

    ROOT/small-NNNNN/model.toml           allow_code = true, the inputs, the batching, [parameters]
    ROOT/small-NNNNN/model.py             one source for the perceptrons, one for the tables
    ROOT/small-NNNNN/model.safetensors    4 KB to 1 MB

Which architecture a model has, and every weight, follow from its number; so the client needs no file
to know an answer.  Weights and inputs are whole numbers, and every sum on the way stays below 2^24:
in FP32 such sums are exact in any order, so an answer is right to the bit or wrong, alone and in a
batch.

Invariants
 1. A root that is there under its name is complete: it is made aside and renamed into place.
 2. Any two models differ in nearly every answer.

Called by the scenario `fleet` and, through its plan, by the load generator.
"""

from __future__ import annotations

import itertools
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from overcommit.bench.dialect import V2, Array, Dialect
from overcommit.bench.errors import BenchError
from overcommit.bench.known import KnownWorkload
from overcommit.bench.popularity import ByZipf, Popularity

COLUMNS: Final = 16
INPUT_SEED: Final = 977
INPUT_MAX: Final = 8
BIAS_MAX: Final = 4
Advance = Callable[[int, int], None]

PERCEPTRON_CODE: Final = """\
import torch
from torch import nn


class Perceptron(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        sizes = [16] + [width] * layers + [16]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return {"y": self.layers[-1](x)}
"""

TABLE_CODE: Final = """\
import torch
from torch import nn


class Table(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.table = nn.Embedding(rows, 16)

    def forward(self, x):
        row = x[:, 0].to(torch.int64).remainder(self.table.num_embeddings)
        return {"y": x + self.table(row)}
"""

_TOML: Final = """\
# {name}
engine = "torch"
allow_code = true
[batching]
max_batch_size = 32
[parameters]
{parameters}
[[input]]
name = "x"
datatype = "FP32"
shape = [-1, 16]
[[output]]
name = "y"
datatype = "FP32"
shape = [-1, 16]
"""


@dataclass(slots=True, frozen=True)
class Architecture:
    """A program: a perceptron of hidden layers, or a table of rows."""

    width: int = 0
    layers: int = 0
    rows: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor, in the order in which its values are drawn."""
        if self.rows:
            return {"table.weight": (self.rows, COLUMNS)}
        sizes = [COLUMNS, *[self.width] * self.layers, COLUMNS]
        shapes: dict[str, tuple[int, ...]] = {}
        for number, (less, more) in enumerate(itertools.pairwise(sizes)):
            shapes[f"layers.{number}.weight"] = (more, less)
            shapes[f"layers.{number}.bias"] = (more,)
        return shapes

    @property
    def parameters(self) -> str:
        """The lines of `[parameters]`."""
        if self.rows:
            return f"rows = {self.rows}"
        return f"width = {self.width}\nlayers = {self.layers}"

    @property
    def nbytes(self) -> int:
        """Of its weights."""
        return sum(4 * int(np.prod(shape)) for shape in self.shapes.values())


# With how many of each 20 models have it: most are small.
SHARES: Final = (
    (Architecture(width=24, layers=1), 4),
    (Architecture(rows=64), 3),
    (Architecture(width=64, layers=1), 4),
    (Architecture(width=64, layers=2), 3),
    (Architecture(rows=1024), 2),
    (Architecture(width=128, layers=2), 2),
    (Architecture(width=224, layers=2), 1),
    (Architecture(rows=16_000), 1),
)
_BY_NUMBER: Final = tuple(kind for kind, share in SHARES for _ in range(share))
# Ternary weights: 16 inputs of at most 8, two layers of at most 224, three biases.
assert (16 * INPUT_MAX * 224 + 225 * BIAS_MAX) * 224 < 1 << 24


def architecture_of(number: int) -> Architecture:
    """Return the architecture of the model with this number."""
    return _BY_NUMBER[number * 7 % len(_BY_NUMBER)]


def name_of(number: int) -> str:
    """Return a model's name."""
    return f"small-{number:05}"


def weights_of(number: int) -> dict[str, Array]:
    """Return every tensor of a model."""
    kind = architecture_of(number)
    random = np.random.Generator(np.random.SFC64(number + 1))
    weights: dict[str, Array] = {}
    for name, shape in kind.shapes.items():
        largest = 1 if name.startswith("layers") and len(shape) == 2 else BIAS_MAX
        if kind.rows:
            largest = 32_000
        drawn = random.integers(-largest, largest + 1, shape, np.int16)
        weights[name] = drawn.astype(np.float32)
    return weights


def answer(number: int, weights: dict[str, Array], x: Array) -> Array:
    """Return what the model with this number gives for `x`, FP32 `[b, 16]`."""
    kind = architecture_of(number)
    if kind.rows:
        found: Array = x + weights["table.weight"][x[:, 0].astype(np.int64) % kind.rows]
        return found
    for layer in range(kind.layers + 1):
        x = x @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
        if layer < kind.layers:
            x = np.maximum(x, np.float32(0))
    return x + np.float32(0)  # a zero is positive


# --- on disk --------------------------------------------------------------------------------------
def make_models(root: Path, count: int, on_progress: Advance) -> list[str]:
    """Make the models 0 to `count` - 1 unless `root` is there; return their names.

    Raises BenchError when the disk has no room for them and their images.
    """
    names = [name_of(number) for number in range(count)]
    if root.exists():
        return names
    needed = 2 * sum(architecture_of(number).nbytes + 12_288 for number in range(count))
    root.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(root.parent).free) < needed:
        raise BenchError(
            f"{root.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed for the "
            f"models and their images: free some, or name another folder with --work"
        )
    aside = root.with_name(f".{root.name}.making")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for number, name in enumerate(names):
        if number % 100 == 0:
            on_progress(number, count)
        _make(aside / name, number, name)
    aside.rename(root)
    on_progress(count, count)
    return names


def _make(folder: Path, number: int, name: str) -> None:
    kind = architecture_of(number)
    folder.mkdir()
    (folder / "model.py").write_text(TABLE_CODE if kind.rows else PERCEPTRON_CODE)
    (folder / "model.toml").write_text(_TOML.format(name=name, parameters=kind.parameters))
    table: dict[str, object] = {}
    end = 0
    weights = weights_of(number)
    for tensor, values in weights.items():
        start, end = end, end + values.nbytes
        table[tensor] = {"dtype": "F32", "shape": values.shape, "data_offsets": (start, end)}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    # As the safetensors package would write it, at a tenth of its time for files this small.
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.writelines(values.data for values in weights.values())


# --- asking ---------------------------------------------------------------------------------------
class SmallModelsPlan(msgspec.Struct, frozen=True, kw_only=True, tag="small_models"):
    """Requests to these models, by number."""

    numbers: tuple[int, ...]
    inputs: int = 4
    dialect: Dialect = V2()
    popularity: Popularity = ByZipf(exponent=0.9)


class SmallModelsWorkload(KnownWorkload):
    """See `SmallModelsPlan`."""

    def __init__(self, plan: SmallModelsPlan, seed: int, part: int = 0, parts: int = 1) -> None:
        if not plan.numbers:
            raise BenchError("a load of small models needs at least one")
        random = np.random.default_rng(INPUT_SEED)
        shape = (plan.inputs, COLUMNS)
        inputs = random.integers(-INPUT_MAX, INPUT_MAX + 1, shape).astype(np.float32)
        answers: dict[int, Array] = {}

        def expected(model: int, which: int) -> Array:
            known = answers.get(model)
            if known is None:
                number = plan.numbers[model]
                known = answers[model] = answer(number, weights_of(number), inputs)
            return known[which : which + 1]

        super().__init__(
            [name_of(number) for number in plan.numbers],
            [inputs[which : which + 1] for which in range(plan.inputs)],
            expected,
            plan.dialect,
            plan.popularity,
            seed=seed,
            part=part,
            parts=parts,
        )
