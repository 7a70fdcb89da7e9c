"""What each variant must answer: computed by `transformers` directly, kept on disk.

A variant's outputs for the fixed inputs are cached in one file, keyed by the weights and by the
inputs.  The computation runs in a process of its own (`reference_job`), so that neither torch nor
its threads are in the process that measures.

Invariants
 1. References that are handed out differ from each other, for every input, by at least
    `DISTANCE_MIN`: otherwise a wrong variant could pass for the right one, and nothing is measured.
 2. A cached file is complete or absent (written aside, then renamed).

Called by the scenarios; `References.load` by the load generator.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from overcommit.bench.errors import BenchError

OUTPUT: Final = "last_hidden_state"
TOLERANCE: Final = 1e-4
DISTANCE_MIN: Final = 100 * TOLERANCE
LENGTHS: Final = (16, 16, 16, 11, 16, 7)  # of the inputs, unless a scenario has its own
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096
_KEY_BYTES: Final = 12

Inputs = dict[str, NDArray[np.int64]]


def fixed_inputs(vocabulary: int, lengths: Sequence[int] = LENGTHS) -> list[Inputs]:
    """Make the token inputs: seeded, of several lengths; one ends in padding."""
    random = np.random.default_rng(20_240)
    inputs: list[Inputs] = []
    for number, length in enumerate(lengths):
        ids = random.integers(1, vocabulary, size=(1, length), dtype=np.int64)
        mask = np.ones_like(ids)
        if number == 2:
            ids[0, -5:] = 0
            mask[0, -5:] = 0
        inputs.append({"input_ids": ids, "attention_mask": mask})
    return inputs


def weights_key(folder: Path, inputs: Sequence[Inputs]) -> str:
    """Return a key for a model folder's weights and config, from sizes, times and samples."""
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix not in (".safetensors", ".json"):
            continue
        facts = path.stat()
        digest.update(f"{path.name} {facts.st_size} {facts.st_mtime_ns}".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(facts.st_size * sample // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    for tensors in inputs:
        for name, array in tensors.items():
            digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


@dataclass(slots=True, frozen=True)
class References:
    """`outputs[i][v]` is what variant `names[v]` must answer to `inputs[i]`."""

    names: tuple[str, ...]
    inputs: list[Inputs]
    outputs: list[NDArray[np.float32]]

    def save(self, path: Path) -> None:
        """Write everything to one file, for the load generator."""
        arrays: dict[str, NDArray[Any]] = {"names": np.array(self.names)}
        for number, (tensors, outputs) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            arrays |= {f"input.{number}.{name}": array for name, array in tensors.items()}
            arrays[f"output.{number}"] = outputs
        _write_npz(path, arrays)

    @classmethod
    def load(cls, path: Path) -> References:
        """Undo `save`."""
        with np.load(path) as file:
            count = sum(1 for key in file.files if key.startswith("output."))
            inputs: list[Inputs] = [{} for _ in range(count)]
            for key in file.files:
                kind, _, rest = key.partition(".")
                if kind == "input":
                    number, _, name = rest.partition(".")
                    inputs[int(number)][name] = file[key]
            outputs = [file[f"output.{number}"] for number in range(count)]
            return cls(tuple(str(name) for name in file["names"]), inputs, outputs)

    def distance(self) -> tuple[float, str]:
        """Return the smallest largest-difference of two variants over all inputs, and which."""
        smallest, who = float("inf"), ""
        for number, outputs in enumerate(self.outputs):
            flat = outputs.reshape(len(self.names), -1)
            for first in range(len(self.names) - 1):
                away = np.abs(flat[first + 1 :] - flat[first]).max(axis=1)
                second = int(away.argmin())
                if away[second] < smallest:
                    smallest = float(away[second])
                    pair = f"{self.names[first]} and {self.names[first + 1 + second]}"
                    who = f"{pair} for input {number}"
        return smallest, who

    def check_distinct(self) -> float:
        """Return the smallest distance of two variants.

        Raises BenchError when a wrong variant could pass for the right one.
        """
        for outputs in self.outputs:
            for name, output in zip(self.names, outputs, strict=True):
                if not np.isfinite(output).all():
                    raise BenchError(f"{name} answers something that is not a number")
        smallest, who = self.distance()
        if not smallest >= DISTANCE_MIN:
            raise BenchError(
                f"{who} differ by {smallest:.2g} only; at least {DISTANCE_MIN:.2g} is needed to "
                f"tell a wrong variant from a right one: make them anew with distinct weights"
            )
        return smallest

    def subset(self, names: Sequence[str]) -> References:
        """Return the references of some variants only."""
        chosen = [self.names.index(name) for name in names]
        return References(tuple(names), self.inputs, [outputs[chosen] for outputs in self.outputs])


def _write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    with aside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    aside.rename(path)


def compute(
    folders: Mapping[str, Path],
    inputs: list[Inputs],
    cache: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> References:
    """Return the references of these model folders, computing what the cache lacks."""
    paths = {name: cache / f"{weights_key(folder, inputs)}.npz" for name, folder in folders.items()}
    missing = [name for name, path in paths.items() if not path.exists()]
    on_progress(len(folders) - len(missing), len(folders))
    if missing:
        job = cache / ".inputs.npz"
        arrays = {f"{i}.{name}": array for i, t in enumerate(inputs) for name, array in t.items()}
        _write_npz(job, arrays)
        pairs = [f"{folders[name]}={paths[name]}" for name in missing]
        _run_job([str(job), *pairs], len(folders) - len(missing), len(folders), on_progress)
        job.unlink()
    per_variant = []
    for path in paths.values():
        with np.load(path) as file:
            per_variant.append([file[str(number)] for number in range(len(inputs))])
    outputs = [np.stack([one[number] for one in per_variant]) for number in range(len(inputs))]
    return References(tuple(folders), inputs, outputs)


def _run_job(
    arguments: list[str], done: int, total: int, on_progress: Callable[[int, int], None]
) -> None:
    # torch makes a folder in TMPDIR as soon as it is imported far enough.
    with tempfile.TemporaryDirectory() as temporary, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "overcommit.bench.reference_job", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"TMPDIR": temporary},
        )
        with process:
            try:
                assert process.stdout is not None
                for _ in process.stdout:
                    done += 1
                    on_progress(done, total)
                process.wait()
            finally:
                process.kill()  # when we are interrupted; it has ended otherwise
        if process.returncode:
            errors.seek(0)
            text = errors.read().decode(errors="replace")[-4000:]
            raise BenchError(f"the references could not be computed:\n{text}")
