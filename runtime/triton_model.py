"""The messages of Triton's public `model_config.proto`, as far as we read them.

Invariants
 1. What is not declared here is an unknown field, which `triton_config` notes: so a field that would
    change answers has to be here, if only to be refused.
 2. A field that the file does not have is as Triton takes it then.

Pure.  Read by `triton_config` with `text_format`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from overcommit.runtime.errors import RepositoryError

_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
DataType = Literal[
    "TYPE_INVALID",
    "TYPE_BOOL",
    "TYPE_UINT8",
    "TYPE_UINT16",
    "TYPE_UINT32",
    "TYPE_UINT64",
    "TYPE_INT8",
    "TYPE_INT16",
    "TYPE_INT32",
    "TYPE_INT64",
    "TYPE_FP16",
    "TYPE_FP32",
    "TYPE_FP64",
    "TYPE_STRING",
    "TYPE_BF16",
]


class Reshape(msgspec.Struct):
    shape: tuple[int, ...] = ()


class Tensor(msgspec.Struct):
    """ModelInput and ModelOutput."""

    name: str = ""
    data_type: DataType = "TYPE_INVALID"
    format: Literal["FORMAT_NONE", "FORMAT_NHWC", "FORMAT_NCHW"] = "FORMAT_NONE"
    dims: tuple[int, ...] = ()
    reshape: Reshape | None = None
    is_shape_tensor: bool = False
    allow_ragged_batch: bool = False
    optional: bool = False
    is_non_linear_format_io: bool = False
    label_filename: str = ""


class Anything(msgspec.Struct):
    """A message of which only that it is there counts."""


class QueuePolicy(msgspec.Struct):
    timeout_action: Literal["REJECT", "DELAY"] = "REJECT"
    default_timeout_microseconds: _Count = 0
    allow_timeout_override: bool = False
    max_queue_size: _Count = 0


class DynamicBatching(msgspec.Struct):
    preferred_batch_size: tuple[int, ...] = ()
    max_queue_delay_microseconds: _Count = 0
    preserve_ordering: bool = False
    priority_levels: _Count = 0
    default_priority_level: _Count = 0
    default_queue_policy: QueuePolicy | None = None
    priority_queue_policy: dict[int, QueuePolicy] = {}


class Latest(msgspec.Struct):
    num_versions: int = 0


class Specific(msgspec.Struct):
    versions: tuple[int, ...] = ()


class VersionPolicy(msgspec.Struct):
    latest: Latest | None = None
    all: Anything | None = None
    specific: Specific | None = None


class InstanceGroup(msgspec.Struct):
    name: str = ""
    kind: Literal["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"] = "KIND_AUTO"
    count: int = 1
    gpus: tuple[int, ...] = ()


class WarmupInput(msgspec.Struct):
    data_type: DataType = "TYPE_INVALID"
    dims: tuple[int, ...] = ()
    zero_data: bool = False
    random_data: bool = False
    input_data_file: str = ""


class Warmup(msgspec.Struct):
    name: str = ""
    batch_size: int = 0
    inputs: dict[str, WarmupInput] = {}
    count: int = 0


class Control(msgspec.Struct):
    kind: Literal[
        "CONTROL_SEQUENCE_START",
        "CONTROL_SEQUENCE_READY",
        "CONTROL_SEQUENCE_END",
        "CONTROL_SEQUENCE_CORRID",
    ] = "CONTROL_SEQUENCE_START"
    int32_false_true: tuple[int, ...] = ()
    fp32_false_true: tuple[float, ...] = ()
    bool_false_true: tuple[bool, ...] = ()
    data_type: DataType = "TYPE_INVALID"


class ControlInput(msgspec.Struct):
    name: str = ""
    control: tuple[Control, ...] = ()


class Direct(msgspec.Struct):
    max_queue_delay_microseconds: _Count = 0
    minimum_slot_utilization: float = 0.0


class Oldest(msgspec.Struct):
    max_candidate_sequences: _Count = 0
    preferred_batch_size: tuple[int, ...] = ()
    max_queue_delay_microseconds: _Count = 0
    preserve_ordering: bool = False


class InitialState(msgspec.Struct):
    data_type: DataType = "TYPE_INVALID"
    dims: tuple[int, ...] = ()
    zero_data: bool = False
    data_file: str = ""
    name: str = ""


class SequenceState(msgspec.Struct):
    input_name: str = ""
    output_name: str = ""
    data_type: DataType = "TYPE_INVALID"
    dims: tuple[int, ...] = ()
    initial_state: tuple[InitialState, ...] = ()
    use_same_buffer_for_input_output: bool = False
    use_growable_memory: bool = False


class Sequence(msgspec.Struct):
    direct: Direct | None = None
    oldest: Oldest | None = None
    max_sequence_idle_microseconds: _Count = 0
    control_input: tuple[ControlInput, ...] = ()
    state: tuple[SequenceState, ...] = ()
    iterative_sequence: bool = False


class Step(msgspec.Struct):
    model_name: str = ""
    model_version: int = -1
    input_map: dict[str, str] = {}
    output_map: dict[str, str] = {}
    model_namespace: str = ""


class Ensemble(msgspec.Struct):
    step: tuple[Step, ...] = ()
    max_inflight_requests: _Count = 0


class Parameter(msgspec.Struct):
    string_value: str = ""


class Transactions(msgspec.Struct):
    decoupled: bool = False


class Cache(msgspec.Struct):
    enable: bool = False


class TritonModel(msgspec.Struct):
    """ModelConfig."""

    name: str = ""
    platform: str = ""
    backend: str = ""
    runtime: str = ""
    version_policy: VersionPolicy | None = None
    max_batch_size: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    input: tuple[Tensor, ...] = ()
    output: tuple[Tensor, ...] = ()
    batch_input: tuple[Anything, ...] = ()
    batch_output: tuple[Anything, ...] = ()
    optimization: Anything | None = None
    dynamic_batching: DynamicBatching | None = None
    sequence_batching: Sequence | None = None
    ensemble_scheduling: Ensemble | None = None
    instance_group: tuple[InstanceGroup, ...] = ()
    default_model_filename: str = ""
    cc_model_filenames: dict[str, str] = {}
    metric_tags: dict[str, str] = {}
    parameters: dict[str, Parameter] = {}
    model_warmup: tuple[Warmup, ...] = ()
    model_operations: Anything | None = None
    model_transaction_policy: Transactions | None = None
    model_repository_agents: Anything | None = None
    response_cache: Cache | None = None
    model_metrics: Anything | None = None


def datatype(name: str, data_type: str) -> str:
    """Return the V2 name of a tensor's type.  Raises RepositoryError where the file gives none."""
    if data_type == "TYPE_INVALID":
        raise RepositoryError(f"config.pbtxt: '{name}' has no data_type")
    return "BYTES" if data_type == "TYPE_STRING" else data_type.removeprefix("TYPE_")
