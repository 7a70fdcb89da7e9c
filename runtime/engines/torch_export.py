"""The `torch_export` engine: a `.pt2` program, stripped of its weights, over mapped weights.

Invariants
 1. An archive is inspected before torch reads it (`archive.py`).
 2. The stripped program holds no weight, and every tensor of it, the constants too, comes from the
    image when bound: versions with equal graphs share a program, whatever their constants are.
 3. One load at a time: torch.export keeps the running deserialisation in a global.

Called by the packer and by workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from overcommit.runtime.config import ModelConfig, TensorSpec
from overcommit.runtime.device_bytes import Memory
from overcommit.runtime.engines import binding, places
from overcommit.runtime.engines.bound_module import Arguments, BoundModule
from overcommit.runtime.engines.dtypes import v2_of_torch
from overcommit.runtime.engines.mixed import MixedProgram, MixedPrograms
from overcommit.runtime.engines.store import save_once
from overcommit.runtime.errors import ImageError, ModelError, OvercommitError, RepositoryError
from overcommit.runtime.image import ImageHeader, TensorFacts

PROGRAM_FILE: Final = "program.pt2"
_UNBOUNDED: Final = 1 << 40

_load_lock = threading.Lock()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of which archive torch complains: it raises anything for a damaged one.

    Raises RepositoryError; errors of our own pass.
    """
    try:
        yield
    except OvercommitError:
        raise
    except Exception as error:  # foreign code, on foreign bytes
        raise RepositoryError(
            f"{path} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def load(path: Path | str, modules: Sequence[str] = ()) -> torch.export.ExportedProgram:
    """Load an exported program that was inspected.  Thread safe."""
    for name in modules:
        importlib.import_module(name)
    # A batch that runs meanwhile may import this one, which torch.export.load imports from within:
    # who comes to a circle of imports by another way finds halves of its modules.
    importlib.import_module("torch._dynamo")
    with _load_lock:
        return torch.export.load(path)


def moved(exported: torch.export.ExportedProgram, place: str) -> torch.export.ExportedProgram:
    """Return a program that makes what it makes itself (positions, masks) at this place.

    It names the device on which it was exported.
    """
    return exported if place == "cpu" else move_to_device_pass(exported, {"cpu": place})


# --- what a program takes -----------------------------------------------------------------------
@dataclass(slots=True)
class Signature:
    """The inputs of an exported program, and how they go into its call."""

    specs: tuple[TensorSpec, ...]
    constants: tuple[tuple[int, Any], ...]  # (position, value) of what was no tensor at export
    sizes: tuple[dict[str, int], dict[str, int]]  # two choices for the axes, both in range
    batch_limits: tuple[int, int]  # least and most rows


@dataclass(slots=True)
class _Symbols:
    """Names for the sizes that vary, and values for them."""

    ranges: dict[Any, Any]
    axes: dict[str, str] = field(default_factory=dict)  # expression -> axis name
    sizes: tuple[dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}))
    batch_limits: tuple[int, int] = (1, _UNBOUNDED)
    _values: dict[Any, tuple[int, int]] = field(default_factory=dict)

    def axis(self, size: Any, name: str, position: int) -> str:
        """Name the axis that has this size; equal sizes have equal names."""
        expression = size.node.expr
        text = str(expression)
        if text not in self.axes:
            is_batch = position == 0 and "batch" not in self.axes.values()
            self.axes[text] = axis = "batch" if is_batch else f"{name}.{position}"
            values = {symbol: self._value(symbol, is_batch) for symbol in expression.free_symbols}
            for trial in (0, 1):
                chosen = {symbol: value[trial] for symbol, value in values.items()}
                self.sizes[trial][axis] = int(expression.subs(chosen))
            if is_batch:
                self.batch_limits = self._limits(expression)
        return self.axes[text]

    def _limits(self, expression: Any) -> tuple[int, int]:
        limits = self.ranges.get(expression)
        if limits is None:
            return 1, _UNBOUNDED
        upper = int(limits.upper) if limits.upper.is_Integer else _UNBOUNDED
        return max(1, int(limits.lower)), min(upper, _UNBOUNDED)

    def _value(self, symbol: Any, is_batch: bool) -> tuple[int, int]:
        if symbol not in self._values:
            lower, upper = self._limits(symbol)
            order = len(self._values)
            first, second = (1, 3) if is_batch else (5 + 2 * order, 9 + 3 * order)
            one = min(max(first, lower), upper)
            two = min(max(second, one + 1), upper)
            self._values[symbol] = (one, two)
        return self._values[symbol]


def signature_of(exported: torch.export.ExportedProgram) -> Signature:
    """Describe a program's inputs.  Raises RepositoryError for what no request can give."""
    symbols = _Symbols(dict(exported.range_constraints))
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    specs: list[TensorSpec] = []
    constants: list[tuple[int, Any]] = []
    inputs = [spec for spec in exported.graph_signature.input_specs if _is_user_input(spec)]
    for position, spec in enumerate(inputs):
        name = spec.arg.name
        node = nodes.get(name)
        value = None if node is None else node.meta.get("val")
        if isinstance(value, torch.Tensor):
            specs.append(_describe(name, value, symbols))
        elif isinstance(spec.arg, torch.export.graph_signature.ConstantArgument):
            constants.append((position, spec.arg.value))
        else:
            raise RepositoryError(
                f"input '{name}' of the exported program is a number that varies; export it with a "
                f"tensor instead"
            )
    return Signature(tuple(specs), tuple(constants), symbols.sizes, symbols.batch_limits)


def _is_user_input(spec: torch.export.graph_signature.InputSpec) -> bool:
    return spec.kind is torch.export.graph_signature.InputKind.USER_INPUT


def _describe(name: str, value: torch.Tensor, symbols: _Symbols) -> TensorSpec:
    shape: list[int] = []
    axes: list[str | None] = []
    for position, each in enumerate(value.shape):
        size: Any = each  # an int, or a torch.SymInt
        is_fixed = isinstance(size, int) or size.node.expr.is_Integer
        shape.append(int(size) if is_fixed else -1)
        axes.append(None if is_fixed else symbols.axis(size, name, position))
    try:
        datatype = v2_of_torch(value.dtype)
    except ModelError as error:
        raise RepositoryError(f"input '{name}': {error.message}") from error
    return TensorSpec(name=name, datatype=datatype, shape=tuple(shape), axes=tuple(axes))


class Call:
    """Calls an exported module with named tensors, in the structure that it was exported with."""

    def __init__(self, module: nn.Module, exported_tree: Any, signature: Signature) -> None:
        self._module = module
        self._tree = exported_tree
        self._names = [spec.name for spec in signature.specs]
        self._constants = signature.constants
        count = len(self._names)
        self._is_flat = not self._constants and (
            pytree.tree_unflatten(range(count), exported_tree) == (tuple(range(count)), {})
        )

    def __call__(self, arguments: Arguments) -> object:
        """Run it.  Raises ModelError for an input that is absent: exported programs take all."""
        try:
            leaves: list[Any] = [arguments[name] for name in self._names]
        except KeyError as error:
            raise ModelError(f"input {error} is missing") from error
        if self._is_flat:
            return self._module(*leaves)
        for position, value in self._constants:
            leaves.insert(position, value)
        positional, keywords = pytree.tree_unflatten(leaves, self._tree)
        return self._module(*positional, **keywords)


# --- stripping ----------------------------------------------------------------------------------
def strip(exported: torch.export.ExportedProgram) -> bytes:
    """Take the weights out of a program, in place; return it as a `.pt2` archive."""
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


def program_key(exported: torch.export.ExportedProgram, facts: Sequence[TensorFacts]) -> str:
    """Name the program: its graphs, what it takes and gives, and the shapes of what it binds."""
    digest = hashlib.blake2b(digest_size=16)
    parts: list[object] = [torch.__version__, exported.graph_signature, exported.call_spec]
    parts += [sorted((str(s), str(r)) for s, r in exported.range_constraints.items())]
    for name, child in exported.graph_module.named_modules():
        graph = getattr(child, "graph", None)
        parts += [name, graph]
        parts += [str(node.meta.get("val")) for node in graph.nodes] if graph is not None else []
    for part in (*parts, *facts):
        digest.update(str(part).encode() + b"\0")
    return digest.hexdigest()


def save_program(folder: Path, exported: torch.export.ExportedProgram) -> Path:
    """Put a stripped program into its cache folder, once; the program loses its weights."""
    return save_once(folder / PROGRAM_FILE, lambda: strip(exported))


class ExportProgram:
    """One stripped program, loaded."""

    def __init__(self, header: ImageHeader) -> None:
        self.key = header.program_key
        modules = tuple(filter(None, header.program.get("modules", "").split(",")))
        try:
            exported = load(header.program["file"], modules)
        except (OSError, KeyError) as error:
            raise ImageError(f"its program cannot be read: {error}") from error
        exported = moved(exported, places.chosen())
        self._tree = exported.call_spec.in_spec
        self._signature = signature_of(exported)
        self._skeleton = binding.Skeleton(exported.module(), header.tensors)
        self._mixed = MixedPrograms(self.bind_tensors)

    def bind(self, header: ImageHeader, memory: Memory) -> BoundModule:
        """Bind a version's weights.  Raises ImageError."""
        return self._bound(self._skeleton.bind(header.tensors, memory), header.config)

    def mixed(self, header: ImageHeader) -> MixedProgram | None:
        """Return what this version may share batches with others of the program through."""
        return self._mixed.of(header)

    def bind_tensors(self, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> BoundModule:
        """Bind tensors that lie anywhere.  Raises ImageError."""
        return self._bound(self._skeleton.install(tensors), config)

    def _bound(self, module: nn.Module, config: ModelConfig) -> BoundModule:
        return BoundModule(Call(module, self._tree, self._signature), config)
