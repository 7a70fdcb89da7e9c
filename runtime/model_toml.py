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

import os
import stat
import tomllib
from pathlib import Path
from typing import Final

import msgspec

from overcommit.runtime import model_keys as keys
from overcommit.runtime import reshape
from overcommit.runtime.config import (
    KIB,
    Batching,
    Control,
    ModelConfig,
    Naming,
    OnnxOptions,
    Picture,
    PythonOptions,
    QueueLevel,
    Sequence,
    SequenceState,
    Step,
    TensorSpec,
    Warmup,
    WarmupInput,
)
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.payload import DATATYPES
from overcommit.runtime.sequence_terms import with_all_tensors

FILE_NAME: Final = "model.toml"
FILE_BYTES_MAX: Final = 256 * KIB


def read_file(path: str | Path) -> bytes:
    """Read one file.

    Raises RepositoryError when it is too long or no file, OSError when it cannot be read.
    """
    # To open a pipe would wait for whoever writes into it, which may be nobody, ever.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RepositoryError(f"{Path(path).name} is no file")
        with open(fd, "rb", closefd=False) as file:
            content = file.read(FILE_BYTES_MAX + 1)
    finally:
        os.close(fd)
    if len(content) > FILE_BYTES_MAX:
        raise RepositoryError(f"{Path(path).name} is longer than {FILE_BYTES_MAX} bytes")
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
        file = msgspec.convert(table, keys.File)
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
            timeout_action=batching.timeout_action,
            priority_levels=batching.priority_levels,
            default_priority=batching.default_priority,
            levels=_to_levels(origin, batching),
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
        adapts=file.adapts,
    )
    try:
        return with_all_tensors(config)
    except RepositoryError as error:
        raise RepositoryError(f"{origin}: {error.message}") from error


def _to_levels(origin: str, batching: keys.Batching) -> tuple[QueueLevel, ...]:
    levels = [each.level for each in batching.levels]
    highest = max((batching.default_priority, *levels), default=0)
    if highest > batching.priority_levels or len(set(levels)) < len(levels):
        raise RepositoryError(
            f"{origin}: [batching] has priority_levels = {batching.priority_levels}: default_priority and "
            f"levels are among these, each level once"
        )
    return tuple(QueueLevel(**msgspec.structs.asdict(each)) for each in batching.levels)


def _to_naming(origin: str, file: keys.File) -> Naming | None:
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
        called=file.called,
    )
    return naming if naming != Naming() else None


def _to_warmup(origin: str, warmup: keys.Warmup) -> Warmup:
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


def _to_sequence(origin: str, sequence: keys.Sequence | None) -> Sequence | None:
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


def _to_step(step: keys.Step) -> Step:
    return Step(
        model=step.model,
        version="" if step.version == "latest" else step.version,
        inputs=step.inputs,
        outputs=step.outputs,
    )


def _refuse_unknown(table: dict[str, object], origin: str) -> None:
    # msgspec finds unknown keys too, but does not say which ones would have been right.
    _check_keys(origin, "", table, keys.File)
    parts: tuple[tuple[str, type[msgspec.Struct]], ...] = (
        *(("batching", keys.Batching), ("input", keys.Tensor), ("output", keys.Tensor)),
        *(("versions", keys.Versions), ("rollout", keys.Rollout), ("warmup", keys.Warmup)),
        *(("sequence", keys.Sequence), ("ensemble", keys.Ensemble)),
        *(("onnx", keys.Onnx), ("python", keys.Python)),
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


def _to_picture(picture: keys.Picture) -> Picture:
    return Picture(mean=picture.mean, std=picture.std, datatype=picture.datatype)


def _specs(origin: str, kind: str, tensors: tuple[keys.Tensor, ...]) -> tuple[TensorSpec, ...]:
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
            picture=None if tensor.picture is None else _to_picture(tensor.picture),
        )
        if (problem := reshape.problem_of(spec) or reshape.picture_problem(spec)) is not None:
            raise RepositoryError(f"{origin}: {kind} {problem}")
        specs.append(spec)
    return tuple(specs)
