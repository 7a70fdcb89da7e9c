"""Models that say what a client got right: echoes, sums, slow and faulty ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.torch import save_file

ECHO = """
import torch
class Echo(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x):
        return {"y": x}
"""
ADD = """
import torch
class Add(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(1))
    def forward(self, a, b):
        return {"sum": a + b, "difference": a - b}
"""
# `seconds` of the first row: a request that says how long it takes.
SLOW = """
import time
import torch
class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(1))
    def forward(self, seconds):
        time.sleep(float(seconds.max()))
        return {"y": seconds}
"""
FAULTY = """
import torch
class Faulty(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x):
        if (x > 100).any():
            raise ValueError("too hot")
        return {"y": x * 2}
"""
DATATYPES = ["FP16", "FP32", "FP64", "BF16", "BOOL"]
DATATYPES += [f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)]
NUMPY: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BOOL": np.bool_,
    "BYTES": np.object_,
}
NUMPY |= {f"{s}INT{b}": np.dtype(f"{s.lower()}int{b}") for s in ("", "U") for b in (8, 16, 32, 64)}
Array = np.ndarray[Any, Any]


def add_model(
    root: Path, name: str, code: str, inputs: dict[str, str], batch: int = 8, columns: int = -1
) -> None:
    """Write a model folder; `inputs`: name -> datatype, each [-1, columns]."""
    import torch

    folder = root / name
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(code)
    save_file({"zero": torch.zeros(1)}, folder / "model.safetensors")
    tensors = "".join(
        f'[[input]]\nname = "{each}"\ndatatype = "{datatype}"\nshape = [-1, {columns}]\n'
        for each, datatype in inputs.items()
    )
    (folder / "model.toml").write_text(
        f"allow_code = true\n{tensors}[batching]\nmax_batch_size = {batch}\n"
    )


def sample(datatype: str) -> Array:
    if datatype == "BYTES":
        return np.array(
            [[b"a", b"", b"\xff\x00raw"], ["\u00e9\u4e2d".encode(), b"b" * 300, b"c"]], np.object_
        )
    kind = np.dtype(NUMPY[datatype])
    if datatype == "BOOL":
        return np.array([[True, False, True], [False, False, True]])
    return np.array([[0, 1, 2], [3, 100, 7]]).astype(kind)


def add_extended_models(root: Path) -> None:
    """Write the models that the tests of extensions and the differential test ask."""
    for datatype in ("FP32", "INT64", "FP16", "BOOL", "BYTES"):
        add_model(root, f"echo-{datatype.lower()}", ECHO, {"x": datatype})
    add_model(root, "add", ADD, {"a": "INT32", "b": "INT32"})
    add_model(root, "faulty", FAULTY, {"x": "FP32"})
    add_model(root, "labelled", ECHO, {"x": "FP32"})
    with (root / "labelled" / "model.toml").open("a") as file:
        file.write(
            '[[output]]\nname = "y"\ndatatype = "FP32"\nshape = [-1, -1]\nlabels = "labels.txt"\n'
        )
    (root / "labelled" / "labels.txt").write_text("cat\ndog\nbird\n")
