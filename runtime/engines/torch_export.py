"""The `torch_export` engine: a `.pt2` program, stripped of its weights, over mapped weights.

Invariants
 1. An archive with an entry that needs unpickling is refused before anything reads it.
 2. The stripped program holds no weight: parameters and buffers are on meta, and every constant
    (a non-persistent buffer) is in the image, because nothing may stay on meta when bound.

Called by the packer and by workers.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overcommit.runtime.config import TensorSpec
from overcommit.runtime.engines import binding
from overcommit.runtime.engines.dtypes import v2_of_torch
from overcommit.runtime.engines.torch_module import BoundTorch
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.image import ImageHeader


def refuse_pickles(path: Path) -> None:
    """Raise RepositoryError when loading the archive would unpickle something."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            suspects = [name for name in names if name.endswith((".pkl", ".pickle"))]
            for name in names:
                if name.endswith("_config.json"):
                    _find_pickles(json.loads(archive.read(name)), name, suspects)
    except (zipfile.BadZipFile, json.JSONDecodeError, KeyError) as error:
        raise RepositoryError(f"{path} is no .pt2 archive: {error}") from error
    if suspects:
        raise RepositoryError(
            f"{path} has entries that need unpickling ({suspects[:3]}), which can run any code; "
            f"export the model without custom objects"
        )


def _find_pickles(value: Any, where: str, suspects: list[str]) -> None:
    if isinstance(value, dict):
        if value.get("use_pickle"):
            suspects.append(f"{where}: {value.get('path_name', '?')}")
        for child in value.values():
            _find_pickles(child, where, suspects)
    elif isinstance(value, list):
        for child in value:
            _find_pickles(child, where, suspects)


def load(path: Path | str | io.BytesIO) -> torch.export.ExportedProgram:
    """Load an exported program; the caller has refused pickles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(path)


def inputs_of(exported: torch.export.ExportedProgram) -> tuple[TensorSpec, ...]:
    """Describe the program's inputs from its graph."""
    specs = []
    names = exported.graph_signature.user_inputs
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    axis_of_symbol: dict[str, str] = {}
    for name in names:
        value = nodes[str(name)].meta["val"] if str(name) in nodes else None
        if not isinstance(value, torch.Tensor):
            raise RepositoryError(f"input '{name}' of the exported program is no tensor")
        shape: list[int] = []
        axes: list[str | None] = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                shape.append(size)
                axes.append(None)
            else:
                default = "batch" if axis == 0 else f"{name}.{axis}"
                shape.append(-1)
                axes.append(axis_of_symbol.setdefault(str(size), default))
        specs.append(
            TensorSpec(
                name=str(name),
                datatype=v2_of_torch(value.dtype),
                shape=tuple(shape),
                axes=tuple(axes),
            )
        )
    return tuple(specs)


def strip(exported: torch.export.ExportedProgram) -> bytes:
    """Return the program as a `.pt2` archive without weights."""
    for name, value in list(exported.state_dict.items()):
        empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        exported.state_dict[name] = (
            nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
        )
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(exported, buffer)
    return buffer.getvalue()


def program_key(exported: torch.export.ExportedProgram) -> str:
    """Name the program: its graph and the shapes of what it binds, not the weights."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(torch.__version__.encode())
    digest.update(str(exported.graph).encode())
    digest.update(str(exported.graph_signature).encode())
    for name, value in sorted(exported.state_dict.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
    return digest.hexdigest()


def save_program(folder: Path, archive: bytes) -> Path:
    """Put a stripped program into the cache, once, atomically."""
    path = folder / "program.pt2"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(prefix=".packing-", dir=folder)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(archive)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    return path


class ExportProgram:
    """One stripped program, loaded."""

    def __init__(self, header: ImageHeader) -> None:
        self.key = header.program_key
        # Constants of the archive are real here; binding replaces them with the image's.
        self._skeleton = load(header.program["file"]).module()

    def bind(self, header: ImageHeader, memory: memoryview) -> BoundTorch:
        """Bind a version's weights.  Raises ImageError."""
        module = binding.bind(self._skeleton, header.tensors, memory)
        return BoundTorch(module, header.config, positional=True)
