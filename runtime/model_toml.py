"""`model.toml`: what a model's folder says about itself.

A version folder's file wins over the model folder's, key by key; tables (`[batching]`,
`[parameters]`) are merged, lists (`[[input]]`) replaced.  Everything may be absent.

Invariants
 1. Every key is known and every value in its range, or `RepositoryError` names the file, the key
    and what is expected.
 2. Nothing of the file is executed or taken as a path here.

Pure but for `read_file`; called by the repository scan.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from overcommit.runtime import reshape
from overcommit.runtime.config import (
    ALIASES_MAX,
    BATCH_SIZE_LIMIT,
    BATCH_SIZE_MAX,
    KIB,
    NAME_CHARS_MAX,
    QUEUE_DELAY_US,
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
    Batching,
    Control,
    ModelConfig,
    Naming,
    OnnxOptions,
    PythonOptions,
    Sequence,
    SequenceState,
    Step,
    TensorSpec,
    Warmup,
    WarmupInput,
)
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.model_names import VERSION
from overcommit.runtime.payload import DATATYPES
from overcommit.runtime.sequence_terms import with_all_tensors

FILE_NAME: Final = "model.toml"
FILE_BYTES_MAX: Final = 256 * KIB

_DIMENSION_MAX: Final = 2**40
_Name = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
_Dimension = Annotated[int, Meta(ge=-1, le=_DIMENSION_MAX)]
_Path = Annotated[str, Meta(min_length=1, max_length=1024)]
_Version = Annotated[str, Meta(pattern=f"^{VERSION}$")]
_AnyVersion = Annotated[str, Meta(pattern=f"^(|latest|{VERSION})$")]
_Shape = Annotated[tuple[_Dimension, ...], Meta(max_length=RANK_MAX)]


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: _Name
    datatype: str
    shape: _Shape
    pad: float | None = None
    optional: bool = False
    labels: _Path | None = None
    reshape: _Shape | None = None


class _Batching(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_batch_size: Annotated[int, Meta(ge=0, le=BATCH_SIZE_LIMIT)] = BATCH_SIZE_MAX
    max_queue_delay_us: Annotated[int, Meta(ge=0, le=10_000_000)] = QUEUE_DELAY_US
    max_queue_size: Annotated[int, Meta(ge=1, le=1_000_000)] = QUEUE_SIZE_MAX
    across_versions: bool = True
    preferred_sizes: Annotated[tuple[Annotated[int, Meta(ge=1)], ...], Meta(max_length=256)] = ()
    queue_timeout_us: Annotated[int, Meta(ge=0, le=86_400_000_000)] = 0
    priority_levels: Annotated[int, Meta(ge=0, le=2**32)] = 0
    default_priority: Annotated[int, Meta(ge=0, le=2**32)] = 0


class _Versions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    all: bool = False
    latest: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    specific: Annotated[tuple[Annotated[int, Meta(ge=1)], ...], Meta(max_length=4096)] | None = None


class _Rollout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    weights: Annotated[dict[_Version, Annotated[float, Meta(ge=0, le=100)]], Meta(max_length=64)]


class _WarmupInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    datatype: str
    shape: _Shape
    data: Literal["zero", "random", "file"] = "zero"
    file: _Path | None = None


class _Warmup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(max_length=NAME_CHARS_MAX)] = ""
    batch_size: Annotated[int, Meta(ge=1, le=BATCH_SIZE_LIMIT)] = 1
    count: Annotated[int, Meta(ge=1, le=WARMUP_RUNS_MAX)] = 1
    inputs: Annotated[dict[_Name, _WarmupInput], Meta(max_length=TENSORS_MAX)] = {}


class _Control(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Literal["start", "end", "ready", "corrid"]
    name: _Name
    datatype: str
    values: tuple[float, float] = (0, 1)


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    input: _Name
    output: _Name
    datatype: str
    shape: _Shape
    initial: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=RANK_MAX)] = ()
    file: _Path | None = None


class _Sequence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    idle_us: Annotated[int, Meta(ge=1, le=86_400_000_000)] = SEQUENCE_IDLE_US
    strategy: Literal["direct", "oldest"] = "direct"
    candidates: Annotated[int, Meta(ge=1, le=SEQUENCE_CANDIDATES_MAX)] = SEQUENCE_CANDIDATES
    utilization: Annotated[float, Meta(ge=0, le=1)] = 0.0
    controls: Annotated[tuple[_Control, ...], Meta(max_length=16)] = ()
    states: Annotated[tuple[_State, ...], Meta(max_length=TENSORS_MAX)] = ()


class _Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: _Name
    version: _AnyVersion = ""
    inputs: Annotated[dict[_Name, _Name], Meta(max_length=TENSORS_MAX)] = {}
    outputs: Annotated[dict[_Name, _Name], Meta(max_length=TENSORS_MAX)] = {}


class _Ensemble(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    step: Annotated[tuple[_Step, ...], Meta(min_length=1, max_length=STEPS_MAX)]


class _Onnx(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prepack: bool = False
    keep_quantised: bool = False


class _Python(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    process: bool = False
    venv: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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
    batching: _Batching = _Batching()
    input: Annotated[tuple[_Tensor, ...], Meta(max_length=TENSORS_MAX)] = ()
    output: Annotated[tuple[_Tensor, ...], Meta(max_length=TENSORS_MAX)] = ()
    parameters: dict[str, str | int | float | bool] = {}
    versions: _Versions = _Versions()
    aliases: Annotated[dict[_Name, _AnyVersion], Meta(max_length=ALIASES_MAX)] = {}
    rollout: _Rollout | None = None
    warmup: Annotated[tuple[_Warmup, ...], Meta(max_length=WARMUPS_MAX)] = ()
    sequence: _Sequence | None = None
    ensemble: _Ensemble | None = None
    onnx: _Onnx | None = None
    python: _Python | None = None


def rules() -> str:
    """Name the keys that are known here, and their defaults: what a parsed file depends on."""
    structs: list[type[msgspec.Struct]] = [_File, _Batching, _Tensor, _Versions, _Rollout, _Warmup]
    structs += [_WarmupInput, _Control, _State, _Sequence, _Step, _Ensemble, ModelConfig, Batching]
    structs += [SequenceState]
    structs += [TensorSpec, Naming, Warmup, WarmupInput, Control, Sequence, Step]
    structs += [_Onnx, _Python, OnnxOptions, PythonOptions]
    return repr([(s.__name__, s.__struct_fields__, s.__struct_defaults__) for s in structs])


def read_file(path: str | Path) -> bytes:
    """Read one file.  Raises RepositoryError when it is too long, OSError when it cannot be read."""
    with open(path, "rb") as file:
        content = file.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        name = Path(path).name
        raise RepositoryError(f"{name} is longer than {FILE_BYTES_MAX} bytes")
    return content


def significant(content: bytes) -> bytes:
    """Leave out the lines that are comments: equal results mean the same, unequal ones maybe too."""
    if b'"""' in content or b"'''" in content:
        return content  # a line in a text over several lines is no comment
    lines = (line.strip() for line in content.split(b"\n"))
    return b"\n".join(line for line in lines if line and not line.startswith(b"#"))


def parse(content: bytes) -> dict[str, object]:
    """Read a file's content as plain TOML.  Raises RepositoryError when it is none."""
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RepositoryError(f"{FILE_NAME} is not valid TOML: {error}") from error


def merge(model: dict[str, object], version: dict[str, object]) -> dict[str, object]:
    """Lay a version folder's keys over the model folder's."""
    merged = dict(model)
    for key, value in version.items():
        below = merged.get(key)
        both_tables = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = {**below, **value} if both_tables else value  # type: ignore[dict-item]
    return merged


def to_config(table: dict[str, object], origin: str = FILE_NAME) -> ModelConfig:
    """Check every key and value; `origin`: the files that say it.

    Raises RepositoryError that names the key.
    """
    _refuse_unknown(table, origin)
    try:
        file = msgspec.convert(table, _File)
    except msgspec.ValidationError as error:
        raise RepositoryError(f"{origin}: {error}".replace("`$.", "`")) from error
    batching = file.batching
    config = ModelConfig(
        engine=file.engine,
        inputs=_specs(origin, "input", file.input),
        outputs=_specs(origin, "output", file.output),
        batching=Batching(
            max_batch_size=batching.max_batch_size,
            max_queue_delay_us=batching.max_queue_delay_us,
            max_queue_size=batching.max_queue_size,
            across_versions=batching.across_versions,
            preferred_sizes=batching.preferred_sizes,
            queue_timeout_us=batching.queue_timeout_us,
            priority_levels=batching.priority_levels,
            default_priority=batching.default_priority,
        ),
        pin=file.pin,
        priority=file.priority,
        min_resident_s=file.min_resident,
        ttl_s=file.ttl,
        weight=file.weight,
        warm_up=file.warm_up,
        timeout_ms=file.timeout_ms,
        allow_code=file.allow_code,
        entry=file.entry,
        parameters=file.parameters,
        warmup=tuple(_to_warmup(origin, each) for each in file.warmup),
        sequence=_to_sequence(origin, file.sequence),
        steps=() if file.ensemble is None else tuple(map(_to_step, file.ensemble.step)),
        naming=_to_naming(origin, file),
        onnx=None if file.onnx is None else OnnxOptions(**msgspec.structs.asdict(file.onnx)),
        python=(
            None if file.python is None else PythonOptions(**msgspec.structs.asdict(file.python))
        ),
    )
    try:
        return with_all_tensors(config)
    except RepositoryError as error:
        raise RepositoryError(f"{origin}: {error.message}") from error


def _to_naming(origin: str, file: _File) -> Naming | None:
    versions = file.versions
    if sum((versions.all, versions.latest is not None, versions.specific is not None)) > 1:
        raise RepositoryError(
            f"{origin}: [versions] has all, latest and specific; give one of them"
        )
    weights = {} if file.rollout is None else file.rollout.weights
    if sum(weights.values()) > 100:
        raise RepositoryError(f"{origin}: the weights of [rollout] add up to more than 100 percent")
    naming = Naming(
        latest=versions.latest or 0,
        specific=tuple(map(str, versions.specific or ())),
        aliases={name: "" if v == "latest" else v for name, v in file.aliases.items()},
        weights=weights,
    )
    return naming if naming != Naming() else None


def _to_warmup(origin: str, warmup: _Warmup) -> Warmup:
    inputs = []
    for name, given in warmup.inputs.items():
        _check_datatype(origin, "warmup input", name, given.datatype)
        if (given.data == "file") != (given.file is not None) or min(given.shape, default=0) < 0:
            raise RepositoryError(
                f"{origin}: warmup input '{name}' needs a shape without -1, and a file exactly "
                f'where it says data = "file"'
            )
        inputs.append(
            WarmupInput(
                name=name,
                datatype=given.datatype,
                shape=given.shape,
                data=given.data,
                file=given.file or "",
            )
        )
    return Warmup(
        name=warmup.name, batch_size=warmup.batch_size, count=warmup.count, inputs=tuple(inputs)
    )


def _to_sequence(origin: str, sequence: _Sequence | None) -> Sequence | None:
    if sequence is None:
        return None
    for control in sequence.controls:
        _check_datatype(origin, "control", control.name, control.datatype)
    controls = tuple(
        Control(kind=each.kind, name=each.name, datatype=each.datatype, values=each.values)
        for each in sequence.controls
    )
    for state in sequence.states:
        _check_datatype(origin, "state", state.input, state.datatype)
    return Sequence(
        idle_us=sequence.idle_us,
        strategy=sequence.strategy,
        candidates=sequence.candidates,
        utilization=sequence.utilization,
        controls=controls,
        states=tuple(
            SequenceState(
                input=each.input,
                output=each.output,
                datatype=each.datatype,
                shape=each.shape,
                initial=each.initial,
                file=each.file or "",
            )
            for each in sequence.states
        ),
    )


def _to_step(step: _Step) -> Step:
    return Step(
        model=step.model,
        version="" if step.version == "latest" else step.version,
        inputs=step.inputs,
        outputs=step.outputs,
    )


def _refuse_unknown(table: dict[str, object], origin: str) -> None:
    # msgspec finds unknown keys too, but does not say which ones would have been right.
    _check_keys(origin, "", table, _File)
    parts: tuple[tuple[str, type[msgspec.Struct]], ...] = (
        *(("batching", _Batching), ("input", _Tensor), ("output", _Tensor)),
        *(("versions", _Versions), ("rollout", _Rollout), ("warmup", _Warmup)),
        *(("sequence", _Sequence), ("ensemble", _Ensemble)),
        *(("onnx", _Onnx), ("python", _Python)),
    )
    for name, struct in parts:
        part = table.get(name)
        for row in part if isinstance(part, list) else [part]:
            if isinstance(row, dict):
                _check_keys(origin, f" in [{name}]", row, struct)


def _check_keys(
    origin: str, where: str, table: dict[str, object], struct: type[msgspec.Struct]
) -> None:
    for key in table:
        if key not in struct.__struct_fields__:
            known = ", ".join(struct.__struct_fields__)
            raise RepositoryError(f"{origin}: unknown key '{key}'{where}; known are {known}")


def _check_datatype(origin: str, kind: str, name: str, datatype: str) -> None:
    if datatype not in DATATYPES:
        raise RepositoryError(
            f"{origin}: {kind} '{name}' has the unknown datatype '{datatype}'; known are "
            f"{', '.join(DATATYPES)}"
        )


def _specs(origin: str, kind: str, tensors: tuple[_Tensor, ...]) -> tuple[TensorSpec, ...]:
    names = set()
    specs = []
    for tensor in tensors:
        if tensor.name in names:
            raise RepositoryError(f"{origin}: {kind} '{tensor.name}' is there twice")
        names.add(tensor.name)
        _check_datatype(origin, kind, tensor.name, tensor.datatype)
        spec = TensorSpec(
            name=tensor.name,
            datatype=tensor.datatype,
            shape=tensor.shape,
            pad=tensor.pad,
            optional=tensor.optional,
            labels=tensor.labels,
            reshape=tensor.reshape,
        )
        if (problem := reshape.problem_of(spec)) is not None:
            raise RepositoryError(f"{origin}: {kind} {problem}")
        specs.append(spec)
    return tuple(specs)
