"""The `torchscript` engine, for archives of torch.jit that nobody exports again; weights over the mapping.

The archive is stripped: every parameter and buffer becomes one element, expanded. A worker loads that and
points them at the mapping.  torch itself has given TorchScript up: prefer torch.export or ONNX.

Loading an archive runs its code (`__setstate__`), which can write files (`torch.save`): its code is read
first, and what is not arithmetic is refused.  As with `archive.py` this closes the doors that we know.

Invariants
 1. Nothing is loaded before `inspect` has read all of its code.
 2. After `bind` every parameter and buffer lies in the mapping.
 3. A module that keeps state between calls, or writes to its weights, is refused at packing.

Called by the packer and by workers.
"""

from __future__ import annotations

import ast
import io
import warnings
import zipfile
from pathlib import Path
from typing import Any, Final

import torch

from overcommit.runtime.config import ModelConfig
from overcommit.runtime.device_bytes import Memory
from overcommit.runtime.engines import binding
from overcommit.runtime.engines.bound_module import Arguments, BoundModule
from overcommit.runtime.errors import ImageError, ModelError, RepositoryError
from overcommit.runtime.image import ImageHeader

CODE_BYTES_MAX: Final = 64 << 20
_NAMESPACES: Final = frozenset({"aten", "prim", "prims", "quantized", "torchvision"})
_REFUSED: Final = frozenset({"save", "load", "from_file", "_save", "import_ir_module"})


def inspect(path: Path) -> None:
    """Refuse code that does more than compute.  Raises RepositoryError."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not entry.filename.endswith(".py"):
                    continue
                if entry.file_size > CODE_BYTES_MAX:
                    raise RepositoryError(f"{path.name}: '{entry.filename}' is too long")
                _check(path.name, archive.read(entry).decode())
    except (zipfile.BadZipFile, UnicodeDecodeError, SyntaxError, RecursionError) as error:
        raise RepositoryError(f"{path.name} is no archive of torch.jit: {error}") from error


def _check(name: str, code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Attribute):
            continue
        path = [node.attr]
        value: ast.expr = node.value
        while isinstance(value, ast.Attribute):
            path.insert(0, value.attr)
            value = value.value
        root = value.id if isinstance(value, ast.Name) else ""
        is_foreign = root == "ops" and path[0] not in _NAMESPACES
        if is_foreign or (root in ("torch", "ops") and path[-1] in _REFUSED):
            raise RepositoryError(
                f"{name} uses {root}.{'.'.join(path)}, which is not known to be safe; export the "
                f"model with torch.export"
            )


def load(source: Path | bytes) -> Any:
    """Load an archive that was inspected.  Raises RepositoryError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit says that it is old whenever it is used
        try:
            file: Any = io.BytesIO(source) if isinstance(source, bytes) else str(source)
            jit: Any = torch.jit  # its functions have no types
            return jit.load(file, map_location="cpu").eval()
        except Exception as error:  # torch raises anything
            raise RepositoryError(f"torch.jit cannot load it: {str(error)[:1000]}") from error


def tensors_of(module: Any) -> dict[str, tuple[str, torch.Tensor]]:
    """Return role and tensor of every parameter and buffer by name."""
    found = {name: ("parameter", value) for name, value in module.named_parameters()}
    found |= {name: ("buffer", value) for name, value in module.named_buffers()}
    return found


def strip(module: Any) -> bytes:
    """Take the weights out of a module, in place; return its archive."""
    for _, tensor in tensors_of(module).values():
        tensor.data = torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(module, buffer)
    return buffer.getvalue()


class Call:
    """Calls a module with named tensors: by its own names, or in the configuration's order."""

    def __init__(self, module: Any, config: ModelConfig) -> None:
        self._module = module
        arguments = module._c._get_method("forward").schema.arguments[1:]
        self._kinds = {each.name: str(each.type) for each in arguments}
        names = [spec.name for spec in config.inputs]
        by_name = set(names) <= self._kinds.keys()
        positions = [each.name for each in arguments]
        self._keys = dict(zip(names, names if by_name else positions, strict=False))
        if len(self._keys) < len(names):
            raise RepositoryError(f"its forward takes {positions}, the model.toml lists {names}")

    def __call__(self, arguments: Arguments) -> object:
        """Run it."""
        given: dict[str, Any] = {}
        for name, value in arguments.items():
            key = self._keys[name]
            is_number = self._kinds[key] in ("int", "float", "bool")
            given[key] = value.item() if is_number else value
        return self._module(**given)


class ScriptProgram:
    """One stripped archive."""

    def __init__(self, header: ImageHeader) -> None:
        self.key = header.program_key
        try:
            self._archive = Path(header.program["file"]).read_bytes()
        except OSError as error:
            raise ImageError(f"its program cannot be read: {error}") from error

    def bind(self, header: ImageHeader, memory: Memory) -> BoundModule:
        """Load it once more, and point it at a version's weights.  Raises ImageError."""
        if not isinstance(memory, memoryview):
            raise ImageError("the torchscript engine runs on the CPU alone; use torch.export")
        module = load(self._archive)
        wanted = tensors_of(module)
        views = binding.views(header.tensors, memory)
        if wanted.keys() != views.keys():
            raise ImageError("the image's tensors are not those of the program")
        for name, (_, tensor) in wanted.items():
            view = views[name]
            if tensor.shape != view.shape or tensor.dtype != view.dtype:
                raise ImageError(f"tensor '{name}' is another one in the program")
            tensor.data = view.data
        return BoundModule(Call(module, header.config), header.config)

    def mixed(self, header: ImageHeader) -> None:
        """Each version has a module of its own."""
        return


def kept_between(module: Any) -> list[str]:
    """Name the attributes that a module's forward sets: what it may remember."""
    try:
        graph = module._c._get_method("forward").inlined_graph
        return sorted({node.s("name") for node in graph.findAllNodes("prim::SetAttr")})
    except RuntimeError:  # not every graph can be inlined
        return []


def refuse_state(name: str, module: Any, run: Any, inputs: dict[str, Any]) -> None:
    """Refuse a module whose second answer differs from its first.  Raises RepositoryError."""
    import numpy as np

    try:
        first, second = run(inputs)[0], run(inputs)[0]
    except ModelError as error:
        if kept := kept_between(module):
            raise RepositoryError(
                f"{name} keeps state between requests (its code sets {kept[:5]}), and requests of "
                f"several clients would get mixed up; export it with the state as a tensor that goes "
                f"in and out, as its ONNX file may have it (it also took none of the values that were "
                f"tried: {error.message[-200:]})"
            ) from error
        return
    if any(not np.array_equal(first[key], second[key], equal_nan=True) for key in first):
        raise RepositoryError(
            f"{name} answers the same request differently the second time: it keeps state, or "
            f"draws random numbers, and requests of several clients would get mixed up"
        )
