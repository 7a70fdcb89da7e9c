"""A version's configuration in the form of Triton's ModelConfig, for HTTP and gRPC.

What is said is what holds here; what Triton's configuration has and this server has not (formats of
images, pinned memory, host policies) has Triton's defaults, because its clients look for the keys.
`dims` are without the batch axis where `max_batch_size` is not 0, as Triton has them.

Pure but for `model_config`, which asks the supervisor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from overcommit.runtime.accounts import Described
from overcommit.runtime.config import ModelConfig, TensorSpec
from overcommit.server.questions import ask_typed

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd

Object = dict[str, Any]

_TYPES: Final = {"BYTES": "TYPE_STRING"}
_FILES: Final = {"torch": "model.safetensors", "torch_export": "model.pt2"}


async def model_config(front: FrontEnd, name: str, version: str = "") -> Object:
    """Return the JSON form of Triton's ModelConfig.  Raises as the routing table does."""
    await front.wait_for_route(name, version or None)
    described = await ask_typed(front, Described, "config", name=name, version=version)
    return describe(described)


def describe(described: Described) -> Object:
    """Show one version's configuration."""
    config = described.config
    batching = config.batching
    batches = batching.max_batch_size > 0
    shown: Object = {
        "name": described.name,
        "platform": "",
        "backend": described.engine,
        "runtime": "",
        "version_policy": {"all": {}},
        "max_batch_size": batching.max_batch_size,
        "input": [_input(spec, config, batches) for spec in config.inputs],
        "output": [_output(spec, batches) for spec in config.outputs],
        "batch_input": [],
        "batch_output": [],
        "optimization": {
            "priority": "PRIORITY_DEFAULT",
            "input_pinned_memory": {"enable": True},
            "output_pinned_memory": {"enable": True},
            "gather_kernel_buffer_threshold": 0,
            "eager_batching": False,
        },
    }
    if batches:
        shown["dynamic_batching"] = {
            "preferred_batch_size": list(batching.preferred_sizes),
            "max_queue_delay_microseconds": batching.max_queue_delay_us,
            "preserve_ordering": False,
            "priority_levels": batching.priority_levels,
            "default_priority_level": batching.default_priority,
            "priority_queue_policy": {},
            "default_queue_policy": {
                "timeout_action": "REJECT",
                "default_timeout_microseconds": batching.queue_timeout_us
                or 1000 * (config.timeout_ms or 0),
                "allow_timeout_override": True,
                "max_queue_size": batching.max_queue_size,
            },
        }
    return {
        **shown,
        "instance_group": [
            {
                "name": f"{described.name}_0",
                "kind": "KIND_AUTO",
                "count": 1,
                "gpus": [],
                "secondary_devices": [],
                "profile": [],
                "passive": False,
                "host_policy": "",
            }
        ],
        "default_model_filename": _FILES.get(described.engine, ""),
        "cc_model_filenames": {},
        "metric_tags": {},
        "parameters": {
            name: {"string_value": _text(value)} for name, value in config.parameters.items()
        },
        "model_warmup": [],
    }


def _input(spec: TensorSpec, config: ModelConfig, batches: bool) -> Object:
    return {
        "name": spec.name,
        "data_type": _TYPES.get(spec.datatype, f"TYPE_{spec.datatype}"),
        "format": "FORMAT_NONE",
        "dims": _dims(spec, batches),
        "is_shape_tensor": False,
        "allow_ragged_batch": spec.pad is not None,
        "optional": spec.optional,
        "is_non_linear_format_io": False,
    }


def _output(spec: TensorSpec, batches: bool) -> Object:
    return {
        "name": spec.name,
        "data_type": _TYPES.get(spec.datatype, f"TYPE_{spec.datatype}"),
        "dims": _dims(spec, batches),
        "label_filename": spec.labels or "",
        "is_shape_tensor": False,
        "is_non_linear_format_io": False,
    }


def _dims(spec: TensorSpec, batches: bool) -> list[int]:
    return list(spec.shape[1:] if batches else spec.shape)


def _text(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
