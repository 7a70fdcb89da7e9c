"""The `python` engine: a class of the model's own (see `python_child` for what it looks like).

It runs in the worker, or, with `[python] process = true` or a `venv`, in a process of its own.  In the
worker its weights may come from the mapping: `*.safetensors` beside it go into the image, and `bind` gets
read-only arrays over them.  What it keeps otherwise is in no budget; `README.md` says so.

Invariants
 1. Nothing of it runs before operator and model have both allowed it.
 2. `load` runs in the thread that loads programs, where it delays no other model; once for each version,
    and again for one that begins anew while the former finishes what it was asked.
 3. What was loaded is one version's at a time: it holds views of that version's mapping.

Called by the packer and by workers.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from overcommit.runtime.device_bytes import Memory
from overcommit.runtime.engines import user_code
from overcommit.runtime.engines.dtypes import v2_of_numpy
from overcommit.runtime.engines.python_child import Hosted
from overcommit.runtime.engines.python_process import PythonProcess, python_of
from overcommit.runtime.errors import ImageError, ModelError
from overcommit.runtime.image import ImageHeader, TensorEntry

Array = np.ndarray[Any, Any]
_loads = itertools.count(1)


def start(program: dict[str, str]) -> Hosted | PythonProcess:
    """Load the model that a program describes.  Raises ImageError, ModelError."""
    path = Path(program["file"])
    try:
        source = user_code.read_source(path)
    except OSError as error:
        raise ImageError(f"the model's code {path} cannot be read: {error}") from error
    if user_code.digest_of(source) != program["source"]:
        raise ImageError(f"{path} has changed since the model was packed; delete it to pack again")
    parameters = json.loads(program["arguments"])
    triton = json.loads(program.get("triton") or "null")
    if program["process"]:
        python = python_of(program["venv"] or None, program["folder"])
        load = {"file": str(path), "class": program["class"], "folder": program["folder"]}
        load |= {"triton": triton}
        return PythonProcess(python, {**load, "parameters": parameters})
    try:
        return Hosted(source, str(path), program["class"], program["folder"], parameters, triton)
    except BaseException as error:  # whatever its own code raises, sys.exit() too
        raise ModelError.of(error) from error


def run(model: Hosted | PythonProcess, inputs: dict[str, Array]) -> dict[str, Array]:
    """Run one batch.  Raises ModelError."""
    try:
        return model.run(inputs)
    except ModelError:
        raise
    except BaseException as error:  # the batch boundary: it may end its batch, not the process
        raise ModelError.of(error) from error


class PythonProgram:
    """One version's class, loaded."""

    def __init__(self, header: ImageHeader) -> None:
        self.key = header.program_key
        self.hosted = start(header.program)
        self.load = next(_loads)
        self._lent: weakref.ref[PythonProgram] | None = None

    def lend(self) -> PythonProgram | None:
        """Return it for a version, and until nobody refers to that any more; None: another has it."""
        if self._lent is not None and self._lent() is not None:
            return None
        lent = copy.copy(self)
        self._lent = weakref.ref(lent)
        return lent

    def bind(self, header: ImageHeader, memory: Memory) -> PythonModel:
        """Give it its weights.  Raises ImageError, ModelError."""
        if header.tensors and isinstance(self.hosted, Hosted):
            if not isinstance(memory, memoryview):
                raise ImageError("the python engine takes weights from the CPU's memory alone")
            try:
                self.hosted.bind({entry.name: _view(entry, memory) for entry in header.tensors})
            except BaseException as error:  # its own code
                raise ModelError.of(error) from error
        names = [spec.name for spec in header.config.outputs]
        return PythonModel(self, names)

    def mixed(self, header: ImageHeader) -> None:
        """What it does with a batch is its own business."""
        return


class PythonModel:
    """One version, ready to run."""

    def __init__(self, program: PythonProgram, names: list[str]) -> None:
        self._program = program  # lent as long as this lives
        self._hosted = program.hosted
        self._names = names

    @property
    def incarnation(self) -> tuple[int, int]:
        """What the model keeps itself is gone when this has changed."""
        hosted = self._hosted
        return self._program.load, hosted.starts if isinstance(hosted, PythonProcess) else 0

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run one batch.  Raises ModelError."""
        outputs = run(self._hosted, inputs)
        if missing := [name for name in self._names if name not in outputs]:
            raise ModelError(f"the model gave no output {missing}")
        return {name: outputs[name] for name in self._names}


def run_typed(
    model: Hosted | PythonProcess, inputs: dict[str, Array]
) -> tuple[dict[str, Array], dict[str, str]]:
    """Run one batch; also return the V2 datatype of every output.  Raises ModelError."""
    outputs = run(model, inputs)
    return outputs, {name: v2_of_numpy(array) for name, array in outputs.items()}


def _view(entry: TensorEntry, memory: memoryview) -> Array:
    """Make a read-only array over the mapping; bfloat16 as uint16."""
    kind = np.dtype("uint16" if entry.dtype == "bfloat16" else entry.dtype)
    count = math.prod(entry.shape)
    if count * kind.itemsize != entry.nbytes or entry.offset > len(memory) - entry.nbytes:
        raise ImageError(f"tensor '{entry.name}' does not fit its entry in the image")
    return np.frombuffer(memory, kind, count, entry.offset).reshape(entry.shape)
