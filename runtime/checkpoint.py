"""Weights as their publisher saved them: safetensors files or a state dict, and how they fill a module.

Invariants
 1. Nothing is unpickled but state dicts, by torch's reader that makes tensors and containers alone
    (`weights_only`); only files inside the model's folder are read.
 2. After `fill` every parameter and persistent buffer has a value of the checkpoint, or is tied to
    one that has; else the error names what is missing.
 3. Types are what the module declares, as in `from_pretrained`: a checkpoint's float16 becomes the
    float32 that the module keeps on purpose.

Called by the packer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from overcommit.runtime.checkpoint_files import cut_off
from overcommit.runtime.engines import manifest
from overcommit.runtime.errors import RepositoryError

_OLD_NAMES: Final = ((".gamma", ".weight"), (".beta", ".bias"))


def read(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Read every tensor of these files (memory-mapped by the library).  Raises RepositoryError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        if path.suffix != ".safetensors":
            tensors |= _read_state_dict(path)
            continue
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError) as error:
            text = cut_off(path) or f"{path} cannot be read as safetensors: {error}"
            raise RepositoryError(text) from error
    return tensors


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything for what is not of its making
        raise RepositoryError(
            f"{path} is no state dict that can be read safely; save model.state_dict() with "
            f"torch.save, or as safetensors: {str(error)[:500]}"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # a checkpoint of a training loop
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise RepositoryError(f"{path} holds no state dict: tensors by name, nothing else")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def fill(module: nn.Module, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Put a checkpoint's tensors into a module that was built for real.

    Extra keys are tolerated, checkpoints carry them.  Raises RepositoryError for a missing tensor
    that is neither tied nor non-persistent, and for one of another shape or kind.
    """
    old = {name: tensor for name, _, _, tensor in manifest.registered(module)}
    wanted = {name for name, _, persistent, _ in manifest.registered(module) if persistent}
    given = _renamed(tensors, wanted, getattr(module, "base_model_prefix", ""))
    filling = {name: _fitted(name, given[name], old[name], where) for name in wanted & given.keys()}
    module.load_state_dict(filling, strict=False, assign=True)
    _tie(module, wanted - filling.keys())
    filled = {id(tensor) for name, _, _, tensor in manifest.registered(module) if name in filling}
    missing = sorted(
        name
        for name, role, persistent, tensor in manifest.registered(module)
        if persistent and id(tensor) not in filled and not _is_computed(module, name, role)
    )
    if missing:
        raise RepositoryError(
            f"{where}: the checkpoint lacks {missing[:5]}; is it complete, and of this class?"
        )
    module.requires_grad_(False)


def _renamed(
    tensors: Mapping[str, torch.Tensor], wanted: set[str], prefix: str
) -> dict[str, torch.Tensor]:
    given = dict(tensors)
    for name in tensors:
        for old, new in _OLD_NAMES:
            if name.endswith(old) and name not in wanted:
                given.setdefault(name.removesuffix(old) + new, given[name])
    if prefix and not wanted & given.keys():
        # A headless class over a checkpoint with a head, or the other way round.
        cut = {name.removeprefix(f"{prefix}."): value for name, value in given.items()}
        added = {f"{prefix}.{name}": value for name, value in given.items()}
        given = cut if wanted & cut.keys() else added
    return given


def _fitted(name: str, new: torch.Tensor, old: torch.Tensor, where: str) -> torch.Tensor:
    if new.shape != old.shape:
        raise RepositoryError(
            f"{where}: tensor '{name}' is {tuple(new.shape)} in the checkpoint, the model's "
            f"configuration makes it {tuple(old.shape)}"
        )
    if new.dtype == old.dtype:
        return new
    if not (new.is_floating_point() and old.is_floating_point()):
        raise RepositoryError(
            f"{where}: tensor '{name}' is {new.dtype} in the checkpoint, {old.dtype} in the model"
        )
    return new.to(old.dtype)


def _tie(module: nn.Module, missing: set[str]) -> None:
    tie_weights: Any = getattr(module, "tie_weights", None)
    if not callable(tie_weights):
        return
    # With the missing names, transformers leaves apart what is in the checkpoint twice and differs.
    if "missing_keys" in inspect.signature(tie_weights).parameters:
        tie_weights(missing_keys=set(missing), recompute_mapping=False)
    else:
        tie_weights()


def _is_computed(module: nn.Module, name: str, role: str) -> bool:
    """Whether a buffer that no checkpoint needs to hold is as its constructor made it."""
    if role != "buffer":
        return False
    patterns = getattr(module, "_keys_to_ignore_on_load_missing", None) or ()
    return name.endswith("num_batches_tracked") or any(
        re.search(pattern, name) for pattern in patterns
    )
