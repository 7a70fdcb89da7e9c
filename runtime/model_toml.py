"""`model.toml`: what a model's folder says about itself.

A version folder's file wins over the model folder's, key by key; tables (`[batching]`,
`[parameters]`) are merged, lists (`[[input]]`) replaced.  Everything may be absent.

Invariants
 1. Every key is known and every value in its range, or `RepositoryError` names the file, the key
    and what is expected.
 2. Nothing of the file is executed or taken as a path here.

Pure but for `read_file` and `read_toml`; called by the repository scan.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from overcommit.runtime.config import (
    BATCH_SIZE_LIMIT,
    BATCH_SIZE_MAX,
    KIB,
    NAME_CHARS_MAX,
    QUEUE_DELAY_US,
    QUEUE_SIZE_MAX,
    RANK_MAX,
    STAY_S_MAX,
    TENSORS_MAX,
    Batching,
    ModelConfig,
    TensorSpec,
)
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.payload import DATATYPES

FILE_NAME: Final = "model.toml"
FILE_BYTES_MAX: Final = 256 * KIB

_DIMENSION_MAX: Final = 2**40
_Name = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
_Dimension = Annotated[int, Meta(ge=-1, le=_DIMENSION_MAX)]
_Shape = Annotated[tuple[_Dimension, ...], Meta(max_length=RANK_MAX)]


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: _Name
    datatype: str
    shape: _Shape
    pad: float | None = None
    optional: bool = False


class _Batching(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_batch_size: Annotated[int, Meta(ge=0, le=BATCH_SIZE_LIMIT)] = BATCH_SIZE_MAX
    max_queue_delay_us: Annotated[int, Meta(ge=0, le=10_000_000)] = QUEUE_DELAY_US
    max_queue_size: Annotated[int, Meta(ge=1, le=1_000_000)] = QUEUE_SIZE_MAX
    across_versions: bool = True


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


def rules() -> str:
    """Name the keys that are known here, and their defaults: what a parsed file depends on."""
    structs = (_File, _Batching, _Tensor, ModelConfig, Batching, TensorSpec)
    return repr([(s.__name__, s.__struct_fields__, s.__struct_defaults__) for s in structs])


def read_file(path: str | Path) -> bytes:
    """Read one file.  Raises RepositoryError when it is too long, OSError when it cannot be read."""
    with open(path, "rb") as file:
        content = file.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise RepositoryError(f"{FILE_NAME} is longer than {FILE_BYTES_MAX} bytes")
    return content


def significant(content: bytes) -> bytes:
    """Leave out the lines that are comments: equal results mean the same, unequal ones maybe too."""
    if b'"""' in content or b"'''" in content:
        return content  # a line in a text over several lines is no comment
    lines = (line.strip() for line in content.split(b"\n"))
    return b"\n".join(line for line in lines if line and not line.startswith(b"#"))


def read_toml(path: Path) -> dict[str, object]:
    """Read one file as plain TOML.  Raises as `read_file` and `parse`."""
    return parse(read_file(path))


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


def to_config(table: dict[str, object]) -> ModelConfig:
    """Check every key and value.

    Raises RepositoryError that names the key.
    """
    _refuse_unknown(table)
    try:
        file = msgspec.convert(table, _File)
    except msgspec.ValidationError as error:
        raise RepositoryError(f"{FILE_NAME}: {error}".replace("`$.", "`")) from error
    batching = file.batching
    return ModelConfig(
        engine=file.engine,
        inputs=_specs("input", file.input),
        outputs=_specs("output", file.output),
        batching=Batching(
            max_batch_size=batching.max_batch_size,
            max_queue_delay_us=batching.max_queue_delay_us,
            max_queue_size=batching.max_queue_size,
            across_versions=batching.across_versions,
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
    )


def _refuse_unknown(table: dict[str, object]) -> None:
    # msgspec finds unknown keys too, but does not say which ones would have been right.
    _check_keys("", table, _File)
    for name, struct in (("batching", _Batching), ("input", _Tensor), ("output", _Tensor)):
        part = table.get(name)
        for row in part if isinstance(part, list) else [part]:
            if isinstance(row, dict):
                _check_keys(f" in [{name}]", row, struct)


def _check_keys(where: str, table: dict[str, object], struct: type[msgspec.Struct]) -> None:
    for key in table:
        if key not in struct.__struct_fields__:
            known = ", ".join(struct.__struct_fields__)
            raise RepositoryError(f"{FILE_NAME}: unknown key '{key}'{where}; known are {known}")


def _specs(kind: str, tensors: tuple[_Tensor, ...]) -> tuple[TensorSpec, ...]:
    names = set()
    specs = []
    for tensor in tensors:
        if tensor.name in names:
            raise RepositoryError(f"{FILE_NAME}: {kind} '{tensor.name}' is there twice")
        names.add(tensor.name)
        if tensor.datatype not in DATATYPES:
            raise RepositoryError(
                f"{FILE_NAME}: {kind} '{tensor.name}' has the unknown datatype "
                f"'{tensor.datatype}'; known are {', '.join(DATATYPES)}"
            )
        specs.append(
            TensorSpec(
                name=tensor.name,
                datatype=tensor.datatype,
                shape=tensor.shape,
                pad=tensor.pad,
                optional=tensor.optional,
            )
        )
    return tuple(specs)
