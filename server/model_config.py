"""A version's configuration in the form of Triton's ModelConfig, for HTTP and gRPC.

What is said is what holds here; what Triton's configuration has and this server has not (formats of
images, pinned memory, host policies) has Triton's defaults, because its clients look for the keys.
`dims` are without the batch axis where `max_batch_size` is not 0, as Triton has them.

Pure but for `model_config`, which asks the supervisor.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from overcommit.runtime.accounts import Described
from overcommit.runtime.config import (
    Batching,
    Control,
    ModelConfig,
    Naming,
    Sequence,
    SequenceState,
    TensorSpec,
    Warmup,
    WarmupInput,
    smallest,
)
from overcommit.runtime.sequence_terms import visible_inputs, visible_outputs
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
        "version_policy": _versions(config.naming),
        "max_batch_size": batching.max_batch_size,
        "input": [_input(spec, config, batches) for spec in visible_inputs(config)],
        "output": [_output(spec, batches) for spec in visible_outputs(config)],
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
    if config.sequence is not None:
        shown["sequence_batching"] = _sequence(config.sequence, batching, batches)
    elif batches:
        shown["dynamic_batching"] = {
            "preferred_batch_size": list(batching.preferred_sizes),
            "max_queue_delay_microseconds": batching.max_queue_delay_us,
            "preserve_ordering": False,
            "priority_levels": batching.priority_levels,
            "default_priority_level": batching.default_priority or batching.priority_levels,
            "priority_queue_policy": {
                str(each.level): _policy(
                    each.queue_timeout_us, each.max_queue_size, each.timeout_action
                )
                for each in batching.levels
            },
            "default_queue_policy": _policy(
                batching.queue_timeout_us or 1000 * (config.timeout_ms or 0),
                batching.max_queue_size,
                batching.timeout_action,
            ),
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
        "model_warmup": [_warmup(each) for each in config.warmup],
    }


def _versions(naming: Naming | None) -> Object:
    if naming is not None and naming.latest:
        return {"latest": {"num_versions": naming.latest}}
    if naming is not None and naming.specific:
        return {"specific": {"versions": [int(version) for version in naming.specific]}}
    return {"all": {}}


def _warmup(warmup: Warmup) -> Object:
    return {
        "name": warmup.name,
        "batch_size": warmup.batch_size,
        "inputs": {
            each.name: {
                "data_type": _type(each.datatype),
                "dims": list(each.shape),
                **_data(each),
            }
            for each in warmup.inputs
        },
        "count": warmup.count,
    }


def _data(given: WarmupInput) -> Object:
    if given.data == "file":
        return {"input_data_file": os.path.basename(given.file)}
    return {"random_data": True} if given.data == "random" else {"zero_data": True}


def _policy(timeout_us: int, jobs_max: int, action: str) -> Object:
    return {
        "timeout_action": action.upper(),
        "default_timeout_microseconds": timeout_us,
        "allow_timeout_override": True,
        "max_queue_size": jobs_max,
    }


def _sequence(sequence: Sequence, batching: Batching, batches: bool) -> Object:
    if sequence.strategy == "oldest":
        strategy: Object = {
            "max_candidate_sequences": sequence.candidates,
            "preferred_batch_size": list(batching.preferred_sizes) or [batching.max_batch_size],
            "max_queue_delay_microseconds": batching.max_queue_delay_us,
            "preserve_ordering": False,
        }
    else:
        strategy = {
            "max_queue_delay_microseconds": batching.max_queue_delay_us,
            "minimum_slot_utilization": sequence.utilization,
        }
    return {
        sequence.strategy: strategy,
        "max_sequence_idle_microseconds": sequence.idle_us,
        "control_input": [_control(control) for control in sequence.controls],
        "state": [_state(state, batches) for state in sequence.states],
        "iterative_sequence": False,
    }


def _control(control: Control) -> Object:
    shown: Object = {
        "kind": f"CONTROL_SEQUENCE_{control.kind.upper()}",
        "int32_false_true": [],
        "fp32_false_true": [],
        "bool_false_true": [],
        "data_type": "TYPE_INVALID",
    }
    if control.kind == "corrid":
        shown["data_type"] = _type(control.datatype)
    elif control.datatype == "INT32":
        shown["int32_false_true"] = [int(value) for value in control.values]
    elif control.datatype == "FP32":
        shown["fp32_false_true"] = list(control.values)
    else:
        shown["bool_false_true"] = [bool(value) for value in control.values]
    return {"name": control.name, "control": [shown]}


def _state(state: SequenceState, batches: bool) -> Object:
    row = list(state.shape[1:] if batches else state.shape)
    first: Object = {
        "data_type": _type(state.datatype),
        "dims": list(state.initial or smallest(row)),
        "name": "first",
    }
    if state.file:
        first["data_file"] = os.path.basename(state.file)
    else:
        first["zero_data"] = True
    return {
        "input_name": state.input,
        "output_name": state.output,
        "data_type": _type(state.datatype),
        "dims": row,
        "initial_state": [first],
        "use_same_buffer_for_input_output": False,
        "use_growable_memory": False,
    }


def _type(datatype: str) -> str:
    return _TYPES.get(datatype, f"TYPE_{datatype}")


def _input(spec: TensorSpec, config: ModelConfig, batches: bool) -> Object:
    return {
        "name": spec.name,
        "data_type": _type(spec.datatype),
        "format": "FORMAT_NONE",
        "dims": _dims(spec, batches),
        **_reshape(spec, batches),
        "is_shape_tensor": False,
        "allow_ragged_batch": spec.pad is not None,
        "optional": spec.optional,
        "is_non_linear_format_io": False,
    }


def _output(spec: TensorSpec, batches: bool) -> Object:
    return {
        "name": spec.name,
        "data_type": _type(spec.datatype),
        "dims": _dims(spec, batches),
        **_reshape(spec, batches),
        "label_filename": spec.labels or "",
        "is_shape_tensor": False,
        "is_non_linear_format_io": False,
    }


def _dims(spec: TensorSpec, batches: bool) -> list[int]:
    return list(spec.shape[1:] if batches else spec.shape)


def _reshape(spec: TensorSpec, batches: bool) -> Object:
    if spec.reshape is None:
        return {}
    return {"reshape": {"shape": list(spec.reshape[1:] if batches else spec.reshape)}}


def _text(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
