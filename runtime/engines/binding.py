"""Joining a program with weights that lie in a mapping.

Binding installs a view of the mapping for every tensor of the manifest into a clone of the module
tree, which shares everything else with the skeleton.

Invariants
 1. After `bind` no tensor that is in reach is on `meta`, and each lies inside the mapping.  (A BERT
    whose non-persistent buffers stay on meta raises nothing and is wrong by up to 5.)
 2. Names, shapes, types and strides are checked before anything is installed.
 3. Aliases in the manifest are the same object in the bound module.
 4. Views are made from a memoryview, which keeps the mapping's buffer alive; `torch.frombuffer` on
    an mmap does not.
 5. A clone shares no container that holds modules or that a forward pass could write to.

Called by the engines.  Thread safe: a skeleton is only read once it is made.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Final

import torch
from torch import nn

from overcommit.runtime.device_bytes import Memory
from overcommit.runtime.engines import places
from overcommit.runtime.engines.manifest import (
    DEPTH_MAX,
    TABLES,
    fills_its_bytes,
    out_of_reach,
    registered,
    things_in,
)
from overcommit.runtime.errors import ImageError
from overcommit.runtime.image import TensorEntry

# The mapping is read-only on purpose; torch warns, once, that it cannot protect it.  Here and not
# around the call: `warnings.catch_warnings` swaps global state and programs load in a thread.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

# What torch itself keeps in every module (hooks, flags): no forward pass writes to it.
_SHARED: Final = frozenset(vars(nn.Module())) - set(TABLES)


def views(entries: Iterable[TensorEntry], memory: Memory) -> dict[str, torch.Tensor]:
    """Make a tensor over the mapping for every entry; aliases share one object.

    Raises ImageError for an entry that does not lie inside the memory.
    """
    made: dict[str, torch.Tensor] = {}
    whole = None if isinstance(memory, memoryview) else places.tensor_over(memory)
    for entry in entries:
        if entry.alias_of is not None:
            if entry.alias_of not in made:
                raise ImageError(f"tensor '{entry.name}' is an alias of nothing before it")
            made[entry.name] = made[entry.alias_of]
            continue
        dtype = getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ImageError(f"tensor '{entry.name}' has the unknown type '{entry.dtype}'")
        count = math.prod(entry.shape)
        if (
            count * dtype.itemsize != entry.nbytes
            or not 0 <= entry.offset <= len(memory) - entry.nbytes
            or not fills_its_bytes(entry.shape, entry.stride)
        ):
            raise ImageError(f"tensor '{entry.name}' does not fit its entry in the image")
        if not count:
            tensor = torch.empty(
                entry.shape, dtype=dtype, device=None if whole is None else whole.device
            )
        else:
            if whole is not None:
                tensor = whole[entry.offset : entry.offset + entry.nbytes].view(dtype)
            else:
                tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=entry.offset)
            if entry.shape != (count,):
                tensor = tensor.as_strided(entry.shape, entry.stride)
        if entry.role == "parameter":
            tensor = nn.Parameter(tensor, requires_grad=False)
        made[entry.name] = tensor
    return made


@dataclass(slots=True, frozen=True)
class _Part:
    """One module of a skeleton, and what its clone owns."""

    module: nn.Module
    children: tuple[tuple[str, int | None], ...]  # name -> part
    parameters: tuple[tuple[str, str | None], ...]  # name -> name in the manifest
    buffers: tuple[tuple[str, str | None], ...]
    attributes: tuple[tuple[str, str], ...]  # tensors that are plain attributes
    containers: tuple[str, ...]  # attributes that are copied


class Skeleton:
    """A module without weights, taken apart so that a bound clone is quick to make.

    A deep copy of MiniLM (105 tensors) takes 12 ms and 289 KiB.
    """

    def __init__(self, module: nn.Module, entries: Sequence[TensorEntry] | None = None) -> None:
        """Take a module; with a manifest, make its tensors exactly that, on meta.

        The manifest is right about types and strides: a checkpoint in bfloat16 makes a bfloat16
        module, while the constructor alone makes float32.  Raises ImageError when names or shapes
        differ.
        """
        if entries is not None:
            _check(module, entries, exactly=False)
            _adopt(module, entries)
        self.module = module
        self._facts = {
            name: (role, tuple(tensor.shape), _name_of(tensor.dtype), tuple(tensor.stride()))
            for name, role, _, tensor in registered(module)
        }
        self._hidden = sorted({name for name, tensor in out_of_reach(module) if tensor.is_meta})
        self._modules = list(_all_modules(module))
        self._index = {id(child): index for index, child in enumerate(self._modules)}
        names = {id(child): name for name, child in reversed(list(module.named_modules()))}
        self._parts = [self._part(child, names.get(id(child))) for child in self._modules]

    def bind(self, entries: Sequence[TensorEntry], memory: Memory) -> nn.Module:
        """Return a clone whose tensors are views of `memory`.

        Raises ImageError when the image's tensors are not exactly the skeleton's.
        """
        facts = self._facts
        if len(entries) != len(facts) or any(
            facts.get(entry.name) != (entry.role, entry.shape, entry.dtype, entry.stride)
            for entry in entries
        ):
            _check(self.module, entries, exactly=True)
            raise ImageError("the image lists a tensor twice")
        return self.install(views(entries, memory))

    def install(self, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """Return a clone that holds these tensors, each by its name.

        Raises ImageError when something would stay on meta.
        """
        left = self._hidden or [name for name, tensor in tensors.items() if tensor.is_meta]
        if left:
            raise ImageError(f"the tensors {left[:5]} would stay without values")
        # Not copy.copy: a GraphModule would compile its code again.
        twins: list[nn.Module] = [object.__new__(type(child)) for child in self._modules]
        for part, twin in zip(self._parts, twins, strict=True):
            own = vars(twin)
            own.update(vars(part.module))
            own["_parameters"] = {n: key and tensors[key] for n, key in part.parameters}
            own["_buffers"] = {n: key and tensors[key] for n, key in part.buffers}
            own["_modules"] = {n: None if i is None else twins[i] for n, i in part.children}
            for name, key in part.attributes:
                own[name] = tensors[key]
            for name in part.containers:
                own[name] = self._twin_of(own[name], twins, DEPTH_MAX)
        return twins[0]

    # --- inside ---------------------------------------------------------------------------------
    def _part(self, module: nn.Module, prefix: str | None) -> _Part:
        """`prefix` is None for a module that only a container holds: it keeps what it has."""
        dot = f"{prefix}." if prefix else ""
        tables: list[Any] = [module._parameters, module._buffers]
        parameters, buffers = (
            tuple((name, None if value is None else dot + name) for name, value in table.items())
            for table in tables
        )
        others = {name: value for name, value in vars(module).items() if name not in TABLES}
        tensors = [name for name, value in others.items() if isinstance(value, torch.Tensor)]
        is_named = prefix is not None
        return _Part(
            module=module,
            children=tuple(
                (name, None if child is None else self._index[id(child)])
                for name, child in module._modules.items()
            ),
            parameters=parameters if is_named else (),
            buffers=buffers if is_named else (),
            attributes=tuple((name, dot + name) for name in tensors) if is_named else (),
            containers=tuple(
                name
                for name, value in others.items()
                if name not in _SHARED and type(value) in (list, tuple, dict, set, MethodType)
            ),
        )

    def _twin_of(self, value: Any, twins: Sequence[nn.Module], depth: int) -> Any:
        kind = type(value)
        if isinstance(value, nn.Module):
            index = self._index.get(id(value))
            return value if index is None else twins[index]
        if kind is MethodType and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self._twin_of(value.__self__, twins, depth))
        # Empty ones too: a forward pass may use them as a cache.  Subclasses are shared.
        if depth and kind in (list, tuple):
            return kind(self._twin_of(item, twins, depth - 1) for item in value)
        if depth and kind is dict:
            return {key: self._twin_of(item, twins, depth - 1) for key, item in value.items()}
        return set(value) if kind is set else value


def _all_modules(root: nn.Module) -> Iterator[nn.Module]:
    """Yield every module in reach, through containers too, the root first."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        waiting += [child for child in module._modules.values() if child is not None]
        for name, value in vars(module).items():
            if name not in TABLES and name not in _SHARED:
                waiting += [thing for thing in things_in(value) if isinstance(thing, nn.Module)]


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _adopt(module: nn.Module, entries: Sequence[TensorEntry]) -> None:
    made: dict[str, torch.Tensor] = {}
    for entry in entries:
        if entry.alias_of is not None:
            made[entry.name] = made[entry.alias_of]
            continue
        dtype = getattr(torch, entry.dtype)
        tensor = torch.empty_strided(entry.shape, entry.stride, dtype=dtype, device="meta")
        if entry.role == "parameter":
            tensor = nn.Parameter(tensor, requires_grad=False)
        made[entry.name] = tensor
    for prefix, child in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        tables: list[Any] = [child._parameters, child._buffers]
        for table in tables:
            for name, old in table.items():
                if old is not None:
                    table[name] = made[dot + name]
        own = vars(child)
        for name in [key for key, value in own.items() if isinstance(value, torch.Tensor)]:
            own[name] = made[dot + name]


def _check(skeleton: nn.Module, entries: Sequence[TensorEntry], *, exactly: bool) -> None:
    wanted = {name: (role, tensor) for name, role, _, tensor in registered(skeleton)}
    given = {entry.name: entry for entry in entries}
    if missing := sorted(wanted.keys() - given.keys()):
        raise ImageError(f"the image lacks the tensors {missing[:5]} of the program")
    if extra := sorted(given.keys() - wanted.keys()):
        raise ImageError(f"the image has tensors {extra[:5]} that the program does not know")
    for name, (role, tensor) in wanted.items():
        entry = given[name]
        facts: list[tuple[str, object, object]] = [
            ("role", entry.role, role),
            ("shape", entry.shape, tuple(tensor.shape)),
        ]
        if exactly:
            facts.append(("type", entry.dtype, str(tensor.dtype).removeprefix("torch.")))
            facts.append(("stride", entry.stride, tuple(tensor.stride())))
        for what, in_image, in_program in facts:
            if in_image != in_program:
                raise ImageError(
                    f"tensor '{name}' has {what} {in_image} in the image, {in_program} in the "
                    f"program"
                )
