"""The `torch` engine: an nn.Module over mapped weights.

Two kinds of source: a Hugging Face folder (config.json + safetensors; only classes of the installed
transformers package, never code from the folder), or a `model.py` that defines an nn.Module
(+ safetensors; run only where operator and model both allow it).

Invariants
 1. Nothing is unpickled.
 2. In a worker the module is built on `meta` once per program; every version is a shallow clone.

Called by the packer (`Source`) and by workers (`TorchProgram`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from overcommit.runtime.config import ModelConfig, TensorSpec
from overcommit.runtime.engines import binding
from overcommit.runtime.engines.dtypes import to_array, to_tensor, v2_of_torch
from overcommit.runtime.errors import Forbidden, ModelError, RepositoryError
from overcommit.runtime.image import ImageHeader

# Keys of a config.json that change nothing about the module's structure.
_NOISE = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype"})
_IDENTIFIER = re.compile(r"[a-z0-9_]+")
_build_lock = threading.Lock()  # torch.device("meta") as a context is per thread, imports are not


# --- building modules ---------------------------------------------------------------------------
def hugging_face_class(config: Mapping[str, Any], where: str) -> type[nn.Module]:
    """Find the class that a config.json names, in the installed transformers package."""
    model_type = str(config.get("model_type", ""))
    architectures = config.get("architectures") or []
    if not _IDENTIFIER.fullmatch(model_type.replace("-", "_")) or not architectures:
        raise RepositoryError(f"{where}: config.json names no model_type or no architectures")
    module_name = model_type.replace("-", "_")
    try:
        module = importlib.import_module(
            f"transformers.models.{module_name}.modeling_{module_name}"
        )
    except ImportError as error:
        raise RepositoryError(
            f"{where}: model_type '{model_type}' needs a transformers package that has it "
            f"(pip install 'overcommit[huggingface]'): {error}"
        ) from error
    found = getattr(module, str(architectures[0]), None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise RepositoryError(f"{where}: transformers has no class '{architectures[0]}'")
    return found


def build_hugging_face(program: Mapping[str, str], where: str) -> nn.Module:
    """Build the module that a program describes, on the current default device."""
    config = json.loads(program["config"])
    cls: Any = hugging_face_class(config, where)
    arguments = json.loads(program.get("arguments", "{}"))
    module: nn.Module = cls(cls.config_class(**config), **arguments).eval()
    return module


def load_user_class(path: Path, class_name: str) -> type[nn.Module]:
    """Run a model.py and return its module class.  The caller has checked that this is allowed."""
    name = f"overcommit_user_{hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RepositoryError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    classes = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == name
    }
    if class_name:
        found = classes.get(class_name)
    else:
        found = next(iter(classes.values())) if len(classes) == 1 else None
    if found is None:
        raise RepositoryError(
            f"{path} defines the modules {sorted(classes)}; name one with entry = "
            f'"{path.name}:Class" in model.toml'
        )
    return found


def build_user(program: Mapping[str, str], where: str) -> nn.Module:
    """Build a model.py module; its constructor gets [parameters]."""
    cls = load_user_class(Path(program["file"]), program["class"])
    arguments = json.loads(program["arguments"])
    try:
        return cls(**arguments).eval()
    except Exception as error:
        raise RepositoryError(
            f"{where}: {cls.__name__}(**{arguments}) fails: {type(error).__name__}: {error}"
        ) from error


def build(program: Mapping[str, str], where: str) -> nn.Module:
    """Build the module of a program."""
    make = build_user if program["kind"] == "user" else build_hugging_face
    return make(program, where)


def require_code_allowed(name: str, config: ModelConfig, allow_code: bool) -> None:
    """Raise Forbidden unless both the operator and the model allow its code to run."""
    if not (allow_code and config.allow_code):
        raise Forbidden(
            f"model '{name}' brings its own code (model.py): it is served only if its model.toml "
            f"says allow_code = true and the server was started with --allow-code"
        )


# --- running ------------------------------------------------------------------------------------
def flatten_outputs(result: object, names: Sequence[str]) -> dict[str, torch.Tensor | np.ndarray]:
    """Give every output a name: those of a mapping or ModelOutput, else `names`, else output<i>."""
    if isinstance(result, Mapping):
        items = list(result.items())
    elif isinstance(result, (tuple, list)):
        fields = getattr(result, "_fields", ())
        items = [
            (
                fields[i] if i < len(fields) else names[i] if i < len(names) else f"output{i}",
                value,
            )
            for i, value in enumerate(result)
        ]
    else:
        items = [(names[0] if names else "output", result)]
    return {
        str(name): value for name, value in items if isinstance(value, (torch.Tensor, np.ndarray))
    }


def datatypes_of(outputs: Mapping[str, torch.Tensor | np.ndarray]) -> dict[str, str]:
    """V2 datatypes of a module's outputs."""
    return {
        name: v2_of_torch(value.dtype) if isinstance(value, torch.Tensor) else "BYTES"
        for name, value in outputs.items()
    }


class BoundTorch:
    """One version: a module over its mapping."""

    def __init__(
        self, module: Callable[..., object], config: ModelConfig, *, positional: bool = False
    ) -> None:
        self._module = module
        self._inputs = config.inputs
        self._names = [spec.name for spec in config.outputs]
        self._positional = positional
        self.datatypes: dict[str, str] = {}

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one batch.  Raises ModelError with what the model raised."""
        arguments = {
            spec.name: inputs[spec.name]
            if spec.datatype == "BYTES"
            else to_tensor(inputs[spec.name], spec.datatype)
            for spec in self._inputs
            if spec.name in inputs
        }
        try:
            with torch.inference_mode():
                ordered = arguments.values() if self._positional else ()
                named = {} if self._positional else arguments
                result = self._module(*ordered, **named)
                outputs = flatten_outputs(result, self._names)
                self.datatypes = datatypes_of(outputs)
                arrays = {
                    name: to_array(value) if isinstance(value, torch.Tensor) else value
                    for name, value in outputs.items()
                }
        except ModelError:
            raise
        except Exception as error:  # the batch boundary: whatever the model's code raises
            raise ModelError(f"{type(error).__name__}: {error}") from error
        if self._names:
            if missing := [name for name in self._names if name not in arrays]:
                raise ModelError(f"the model gave no output {missing}")
            arrays = {name: arrays[name] for name in self._names}
        return arrays


class TorchProgram:
    """One architecture: a skeleton on meta."""

    def __init__(self, header: ImageHeader) -> None:
        self.key = header.program_key
        with _build_lock, torch.device("meta"):
            self._skeleton = build(header.program, "the image")
        self._positional = header.program.get("positional") == "1"

    def bind(self, header: ImageHeader, memory: memoryview) -> BoundTorch:
        """Bind a version's weights.  Raises ImageError."""
        module = binding.bind(self._skeleton, header.tensors, memory)
        return BoundTorch(module, header.config, positional=self._positional)


# --- inputs ---------------------------------------------------------------------------------------
def hugging_face_inputs(module: nn.Module) -> tuple[TensorSpec, ...]:
    """Guess the inputs of a transformers model from its `main_input_name` and its config."""
    main = getattr(module, "main_input_name", "input_ids")
    config: Any = module.config
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        shape = (-1, channels, height, width)
        return (TensorSpec(name=main, datatype="FP32", shape=shape, axes=("batch", *[None] * 3)),)
    if main == "input_values":
        axes = ("batch", "sequence")
        return (TensorSpec(name=main, datatype="FP32", shape=(-1, -1), axes=axes),)
    accepted = inspect.signature(module.forward).parameters
    specs = []
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        if name in accepted:
            specs.append(
                TensorSpec(
                    name=name,
                    datatype="INT64",
                    shape=(-1, -1),
                    axes=("batch", "sequence"),
                    pad=0 if "attention_mask" in accepted else None,
                    optional=name == "token_type_ids",
                )
            )
    return tuple(specs)


def user_inputs(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward."""
    return tuple(inspect.signature(module.forward).parameters)
