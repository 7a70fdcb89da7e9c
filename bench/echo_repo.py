"""Our repositories of echo models: y = x * scale, and y = x * the first row of a table.

A table is the weights of a model whose computation is nothing: what is measured is how models come
and go.  The same numbers are written as `NAME.npy` for peers.  A folder is complete or absent: it is
made aside and renamed into place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import save_file

ECHO: Final = """\
import torch


class Echo(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return {{"y": x * self.scale}}
"""
TABLE: Final = """\
import torch


class Table(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros({rows}, {width}))

    def forward(self, x):
        return {{"y": x * self.table[0]}}
"""
CONFIG: Final = """\
allow_code = true
[batching]
max_batch_size = {batch_max}
[[input]]
name = "x"
datatype = "FP32"
shape = [-1, {width}]
"""


def echo_repository(work: Path, scale: float, width: int, batch_max: int) -> Path:
    """Return a repository of one model, `echo`."""
    root = work / f"echo-{scale:g}-{width}-{batch_max}"
    if not (root / "echo").exists():
        tensors = {"scale": np.array([scale], np.float32)}
        _write(root / "echo", ECHO.format(), tensors, width, batch_max)
    return root


def table_repository(
    work: Path,
    scales: Mapping[str, float],
    nbytes: int,
    width: int,
    batch_max: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Path, Path]:
    """Return a repository of models of `nbytes` each, and a folder with their tables as .npy."""
    rows = nbytes // (4 * width)
    root = work / f"tables-{len(scales)}-{nbytes}"
    arrays = work / f"arrays-{len(scales)}-{nbytes}"
    arrays.mkdir(parents=True, exist_ok=True)
    code = TABLE.format(rows=rows, width=width)
    for number, (name, scale) in enumerate(scales.items()):
        file = arrays / f"{name}.npy"
        if not (root / name).exists() or not file.exists():
            table = np.random.default_rng(number).random((rows, width), np.float32)
            table[0] = scale
            shutil.rmtree(root / name, ignore_errors=True)
            _write(root / name, code, {"table": table}, width, batch_max)
            aside = arrays / ".making.npy"
            np.save(aside, table)
            aside.rename(file)
        on_progress(number + 1, len(scales))
    return root, arrays


def _write(
    folder: Path, code: str, tensors: dict[str, np.ndarray], width: int, batch_max: int
) -> None:
    aside = folder.parent / f".{folder.name}.making"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(tensors, aside / "model.safetensors")
    (aside / "model.py").write_text(code)
    (aside / "model.toml").write_text(CONFIG.format(width=width, batch_max=batch_max))
    aside.rename(folder)
