"""What the fork server imports before it forks, and the check that forking is still safe.

Invariants
 1. Thread pools are switched off before torch is imported: a fork copies one thread, and a pool
    that lost its threads hangs.
 2. No torch operation and no CUDA question here: a child may then initialise CUDA itself.
 3. `gc.freeze` at the end: the collector would otherwise write to every object header and unshare
    the pages (105 MiB a child instead of 17, measured).

Called by the fork server; `modules_of` by the supervisor.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Final

log = logging.getLogger("overcommit.preload")

PRELOAD_THREAD_ENV: Final = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Threads that wait for the next parallel region would spin for milliseconds on a core that a
    # front end needs: 71 % of a worker's time with 16 MiB requests, measured.
    "GOMP_SPINCOUNT": "1000",
    # Device counts by NVML: the CUDA call would poison every child.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
}


def preload(modules: Sequence[str]) -> None:
    """Import torch and these modules.  A module that is missing is logged and left out."""
    os.environ.update(PRELOAD_THREAD_ENV)
    gc.disable()
    for name in ("torch", *modules):
        try:
            importlib.import_module(name)
        except ImportError as error:
            log.warning("cannot preload %s: %s", name, error)
    gc.enable()
    gc.collect()
    gc.freeze()


def modules_of(program: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the installed modules that an image's program imports."""
    kind = program.get("kind")
    names: tuple[str, ...] = ()
    if kind == "hugging_face":
        names = (program.get("module", ""),)
    elif kind == "export":
        names = tuple(program.get("modules", "").split(","))
    # Whatever an image says: nothing but transformers is imported on its word.
    return tuple(name for name in names if name.startswith("transformers."))


def self_check() -> str | None:
    """Say why forking from here would not be safe; None when it is."""
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        return f"{len(threads)} OS threads run after the imports"
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return "CUDA was initialised by an import"
    return None
