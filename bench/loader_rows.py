"""Other loaders beside ours, for a file of the same bytes.

Called by the scenario `activation`.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Final

from overcommit.bench import loaders
from overcommit.bench.peers.peer import CannotDo
from overcommit.bench.prepare import Options
from overcommit.bench.report import Figure, Report
from overcommit.runtime.config import MIB

STATES: Final[tuple[loaders.State, ...]] = ("cold", "warm")


def compare(
    options: Options,
    report: Report,
    size: int,
    weights: Path,
    repeats: int,
    ours: tuple[float, float, float],
) -> None:
    """Time other loaders.  `ours`: seconds warm and cold, and of a first touch for each byte."""
    section = f"{size // MIB} MiB, from the first byte to touched tensors"
    warm, cold, touch_s = ours
    for state, seconds in (("cold", cold), ("warm", warm)):
        note = f"{seconds * 1e3:,.0f} ms, and {touch_s * size * 1e3:,.0f} ms for the first touch"
        total = seconds + touch_s * size
        report.add(section, Figure(f"overcommit, {state}", size / total / 1e9, "GB/s", note=note))
    pickle = _pickle_of(options.work, weights)
    for name in (*loaders.BUILT_IN, *loaders.OTHERS):
        for state in STATES:
            report.step(f"{name}, {state}")
            file = pickle if name.startswith("torch") else weights
            try:
                times = loaders.measure(name, file, state, repeats, options.work, report.step)
            except CannotDo as error:
                report.notes.append(error.message)
                reason = f"does not run here: {error.message.splitlines()[0][:160]}"
                report.add(section, Figure(name, 0, "loads", note=reason))
                break
            best = statistics.median(times)
            figure = Figure(
                f"{name}, {state}", size / best / 1e9, "GB/s", note=f"{best * 1e3:,.0f} ms"
            )
            report.add(section, figure)


def _pickle_of(work: Path, file: Path) -> Path:
    """Return the same tensor as torch.save writes it, made when it is first asked for."""
    path = work / "activation-pickles" / f"{file.parent.name}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        code = (
            "import sys, torch; from safetensors.torch import load_file; "
            "torch.save(load_file(sys.argv[1]), sys.argv[2])"
        )
        loaders.run_python(code, str(file), str(path.with_suffix(".making")))
        path.with_suffix(".making").rename(path)
    return path
