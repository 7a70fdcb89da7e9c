"""Compute references with torch and transformers alone: nothing of ours touches the numbers.

Run as `python -m overcommit.bench.reference_job INPUTS.npz FOLDER=OUT.npz ...`; prints a line for
each folder that is done.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np


def reference(folder: Path, inputs: list[dict[str, Any]]) -> list[Any]:
    """Return `last_hidden_state` for each input, as float32 arrays."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    outputs = []
    with torch.inference_mode():
        for tensors in inputs:
            arguments = {name: torch.from_numpy(array) for name, array in tensors.items()}
            outputs.append(model(**arguments).last_hidden_state.numpy())
    return outputs


def main(arguments: list[str]) -> None:
    """Compute and write every file that is asked for."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with np.load(arguments[0]) as file:
        count = 1 + max(int(key.partition(".")[0]) for key in file.files)
        inputs: list[dict[str, Any]] = [{} for _ in range(count)]
        for key in file.files:
            number, _, name = key.partition(".")
            inputs[int(number)][name] = file[key]
    for pair in arguments[1:]:
        folder, _, out = pair.partition("=")
        outputs = reference(Path(folder), inputs)
        aside = Path(out).with_suffix(".part")
        with aside.open("wb") as target:
            np.savez(target, **{str(number): output for number, output in enumerate(outputs)})
        aside.rename(out)
        print(out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
