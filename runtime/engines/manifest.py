"""What tensors a module holds: the manifest that an image is made of.

A manifest lists every tensor: parameters, buffers (the non-persistent ones too, which no state dict
holds), tensors that are plain attributes, and aliases.

Invariants
 1. A tensor that has a name is in the manifest; one that has none is warned about.
 2. Strides are kept where the tensor fills its bytes, so that a mapped one computes as it did.

Called by the packer (`scan`, `tensor_bytes`), by the checkpoint reader and by `binding`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import nn

from overcommit.runtime.errors import ImageError
from overcommit.runtime.image import TensorFacts

DEPTH_MAX: Final = 4  # of containers inside containers
TABLES: Final = ("_parameters", "_buffers", "_modules")


class UnregisteredTensorWarning(UserWarning):
    """A module holds a tensor that is neither a parameter nor a buffer."""


# --- what a module holds ------------------------------------------------------------------------
def registered(module: nn.Module) -> Iterator[tuple[str, str, bool, torch.Tensor]]:
    """Yield (name, role, persistent, tensor) for every tensor, duplicates and attributes included.

    A tensor that is a plain attribute counts as a non-persistent buffer: torch.export keeps
    constants like that, and it would otherwise stay on meta, or be another version's.
    """
    for prefix, child in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in child._parameters.items():
            if parameter is not None:
                yield dot + name, "parameter", True, parameter
        for name, buffer in child._buffers.items():
            if buffer is not None:
                persistent = name not in child._non_persistent_buffers_set
                yield dot + name, "buffer", persistent, buffer
        for name, value in vars(child).items():
            if isinstance(value, torch.Tensor):
                yield dot + name, "buffer", False, value


def out_of_reach(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors that lie in containers, or in modules there: no manifest can name them."""
    known = {id(child) for child in module.modules()}
    for prefix, child in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, value in vars(child).items():
            if name in TABLES or not isinstance(value, (list, tuple, dict)):
                continue
            for thing in things_in(value):
                if isinstance(thing, torch.Tensor):
                    yield dot + name, thing
                elif id(thing) not in known:
                    yield from ((dot + name, tensor) for _, _, _, tensor in registered(thing))


def things_in(value: object, depth: int = DEPTH_MAX) -> Iterator[torch.Tensor | nn.Module]:
    """Yield the tensors and modules in nested lists, tuples and dicts."""
    if isinstance(value, (torch.Tensor, nn.Module)):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from things_in(item, depth - 1)


# --- manifests ----------------------------------------------------------------------------------
def dense_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a C-contiguous tensor, in elements."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return tuple(strides)


def fills_its_bytes(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor like this uses each of its elements' places exactly once."""
    if len(shape) != len(stride) or min(shape, default=1) < 1:
        return len(shape) == len(stride)
    step = 1
    for each, size in sorted(zip(stride, shape, strict=True)):
        if size > 1:
            if each != step:
                return False
            step *= size
    return True


def scan(module: nn.Module) -> tuple[list[TensorFacts], dict[str, torch.Tensor]]:
    """List every tensor of a real module; also return the tensors by name.

    Tensors with the same memory, shape, strides and type are aliases of the first.  Strides are
    kept where the tensor fills its bytes (channels last), else the image holds it C-contiguous.
    Raises ImageError for a tensor on meta or of a layout that an image cannot hold.
    """
    facts: list[TensorFacts] = []
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, role, persistent, tensor in registered(module):
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ImageError(
                f"tensor '{name}' has no plain values ({tensor.device}, {tensor.layout})"
            )
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        where = (tensor.data_ptr(), shape, tensor.dtype, stride)
        alias_of = seen.get(where) if tensor.numel() else None
        if alias_of is None:
            seen[where] = name
            tensors[name] = tensor.detach()
        facts.append(
            (
                *(name, "parameter" if role == "parameter" else "buffer", persistent),
                *(str(tensor.dtype).removeprefix("torch."), shape),
                stride if fills_its_bytes(shape, stride) else dense_stride(shape),
                *(tensor.numel() * tensor.element_size(), alias_of),
            )
        )
    _warn_of_attributes(module)
    return facts, tensors


def _warn_of_attributes(module: nn.Module) -> None:
    for prefix, child in module.named_modules():
        for name, value in vars(child).items():
            if isinstance(value, torch.Tensor):
                warnings.warn(
                    f"tensor '{prefix}.{name}' is a plain attribute; register it as a buffer",
                    UnregisteredTensorWarning,
                    stacklevel=3,
                )
    for name, _ in out_of_reach(module):
        warnings.warn(
            f"attribute '{name}' holds tensors that are not part of the image; register them",
            UnregisteredTensorWarning,
            stacklevel=3,
        )


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the tensor's values as bytes, in the order that `scan` says."""
    tensor = tensor.detach().cpu()
    if not tensor.numel():
        return memoryview(b"")
    if fills_its_bytes(tensor.shape, tensor.stride()):
        flat = tensor.as_strided((tensor.numel(),), (1,))
    else:
        flat = tensor.contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
