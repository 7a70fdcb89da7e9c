"""The `torch` engine: an nn.Module over mapped weights.

Two kinds of source: a Hugging Face folder (`hugging_face.py`) and a `model.py` (`user_code.py`),
both with safetensors.

Invariants
 1. A program's module is built once per process, on `meta` unless its constructor needs values;
    every version is a shallow clone.
 2. The skeleton holds no weights, and its tensors are exactly what the manifest says.

Called by the packer and by workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from overcommit.runtime.config import ModelConfig
from overcommit.runtime.device_bytes import Memory
from overcommit.runtime.engines import binding, hugging_face, places, user_code
from overcommit.runtime.engines.bound_module import Arguments, BoundModule
from overcommit.runtime.engines.mixed import MixedProgram, MixedPrograms
from overcommit.runtime.errors import ImageError
from overcommit.runtime.image import ImageHeader


def build(program: Mapping[str, str]) -> nn.Module:
    """Build the module of a program, on the current default device."""
    kind = program.get("kind")
    if kind == "user":
        return user_code.build(program)
    if kind == "hugging_face":
        return hugging_face.build(program)
    raise ImageError(f"unknown kind of program '{kind}'; pack the model again")


class Call:
    """Calls a module with named tensors."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, arguments: Arguments) -> object:
        """Run it."""
        return self._module(**arguments)


class TorchProgram:
    """One architecture: a skeleton without weights."""

    def __init__(self, header: ImageHeader) -> None:
        self.key = header.program_key
        # The device is chosen for this thread alone; batches run meanwhile in another.
        is_meta = header.program.get("skeleton") != "real"
        with torch.device("meta" if is_meta else places.chosen()):
            module = build(header.program)
        self._skeleton = binding.Skeleton(module.requires_grad_(False), header.tensors)
        self._mixed = MixedPrograms(self.bind_tensors)

    def bind(self, header: ImageHeader, memory: Memory) -> BoundModule:
        """Bind a version's weights.  Raises ImageError."""
        module = self._skeleton.bind(header.tensors, memory)
        return BoundModule(Call(module), header.config)

    def mixed(self, header: ImageHeader) -> MixedProgram | None:
        """Return what this version may share batches with others of the program through."""
        return self._mixed.of(header)

    def bind_tensors(self, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> BoundModule:
        """Bind tensors that lie anywhere.  Raises ImageError."""
        return BoundModule(Call(self._skeleton.install(tensors)), config)
