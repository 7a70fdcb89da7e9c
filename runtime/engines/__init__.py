"""Engines: what turns a program and mapped weights into `run(inputs) -> outputs`.

A program is one architecture, loaded once per worker (slow: imports, deserialisation); binding it
to a version's mapping is cheap, and many versions share one program.  Weights always come from the
mapping, zero-copy.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from overcommit.runtime.errors import Forbidden, ImageError, OvercommitError
from overcommit.runtime.image import ImageHeader


class BoundModel(Protocol):
    """One version, ready to run."""

    def run(self, inputs: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Run one batch.

        Arrays are C-contiguous host arrays; BF16 travels as uint16, BYTES as object arrays of
        bytes.  Raises ModelError.
        """
        ...


class Program(Protocol):
    """One architecture."""

    key: str

    def bind(self, header: ImageHeader, memory: memoryview) -> BoundModel:
        """Bind a version whose image lies in `memory`.  Raises ImageError."""
        ...


def load_program(header: ImageHeader, *, allow_code: bool) -> Program:
    """Load the program of an image; slow, call it in a helper thread.

    Raises ImageError, RepositoryError, Forbidden.
    """
    from overcommit.runtime.engines.torch_export import ExportProgram
    from overcommit.runtime.engines.torch_module import TorchProgram

    if header.program.get("kind") == "user" and not (allow_code and header.config.allow_code):
        raise Forbidden("the model brings its own code and the server runs without --allow-code")
    try:
        if header.engine == "torch":
            return TorchProgram(header)
        if header.engine == "torch_export":
            return ExportProgram(header)
    except OvercommitError:
        raise
    except Exception as error:  # whatever a program's own import or construction raises
        raise ImageError(
            f"its program cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    raise ImageError(f"unknown engine '{header.engine}'; known: torch, torch_export")


def set_up(threads: int) -> None:
    """Prepare a worker process: how many threads one batch may use."""
    import torch

    torch.set_num_threads(max(1, threads))
    torch.set_grad_enabled(False)
