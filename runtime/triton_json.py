"""Triton's model configuration as JSON, as clients send it with a load: protobuf's JSON, read into structs.

Names are taken as the messages have them and in camel case, numbers as texts too (that is how protobuf
writes those of 64 bits), enums by name.

Invariants
 1. What `parse` returns has the types of its struct, or RepositoryError names the field.
 2. Unknown fields are skipped whole, and each is named once.  Keys of maps are never changed.

Pure.  Source: protobuf.dev/programming-guides/json.  Called by `triton_config`.
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar

import msgspec

from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.text_format import UNKNOWN_MAX, Field, Fields, fields_of

_CAPITAL: Final = re.compile(r"(?<=[a-z0-9])([A-Z])")
_S = TypeVar("_S", bound=msgspec.Struct)


def parse(content: bytes, struct: type[_S], title: str) -> tuple[_S, list[str]]:
    """Read a configuration; return the message and the names of unknown fields.

    Raises RepositoryError that names `title` and the field.
    """
    try:
        value = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RepositoryError(f"{title} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise RepositoryError(f"{title} must be a JSON object")
    unknown: list[str] = []
    tree = _message(value, fields_of(struct), "", unknown)
    try:
        return msgspec.convert(tree, struct, strict=False), unknown
    except (msgspec.ValidationError, RecursionError) as error:
        raise RepositoryError(f"{title}: {error}".replace("`$.", "`")) from error


def _message(value: Any, known: Fields, path: str, unknown: list[str]) -> Any:
    if not isinstance(value, dict):
        return value  # of a wrong type: the conversion says so
    tree: dict[str, Any] = {}
    for key, given in value.items():
        name = key if key in known else _CAPITAL.sub(r"_\1", key).lower()
        spec = known.get(name)
        where = f"{path}.{name}" if path else name
        if spec is None:
            if len(unknown) < UNKNOWN_MAX:
                unknown.append(where)
        elif given is not None:  # null: as if it was not there
            tree[name] = _field(given, spec, where, unknown)
    return tree


def _field(given: Any, spec: Field, where: str, unknown: list[str]) -> Any:
    if spec.message is None:
        return given
    if spec.is_map:
        inner = spec.message.fields["value"]
        if not isinstance(given, dict):
            return given
        is_number = spec.message.fields["key"].kind == "integer"
        return {
            int(key) if is_number and key.isdecimal() else key: _field(each, inner, where, unknown)
            for key, each in given.items()
        }
    if spec.is_repeated and isinstance(given, list):
        return [_message(each, spec.message.fields, where, unknown) for each in given]
    return _message(given, spec.message.fields, where, unknown)
