"""Engines: what turns a program and mapped weights into `run(inputs) -> outputs`.

A program is one architecture, loaded once per process (slow: imports, deserialisation); binding it
to a version's mapping is cheap, and many versions share one program.  Weights always come from the
mapping, zero-copy.

Invariants
 1. Versions with equal program keys get the same program; it is loaded once, whoever asks first.  One
    that is a single version's (`Single`) is loaded again while another has it.
 2. A model's own code runs only where the operator and the model both allow it.
 3. At most PROGRAMS_KEPT programs are kept here; one that is in use lives on with its models.
"""

from __future__ import annotations

import importlib
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import numpy as np

from overcommit.runtime import heap
from overcommit.runtime.device_bytes import Memory
from overcommit.runtime.errors import Forbidden, ImageError, OvercommitError
from overcommit.runtime.image import ImageHeader
from overcommit.runtime.mixing import Mixable

if TYPE_CHECKING:
    from overcommit.runtime.engines.device_runner import Backend

PROGRAMS_KEPT: Final = 128
# Names, not imports: what an engine needs is imported by the process that loads a program of it.
_HERE: Final = "overcommit.runtime.engines"
ENGINES: Final = {
    "torch": (f"{_HERE}.torch_module", "TorchProgram"),
    "torch_export": (f"{_HERE}.torch_export", "ExportProgram"),
    "aoti": (f"{_HERE}.aoti", "AotiProgram"),
    "onnx": (f"{_HERE}.onnx_session", "OnnxProgram"),
    "torchscript": (f"{_HERE}.torchscript", "ScriptProgram"),
    "python": (f"{_HERE}.python_model", "PythonProgram"),
    **dict.fromkeys(("lightgbm", "xgboost", "sklearn"), (f"{_HERE}.trees", "TreesProgram")),
}
CODE_KINDS: Final = frozenset(
    {"user", "python", "pickle", "native"}
)  # programs that run what a model brings


class BoundModel(Protocol):
    """One version, ready to run."""

    def run(self, inputs: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Run one batch.

        Arrays are C-contiguous host arrays; BF16 travels as uint16, BYTES as object arrays of
        bytes.  What is returned may share memory with the inputs.  Raises ModelError.
        """
        ...


class Program(Protocol):
    """One architecture."""

    key: str

    def bind(self, header: ImageHeader, memory: Memory) -> BoundModel:
        """Bind a version whose image lies in `memory`.  Raises ImageError."""
        ...

    def mixed(self, header: ImageHeader) -> Mixable | None:
        """Return what runs this version in one call with others of the program, if anything does."""
        ...


@runtime_checkable
class Single(Protocol):
    """A program that versions cannot share: it keeps something of the one that it is bound to."""

    def lend(self) -> Program | None:
        """Return it for one version; None: another has it."""
        ...


class _Programs:
    """Programs by key: each is loaded by one thread while others wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: OrderedDict[str, tuple[threading.Lock, list[Program]]]
        self._slots = OrderedDict()

    def load(self, header: ImageHeader) -> Program:
        key = f"{header.engine} {header.program_key}"
        with self._lock:
            slot, program = self._slots.setdefault(key, (threading.Lock(), []))
            self._slots.move_to_end(key)
            while len(self._slots) > PROGRAMS_KEPT:
                self._slots.popitem(last=False)
        with slot:
            if not program:  # a load that failed leaves it empty: the next one tries again
                program.append(_load(header))
            if not isinstance(program[0], Single):
                return program[0]
            if (lent := program[0].lend()) is None:
                program[0] = newer = _load(header)
                assert isinstance(newer, Single)
                lent = newer.lend()
                assert lent is not None, "nobody else has it yet"
            return lent

    def forget(self, header: ImageHeader) -> None:
        with self._lock:
            self._slots.pop(f"{header.engine} {header.program_key}", None)


_programs = _Programs()


def load_program(header: ImageHeader, *, allow_code: bool) -> Program:
    """Return the program of an image; the first time is slow, call it in a helper thread.

    Raises ImageError, RepositoryError, Forbidden.
    """
    if header.program.get("kind") in CODE_KINDS and not (allow_code and header.config.allow_code):
        raise Forbidden(
            "the model brings its own code: its model.toml must say allow_code = true and the "
            "server must be started with --allow-code"
        )
    return _programs.load(header)


def forget_program(header: ImageHeader) -> None:
    """Keep an image's program no longer than its models do."""
    _programs.forget(header)


def _load(header: ImageHeader) -> Program:
    engine = ENGINES.get(header.engine)
    if engine is None:
        raise ImageError(f"unknown engine '{header.engine}'; known: {', '.join(ENGINES)}")
    module, name = engine
    try:
        program: Program = getattr(importlib.import_module(module), name)(header)
        return program
    except OvercommitError:
        raise
    except Exception as error:  # whatever a program's own import or construction raises
        raise ImageError(
            f"its program cannot be loaded: {type(error).__name__}: {error}"
        ) from error


_batch_threads = 1


def set_up(threads: int, place: str = "cpu", backend: Backend | None = None) -> None:
    """Prepare a worker process: threads of one batch, where torch computes, and its heap."""
    import torch

    from overcommit.runtime.engines import places

    global _batch_threads
    _batch_threads = max(1, threads)
    heap.keep()
    torch.set_num_threads(_batch_threads)
    torch.set_grad_enabled(False)
    places.choose(place, backend)


def batch_threads() -> int:
    """How many threads one batch may use here; 1 where nobody said."""
    return _batch_threads
