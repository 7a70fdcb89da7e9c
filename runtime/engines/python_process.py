"""A model's own process, as its worker sees it.

    ABSENT --start--> LOADED --run--> LOADED
    LOADED --it dies, or takes longer than PYTHON_BATCH_S--> ABSENT    its batch fails
    ABSENT --the next batch--> LOADED

Invariants
 1. A process that does not answer is killed and reaped before anybody else is told.
 2. Nothing of it is left when this object is gone; nothing when the worker is (PR_SET_PDEATHSIG).

Called by `python_model`, from one thread at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from overcommit.runtime.config import PYTHON_BATCH_S, PYTHON_MESSAGE_BYTES_MAX, PYTHON_START_S
from overcommit.runtime.engines import python_child
from overcommit.runtime.engines.python_child import Channel
from overcommit.runtime.errors import ModelError

Array = np.ndarray[Any, Any]
# Ours are not the model's: its Python finds its own packages.
_NOT_INHERITED: Final = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


@dataclass(slots=True)
class _Child:
    """A running process and what is shared with it."""

    popen: subprocess.Popen[bytes]
    control: socket.socket
    inputs: Channel
    outputs: Channel

    def end(self) -> str:
        """Kill and reap it; return how it ended, in words."""
        self.popen.kill()
        code = self.popen.wait()
        self.control.close()
        with contextlib.suppress(BufferError):  # an array that somebody still holds
            self.inputs.close()
            self.outputs.close()
        return f"signal {-code}" if code < 0 else f"exit status {code}"


class PythonProcess:
    """One model in one process."""

    def __init__(self, python: str, load: Mapping[str, object]) -> None:
        """Start it and load the model.  Raises ModelError."""
        self._python = python
        self._load = {"do": "load", **load}
        self._held: list[_Child] = []
        self._starts = 0
        weakref.finalize(self, _end_all, self._held).atexit = False
        self._start()

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return self._held[0].popen.pid if self._held else None

    @property
    def starts(self) -> int:
        """How often it was started, with the start that the next batch needs."""
        return self._starts if self._held else self._starts + 1

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run one batch.  Raises ModelError, also when the process dies over it."""
        child = self._held[0] if self._held else self._start()
        try:
            places = child.inputs.write(inputs)
            answer = self._ask(child, {"do": "run", "inputs": places}, PYTHON_BATCH_S)
            return child.outputs.read(answer["outputs"])
        except (ValueError, KeyError) as error:
            raise ModelError(f"its process {self._fail()}: {error}") from error

    def close(self) -> None:
        """End it."""
        _end_all(self._held)

    # --- inside ---------------------------------------------------------------------------------
    def _start(self) -> _Child:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = [_growing_memfd(name) for name in ("python-in", "python-out")]
        environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        passed = (theirs.fileno(), *fds)
        try:
            popen = subprocess.Popen(
                [
                    *(self._python, "-s", python_child.__file__),
                    *(str(fd) for fd in passed),
                    str(os.getpid()),
                ],
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            ours.close()
            for fd in fds:
                os.close(fd)
            raise ModelError(f"{self._python} cannot be run: {error}") from error
        finally:
            theirs.close()
        child = _Child(popen, ours, Channel(fds[0]), Channel(fds[1]))
        self._held.append(child)
        self._starts += 1
        try:
            self._ask(child, self._load, PYTHON_START_S)
        except ModelError:
            self.close()
            raise
        return child

    def _ask(
        self, child: _Child, message: Mapping[str, object], timeout_s: float
    ) -> dict[str, Any]:
        try:
            child.control.send(json.dumps(message).encode())
            if not select.select([child.control], [], [], timeout_s)[0]:
                raise ModelError(f"its process took longer than {timeout_s:.0f} s, {self._fail()}")
            content = child.control.recv(PYTHON_MESSAGE_BYTES_MAX)
        except OSError as error:
            raise ModelError(f"its process {self._fail()} ({error.strerror})") from error
        if not content:
            raise ModelError(f"its process {self._fail()}")
        answer: dict[str, Any] = json.loads(content)
        if not answer["ok"]:
            raise ModelError(str(answer["error"]))
        return answer

    def _fail(self) -> str:
        ending = _end_all(self._held)
        return f"died ({ending})"


def _growing_memfd(name: str) -> int:
    """Make a memfd that may grow; a shorter one would kill whoever reads what is gone."""
    fd = os.memfd_create(f"overcommit-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def _end_all(held: list[_Child]) -> str:
    ending = "it was gone"
    while held:
        ending = held.pop().end()
    return ending


def python_of(venv: str | None, folder: str) -> str:
    """Return the Python of a virtual environment; `venv` may be relative to the model's folder.

    Raises ModelError when there is none.
    """
    if venv is None:
        return sys.executable
    path = Path(folder) / venv / "bin" / "python"
    if not path.exists():
        raise ModelError(f"there is no Python at {path}: make it with python -m venv, with numpy")
    return str(path)
