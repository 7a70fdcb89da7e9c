"""CUDA sources compiled for the CPU: the same text, each thread of a block a coroutine."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest

HEADER = Path(__file__).with_name("cuda_on_host.h")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
Kernel = Callable[..., None]


@cache
def _folder() -> Path:
    return Path(mkdtemp(prefix="cuda-on-host-"))


@cache
def on_host(source: str, name: str) -> Kernel:
    """Return `run(grid, threads, *arguments)`; arrays are handed over by address, numbers as they are."""
    found = re.search(rf"KERNEL {name}\(([^)]*)\)", source)
    assert found is not None
    types = [re.sub(r"\w+$", "", " ".join(p.split())).strip() for p in found[1].split(",")]
    casts = ", ".join(f"({kind})arguments[{at}]" for at, kind in enumerate(types))
    text = f'#include "{HEADER}"\n{source}\nstatic void call_kernel(void) {{ {name}({casts}); }}\n'
    stem = _folder() / sha256(text.encode()).hexdigest()[:16]
    stem.with_suffix(".c").write_text(text)
    library = stem.with_suffix(".so")
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wno-unused-function", "-Werror"]
    subprocess.run([*command, "-o", str(library), str(stem.with_suffix(".c"))], check=True)
    launch = ctypes.CDLL(str(library)).launch

    def run(
        grid: tuple[int, int], threads: int, *arguments: Any, is_backwards: bool = False
    ) -> None:
        assert len(arguments) == len(types)
        numbers = [a.ctypes.data if isinstance(a, np.ndarray) else int(a) for a in arguments]
        given = (ctypes.c_ulonglong * len(numbers))(*numbers)
        launch(*grid, threads, int(is_backwards), given, len(numbers))

    return run


def aligned(nbytes: int, to: int = 64) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return uninitialised bytes at a multiple of `to`, as device memory has them."""
    whole = np.empty(nbytes + to, np.uint8)
    start = -whole.ctypes.data % to
    return whole[start : start + nbytes]


def aligned_copy(data: Any, to: int = 64) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a copy of a buffer's bytes at a multiple of `to`."""
    raw = np.frombuffer(data, np.uint8)
    copy = aligned(raw.nbytes, to)
    copy[:] = raw
    return copy
