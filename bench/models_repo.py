"""Model repositories made on the spot: echoes, and tables that are mostly weights.

    ROOT/NAME/model.toml          allow_code = true, the inputs, the batching
    ROOT/NAME/model.py            an nn.Module; the server needs --allow-code
    ROOT/NAME/model.safetensors   `scale`, or `table`

What each model answers is defined in `echo` and `tables`; an `EchoPlan` or a `TablePlan` with what
`make_echoes` or `make_tables` returns checks it.  Nothing is ever removed that is not replaced: give
each repository a root of its own.

Invariants
 1. A model's folder is complete or absent: it is made aside and renamed into place.
 2. A folder that is there is what these arguments would make: its facts are in its name or checked.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from safetensors.numpy import save_file

from overcommit.bench.dialect import Array
from overcommit.bench.echo import scale_of
from overcommit.bench.errors import BenchError
from overcommit.bench.tables import COLUMNS, ROW_BYTES, ROWS, rows_of

ALLOW_CODE: Final = "--allow-code"  # the server's flag
Advance = Callable[[int, int], None]
_ROWS_AT_ONCE: Final = 1 << 17

ECHO_CODE: Final = """\
import torch
from torch import nn


class Echo(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"y": x * self.scale}
"""

TABLE_CODE: Final = """\
import torch
from torch import nn


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(ROWS, COLUMNS))

    def forward(self, x):
        row = x[:, 0].to(torch.int64).remainder(ROWS)
        return {"y": x * self.table[row]}
"""

TABLE_TOML: Final = """\
engine = "torch"
allow_code = true
[batching]
max_batch_size = {batch}
[[input]]
name = "x"
datatype = "FP32"
shape = [-1, {columns}]
[[output]]
name = "y"
datatype = "FP32"
shape = [-1, {columns}]
"""


def _nothing(done: int, total: int) -> None:
    pass


def _make(folder: Path, code: str, toml: str, tensors: Mapping[str, Array]) -> None:
    """Make a model's folder; does nothing when it is there."""
    if folder.exists():
        if (folder / "model.py").read_text() == code and (
            folder / "model.toml"
        ).read_text() == toml:
            return
        shutil.rmtree(folder)  # of a former version of this program
    aside = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    (aside / "model.py").write_text(code)
    (aside / "model.toml").write_text(toml)
    save_file(dict(tensors), aside / "model.safetensors")
    aside.rename(folder)


def make_echo(
    root: Path, name: str, scale: float = 1.0, *, columns: int = 16, batch: int = 32
) -> Path:
    """Make one echo: `y = x * scale`, FP32 `[b, columns]`; columns -1 takes any length."""
    toml = TABLE_TOML.format(columns=columns, batch=batch)
    _make(root / name, ECHO_CODE, toml, {"scale": np.array([scale], np.float32)})
    return root / name


def make_echoes(
    root: Path, count: int, *, columns: int = 16, batch: int = 32, on_progress: Advance = _nothing
) -> dict[str, float]:
    """Make echoes with distinct scales; return each one's scale, for `EchoPlan`."""
    scales = {f"echo-{number:04}": scale_of(number) for number in range(count)}
    for done, (name, scale) in enumerate(scales.items()):
        on_progress(done, count)
        make_echo(root, name, scale, columns=columns, batch=batch)
    on_progress(count, count)
    return scales


def make_tables(
    root: Path, count: int, *, rows: int = ROWS, batch: int = 32, on_progress: Advance = _nothing
) -> dict[str, int]:
    """Make tables of `rows * 64` bytes, 8 MiB unless told; return each one's seed, for `TablePlan`.

    Raises BenchError when the disk has no room for them and their images.
    """
    seeds = {f"table-{rows}-{number:04}": number for number in range(count)}
    missing = [name for name in seeds if not (root / name).exists()]
    check_space(root, 2 * len(missing) * rows * ROW_BYTES)
    code = TABLE_CODE.replace("ROWS", str(rows)).replace("COLUMNS", str(COLUMNS))
    toml = TABLE_TOML.format(columns=COLUMNS, batch=batch)
    for done, (name, seed) in enumerate(seeds.items()):
        on_progress(done, count)
        if not (root / name).exists():
            _make(root / name, code, toml, {"table": rows_of(seed, np.arange(rows))})
    on_progress(count, count)
    return seeds


def make_long_table(root: Path, name: str, seed: int, nbytes: int, *, batch: int = 32) -> Path:
    """Make one table of so many bytes, too long to have in memory at once; return its weights' file.

    Raises BenchError when the disk has no room for it and its image.
    """
    rows = nbytes // ROW_BYTES
    folder = root / name
    if not folder.exists():
        check_space(root, 2 * nbytes)
        code = TABLE_CODE.replace("ROWS", str(rows)).replace("COLUMNS", str(COLUMNS))
        toml = TABLE_TOML.format(columns=COLUMNS, batch=batch)
        aside = folder.with_name(f".{name}.making")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        (aside / "model.py").write_text(code)
        (aside / "model.toml").write_text(toml)
        about = {"dtype": "F32", "shape": [rows, COLUMNS], "data_offsets": [0, rows * ROW_BYTES]}
        header = msgspec.json.encode({"table": about})
        header += b" " * (-len(header) % 8)
        with (aside / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for start in range(0, rows, _ROWS_AT_ONCE):
                numbers = np.arange(start, min(start + _ROWS_AT_ONCE, rows))
                file.write(rows_of(seed, numbers).tobytes())
        aside.rename(folder)
    return folder / "model.safetensors"


def check_space(root: Path, needed: int) -> None:
    """Raise BenchError when the disk under `root` has less than that free."""
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise BenchError(
            f"{root} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed for the models "
            f"and their images: free some, or name another folder with --work"
        )
