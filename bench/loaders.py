"""How long other loaders take for the same bytes: from a file to tensors in memory, touched.

`torch.load` and `safetensors` are those of this environment.  `fastsafetensors` and
`runai-model-streamer` get a folder of their own, made when they are first asked for, and use this
environment's torch, so that all are measured with the same one.  Each runs in a process of its own.

Called by the scenario `activation`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from overcommit.bench.errors import BenchError
from overcommit.bench.peers import environments
from overcommit.bench.peers.peer import CannotDo, Requirements

APP: Final = Path(__file__).parent / "peers" / "apps" / "loader_app.py"
BUILT_IN: Final = ("torch.load", "torch.load, mmap", "safetensors")
OTHERS: Final = ("fastsafetensors", "runai-model-streamer")
NAME: Final = "loaders"
REQUIREMENTS: Final = Requirements(
    "1",
    (
        ("--no-deps", "fastsafetensors==0.5.0"),
        ("--no-deps", "runai-model-streamer==0.17.0", "humanize==4.17.0"),
    ),
)
LIMIT_S: Final = 300.0
State = Literal["cold", "warm"]


def measure(
    name: str,
    file: Path,
    state: State,
    repeats: int,
    work: Path,
    say: Callable[[str], None] = lambda text: None,
) -> list[float]:
    """Return the seconds of each repetition.  Raises CannotDo with what the loader said."""
    python, packages = Path(sys.executable), [sysconfig.get_paths()["purelib"]]
    if name in OTHERS:
        environment = environments.ensure(work, NAME, REQUIREMENTS, say)
        python, packages = environment.python, [str(environment.packages), *packages]
    command = [str(python), "-P", str(APP), name, str(file), state, str(repeats)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(packages)}
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{name} takes longer than {LIMIT_S:.0f} s for {file}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise CannotDo(f"{name} cannot load {file.name}: {last[:200]}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=list[float])


def run_python(code: str, *arguments: str) -> None:
    """Run code in a process of its own, so that torch is not in this one.

    Raises BenchError when it fails.
    """
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise BenchError(f"a file to compare with cannot be made: {done.stderr[-300:]}")
