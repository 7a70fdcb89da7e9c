"""Modules of the installed transformers package, from what a config.json says.

Invariants
 1. Only a PreTrainedModel class of the installed `transformers.models` is built; nothing that the
    model's folder brings is imported or unpickled (no trust_remote_code).
 2. `build` depends on the program alone, never on the folder: a worker has only the image.

Called by the packer (`describe`, `inputs_of`) and by `torch_module`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn

from overcommit.runtime import probes
from overcommit.runtime.config import TensorSpec
from overcommit.runtime.errors import ImageError, RepositoryError

MODELS: Final = "transformers.models."
# Keys of a config.json that change nothing about the module.
_NOISE: Final = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "auto_map"})
_MODEL_TYPE: Final = re.compile(r"[a-z0-9][a-z0-9_\-]*")
_CLASS: Final = re.compile(r"[A-Za-z_]\w*")


def find_class(config: Mapping[str, Any], where: str) -> type[nn.Module]:
    """Find the class that a config.json names.  Raises RepositoryError."""
    model_type = str(config.get("model_type", ""))
    architecture = str((config.get("architectures") or [""])[0])
    if not _MODEL_TYPE.fullmatch(model_type) or not _CLASS.fullmatch(architecture):
        raise RepositoryError(f"{where}: config.json names no model_type or no architectures")
    if config.get("quantization_config"):
        raise RepositoryError(
            f"{where}: quantised checkpoints are not supported; save it in float, or export it"
        )
    try:
        from transformers.models.auto.configuration_auto import model_type_to_module_name

        folder = model_type_to_module_name(model_type)
        module = f"{MODELS}{folder}.modeling_{folder.rpartition('.')[2]}"
        found: Any = getattr(importlib.import_module(module), architecture, None)
    except ImportError as error:
        raise RepositoryError(
            f"{where}: model_type '{model_type}' needs a transformers package that has it "
            f"(pip install 'overcommit[huggingface]'): {error}"
        ) from error
    if not _is_model(found):
        raise RepositoryError(
            f"{where}: the installed transformers has no model '{architecture}' in {module}"
        )
    model: type[nn.Module] = found
    return model


def _is_model(found: object) -> bool:
    from transformers import PreTrainedModel

    return (
        isinstance(found, type)
        and issubclass(found, PreTrainedModel)
        and found.__module__.startswith(MODELS)
    )


def describe(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str
) -> dict[str, str]:
    """Say all that decides about the module.  Raises RepositoryError."""
    cls = find_class(config, where)
    arguments: dict[str, Any] = {}
    # A checkpoint for embeddings has no pooler: with random weights it must not answer.
    if "add_pooling_layer" in inspect.signature(cls.__init__).parameters and not any(
        "pooler." in name for name in tensors
    ):
        arguments["add_pooling_layer"] = False
    clean = {key: value for key, value in config.items() if key not in _NOISE}
    # As `from_pretrained` decides: the configuration, else the first float of the checkpoint.
    named = config.get("dtype") or config.get("torch_dtype")
    first = next((value.dtype for value in tensors.values() if value.is_floating_point()), None)
    clean["dtype"] = str(named or first or "float32").removeprefix("torch.")
    return {
        "kind": "hugging_face",
        "module": cls.__module__,
        "class": cls.__name__,
        "config": json.dumps(clean, sort_keys=True),
        "arguments": json.dumps(arguments, sort_keys=True),
    }


def build(program: Mapping[str, str]) -> nn.Module:
    """Build the module on the current default device and in the current default type."""
    name = program["module"]
    if not name.startswith(MODELS):
        raise ImageError(f"the image names the module '{name}', which is not one of transformers")
    cls: Any = getattr(importlib.import_module(name), program["class"], None)
    if not _is_model(cls):
        raise ImageError(f"the installed transformers has no model '{program['class']}'")
    config = cls.config_class.from_dict(json.loads(program["config"]))
    if getattr(config, "use_cache", None):
        config.use_cache = False  # keys and values for a next token that nobody asks for
    module: nn.Module = cls(config, **json.loads(program["arguments"]))
    return module.eval()


@contextlib.contextmanager
def as_loaded(program: Mapping[str, str], where: str) -> Iterator[None]:
    """In this block `build` makes what `from_pretrained` makes before it fills weights in.

    Changes globals of torch and transformers: for the packer, which has one thread.
    """
    dtype = getattr(torch, json.loads(program["config"])["dtype"], None)
    if dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise RepositoryError(f"{where}: weights of type '{dtype}' are not supported")
    from transformers import initialization

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Random weights that a checkpoint replaces at once take longer than all the rest.
        with initialization.no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def read_by_itself(program: Mapping[str, str], folder: str) -> dict[str, torch.Tensor]:
    """Have transformers read a checkpoint whose names are of an older one: it knows what became of them.

    Only safetensors and config.json of the folder are read.  Raises RepositoryError.
    """
    cls: Any = getattr(importlib.import_module(program["module"]), program["class"])
    try:
        module, info = cls.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=getattr(torch, json.loads(program["config"])["dtype"]),
            **json.loads(program["arguments"]),
        )
    except Exception as error:  # transformers raises anything
        raise RepositoryError(f"transformers cannot read it: {error}") from error
    if info["missing_keys"]:
        raise RepositoryError(f"transformers misses {sorted(info['missing_keys'])[:5]}")
    tensors: dict[str, torch.Tensor] = module.state_dict()
    return tensors


# --- inputs -------------------------------------------------------------------------------------
def inputs_of(module: nn.Module) -> tuple[TensorSpec, ...]:
    """Guess the inputs from the model's `main_input_name` and its configuration."""
    main = getattr(module, "main_input_name", "input_ids")
    config: Any = module.config
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        shape = (-1, channels, height, width)
        return (_fixed(main, shape[1:]),)
    if main == "input_values" and hasattr(config, "num_mel_bins"):
        return (_fixed(main, (config.max_length, config.num_mel_bins)),)
    if main == "input_features" and hasattr(config, "max_source_positions"):
        specs = [_fixed(main, (config.num_mel_bins, 2 * config.max_source_positions))]
        if "decoder_input_ids" in inspect.signature(module.forward).parameters:
            specs.append(_tokens("decoder_input_ids", "decoder_sequence", False))
        return tuple(specs)
    if main == "input_values":
        axes = ("batch", "sequence")
        return (TensorSpec(name=main, datatype="FP32", shape=(-1, -1), axes=axes),)
    accepted = inspect.signature(module.forward).parameters
    is_masked = "attention_mask" in accepted
    specs = [
        _tokens(name, "sequence", is_masked, optional=name == "token_type_ids")
        for name in ("input_ids", "attention_mask", "token_type_ids")
        if name in accepted
    ]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        specs.append(_tokens("decoder_input_ids", "decoder_sequence", False))
    return tuple(specs)


def sizes_of(inputs: tuple[TensorSpec, ...]) -> probes.Sizes:
    """Choose sizes to try: a second of sound has thousands of samples, a text has a few tokens."""
    if any(spec.name == "input_values" and spec.shape == (-1, -1) for spec in inputs):
        return ({"batch": 1, "sequence": 3200}, {"batch": 3, "sequence": 4800})
    return probes.SIZES


def _fixed(name: str, shape: tuple[int, ...]) -> TensorSpec:
    axes = ("batch", *[None] * len(shape))
    return TensorSpec(name=name, datatype="FP32", shape=(-1, *shape), axes=axes)


def _tokens(name: str, axis: str, is_masked: bool, *, optional: bool = False) -> TensorSpec:
    return TensorSpec(
        name=name,
        datatype="INT64",
        shape=(-1, -1),
        axes=("batch", axis),
        pad=0 if is_masked else None,
        optional=optional,
    )
