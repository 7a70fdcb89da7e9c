"""The keys of `model.toml`, and what values they may have.

Invariants
 1. A key that is not here is none; a value that does not fit is refused by msgspec, with its path.
 2. What depends on other keys, or on the model, is `model_toml`'s to check.
 3. `rules` changes with every key and default, here and in `config`: what was read by other rules is
    read again.

Pure.  Called by `model_toml`, and by what keeps configurations.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from overcommit.runtime import config
from overcommit.runtime.config import (
    ALIASES_MAX,
    BATCH_SIZE_LIMIT,
    BATCH_SIZE_MAX,
    NAME_CHARS_MAX,
    PICTURE_CHANNELS_MAX,
    PRIORITY_LEVELS_MAX,
    QUEUE_DELAY_US,
    QUEUE_LEVELS_MAX,
    QUEUE_SIZE_MAX,
    RANK_MAX,
    SEQUENCE_CANDIDATES,
    SEQUENCE_CANDIDATES_MAX,
    SEQUENCE_IDLE_US,
    STAY_S_MAX,
    STEPS_MAX,
    TENSORS_MAX,
    WARMUP_RUNS_MAX,
    WARMUPS_MAX,
)
from overcommit.runtime.model_names import VERSION

_DIMENSION_MAX: Final = 2**40
_Name = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
_Dimension = Annotated[int, Meta(ge=-1, le=_DIMENSION_MAX)]
_Path = Annotated[str, Meta(min_length=1, max_length=1024)]
_Version = Annotated[str, Meta(pattern=f"^{VERSION}$")]
_AnyVersion = Annotated[str, Meta(pattern=f"^(|latest|{VERSION})$")]
_Shape = Annotated[tuple[_Dimension, ...], Meta(max_length=RANK_MAX)]


class Picture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mean: Annotated[tuple[float, ...], Meta(min_length=1, max_length=PICTURE_CHANNELS_MAX)]
    std: Annotated[tuple[float, ...], Meta(min_length=1, max_length=PICTURE_CHANNELS_MAX)]
    datatype: Literal["FP32", "FP16"] = "FP32"


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: _Name
    datatype: str
    shape: _Shape
    pad: float | None = None
    optional: bool = False
    labels: _Path | None = None
    reshape: _Shape | None = None
    picture: Picture | None = None


class Level(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    level: Annotated[int, Meta(ge=1, le=PRIORITY_LEVELS_MAX)]
    max_queue_size: Annotated[int, Meta(ge=1, le=1_000_000)] = QUEUE_SIZE_MAX
    queue_timeout_us: Annotated[int, Meta(ge=0, le=86_400_000_000)] = 0
    timeout_action: Literal["reject", "delay"] = "reject"


class Batching(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_batch_size: Annotated[int, Meta(ge=0, le=BATCH_SIZE_LIMIT)] = BATCH_SIZE_MAX
    max_queue_delay_us: Annotated[int, Meta(ge=0, le=10_000_000)] = QUEUE_DELAY_US
    max_queue_size: Annotated[int, Meta(ge=1, le=1_000_000)] = QUEUE_SIZE_MAX
    across_versions: bool = True
    preferred_sizes: Annotated[tuple[Annotated[int, Meta(ge=1)], ...], Meta(max_length=256)] = ()
    queue_timeout_us: Annotated[int, Meta(ge=0, le=86_400_000_000)] = 0
    timeout_action: Literal["reject", "delay"] = "reject"
    priority_levels: Annotated[int, Meta(ge=0, le=PRIORITY_LEVELS_MAX)] = 0
    default_priority: Annotated[int, Meta(ge=0, le=PRIORITY_LEVELS_MAX)] = 0
    levels: Annotated[tuple[Level, ...], Meta(max_length=QUEUE_LEVELS_MAX)] = ()


class Versions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    all: bool = False
    latest: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    specific: Annotated[tuple[Annotated[int, Meta(ge=1)], ...], Meta(max_length=4096)] | None = None


class Rollout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    weights: Annotated[dict[_Version, Annotated[float, Meta(ge=0, le=100)]], Meta(max_length=64)]


class WarmupInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    datatype: str
    shape: _Shape
    data: Literal["zero", "random", "file"] = "zero"
    file: _Path | None = None


class Warmup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(max_length=NAME_CHARS_MAX)] = ""
    batch_size: Annotated[int, Meta(ge=1, le=BATCH_SIZE_LIMIT)] = 1
    count: Annotated[int, Meta(ge=1, le=WARMUP_RUNS_MAX)] = 1
    inputs: Annotated[dict[_Name, WarmupInput], Meta(max_length=TENSORS_MAX)] = {}


class Control(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Literal["start", "end", "ready", "corrid"]
    name: _Name
    datatype: str
    values: tuple[float, float] = (0, 1)


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    input: _Name
    output: _Name
    datatype: str
    shape: _Shape
    initial: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=RANK_MAX)] = ()
    file: _Path | None = None


class Sequence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    idle_us: Annotated[int, Meta(ge=1, le=86_400_000_000)] = SEQUENCE_IDLE_US
    strategy: Literal["direct", "oldest"] = "direct"
    candidates: Annotated[int, Meta(ge=1, le=SEQUENCE_CANDIDATES_MAX)] = SEQUENCE_CANDIDATES
    utilization: Annotated[float, Meta(ge=0, le=1)] = 0.0
    controls: Annotated[tuple[Control, ...], Meta(max_length=16)] = ()
    states: Annotated[tuple[State, ...], Meta(max_length=TENSORS_MAX)] = ()


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: _Name
    version: _AnyVersion = ""
    inputs: Annotated[dict[_Name, _Name], Meta(max_length=TENSORS_MAX)] = {}
    outputs: Annotated[dict[_Name, _Name], Meta(max_length=TENSORS_MAX)] = {}


class Ensemble(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    step: Annotated[tuple[Step, ...], Meta(min_length=1, max_length=STEPS_MAX)]


class Onnx(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prepack: bool = False
    keep_quantised: bool = False


class Python(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    process: bool = False
    venv: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    engine: _Name | None = None
    pin: bool = False
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    min_resident: Annotated[float, Meta(ge=0, le=STAY_S_MAX)] | None = None
    ttl: Annotated[float, Meta(ge=0, le=STAY_S_MAX)] | None = None
    weight: Annotated[int, Meta(ge=1, le=100)] = 1
    warm_up: bool = True
    timeout_ms: Annotated[int, Meta(ge=1, le=86_400_000)] | None = None
    allow_code: bool = False
    entry: _Name | None = None
    batching: Batching = Batching()
    input: Annotated[tuple[Tensor, ...], Meta(max_length=TENSORS_MAX)] = ()
    output: Annotated[tuple[Tensor, ...], Meta(max_length=TENSORS_MAX)] = ()
    parameters: dict[str, str | int | float | bool] = {}
    versions: Versions = Versions()
    aliases: Annotated[dict[_Name, _AnyVersion], Meta(max_length=ALIASES_MAX)] = {}
    rollout: Rollout | None = None
    warmup: Annotated[tuple[Warmup, ...], Meta(max_length=WARMUPS_MAX)] = ()
    sequence: Sequence | None = None
    ensemble: Ensemble | None = None
    onnx: Onnx | None = None
    python: Python | None = None
    adapts: bool = False
    called: Annotated[str, Meta(max_length=NAME_CHARS_MAX)] = ""


def rules() -> str:
    """Name the keys that are known here, and their defaults: what a parsed file depends on."""
    structs: list[type[msgspec.Struct]] = [File, Batching, Tensor, Versions, Rollout, Warmup]
    structs += [
        WarmupInput,
        Control,
        State,
        Sequence,
        Step,
        Ensemble,
        config.ModelConfig,
        config.Batching,
    ]
    structs += [config.SequenceState, Level, config.QueueLevel]
    structs += [
        config.TensorSpec,
        config.Naming,
        config.Warmup,
        config.WarmupInput,
        config.Control,
        config.Sequence,
        config.Step,
    ]
    structs += [Onnx, Python, config.OnnxOptions, config.PythonOptions, Picture, config.Picture]
    return repr([(s.__name__, s.__struct_fields__, s.__struct_defaults__) for s in structs])
