"""The `aoti` engine: a program that AOTInductor compiled, without weights, over mapped weights.

Versions of one architecture share the library on disk and its pages; each has a container of its own, which
points at the version's mapping for good.  On the CPU alone.

Invariants
 1. Names, shapes, types and strides of all constants are checked against the manifest before the library
    gets one of them: it would believe anything.
 2. It never runs without all of them, nor with inputs of sizes that it was not compiled for.
 3. A container's constants live as long as it does.

Called by workers and the packer.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from overcommit.runtime.device_bytes import Memory
from overcommit.runtime.engines import aoti_package, binding
from overcommit.runtime.engines.aoti_package import MANIFEST_FILE, Constant, Manifest
from overcommit.runtime.engines.bound_module import Arguments, BoundModule
from overcommit.runtime.errors import ImageError, ModelError
from overcommit.runtime.image import ImageHeader


class Call:
    """Calls a library over the tensors that it is given here.  Raises ImageError if they do not fit."""

    def __init__(
        self, library: Any, manifest: Manifest, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        check(manifest, tensors)
        names = aoti_package.names_of(library)
        if unknown := sorted(set(names.values()) - manifest.constants.keys()):
            raise ImageError(f"the library binds {unknown[:5]}, which its manifest does not know")
        self._tensors = {own: tensors[name].detach() for own, name in names.items()}
        library.update_constant_buffer(self._tensors, False, True, True)
        self._library = library
        self._inputs = [(each.name, each.shape, each.axes) for each in manifest.inputs]
        self._limits = manifest.limits
        for module in manifest.modules:
            importlib.import_module(module)
        self._answer = pytree.treespec_loads(library.get_call_spec()[1])

    def __call__(self, arguments: Arguments) -> object:
        """Run it.  Raises ModelError for inputs that it was not compiled for."""
        sizes: dict[str, int] = {}
        given: list[torch.Tensor] = []
        for name, shape, axes in self._inputs:
            tensor = arguments.get(name)
            if not isinstance(tensor, torch.Tensor):
                raise ModelError(f"input '{name}' is missing")
            self._check(name, tensor.shape, shape, axes, sizes)
            given.append(tensor.contiguous())
        return pytree.tree_unflatten(self._library.run(given), self._answer)

    def _check(
        self,
        name: str,
        given: Sequence[int],
        shape: Sequence[int],
        axes: Sequence[str | None],
        sizes: dict[str, int],
    ) -> None:
        fits = len(given) == len(shape)
        for size, wanted, axis in zip(given, shape, axes, strict=False):
            if axis is None:
                fits = fits and size == wanted
            else:
                least, most = self._limits[axis]
                fits = fits and least <= size <= most and sizes.setdefault(axis, size) == size
        if not fits:
            limits = {axis: self._limits[axis] for axis in axes if axis is not None}
            raise ModelError(
                f"input '{name}' has shape {list(given)}; it was compiled for {list(shape)}, with "
                f"{limits}"
            )


def check(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ImageError unless these are the tensors that the program binds."""
    if missing := sorted(manifest.constants.keys() - tensors.keys()):
        raise ImageError(f"the tensors {missing[:5]} of the compiled program are not there")
    for name, wanted in manifest.constants.items():
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        found = Constant(dtype, tuple(tensor.shape), tuple(tensor.stride()))
        if found != wanted:
            raise ImageError(
                f"tensor '{name}' is {found.dtype} {list(found.shape)} (strides {list(found.stride)}); "
                f"the program was compiled for {wanted.dtype} {list(wanted.shape)} (strides "
                f"{list(wanted.stride)})"
            )


class AotiProgram:
    """One compiled program."""

    def __init__(self, header: ImageHeader) -> None:
        self.key = header.program_key
        self._path = Path(header.program["file"])
        try:
            content = (self._path.parent / MANIFEST_FILE).read_bytes()
            self._path.stat()
        except OSError as error:
            raise ImageError(f"its program cannot be read: {error}") from error
        self._manifest = aoti_package.read_manifest(content)

    def bind(self, header: ImageHeader, memory: Memory) -> BoundModule:
        """Open the library once more, over a version's weights.  Raises ImageError."""
        if not isinstance(memory, memoryview):
            raise ImageError("the aoti engine runs on the CPU alone; use torch_export")
        tensors = binding.views(header.tensors, memory)
        check(self._manifest, tensors)
        library = aoti_package.open_library(self._path)
        return BoundModule(Call(library, self._manifest, tensors), header.config)

    def mixed(self, header: ImageHeader) -> None:
        """Each version has a container of its own."""
        return
