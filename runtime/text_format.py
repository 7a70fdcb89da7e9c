"""Protocol buffers' text format, as far as configuration files use it, read into msgspec structs.

    name: "resnet"  input [ { name: "x" dims: [ 3, 224, 224 ] } ]  dynamic_batching { }   # comment

What a message may hold is declared once, as a `msgspec.Struct`: a struct is a message, a tuple a repeated
field, a dict a map, a Literal an enum.  A parser of our own, because the supervisor reads these files: no
package to be there, nothing slow to import, and unknown fields are told rather than refused.

Invariants
 1. What `parse` returns has the types of its struct, or RepositoryError names the line or the field.
 2. Unknown fields are skipped whole, and each is named once.
 3. Depth and length are bounded: no input makes it recurse or run on.

Pure.  Source: protobuf.dev/reference/protobuf/textformat-spec.  Called by `triton_config`
and, for what messages may hold, by `triton_json`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, TypeVar

import msgspec
from msgspec import inspect

from overcommit.runtime.errors import RepositoryError

DEPTH_MAX: Final = 32
UNKNOWN_MAX: Final = 64  # names that are told

_TOKEN: Final = re.compile(
    r"(?P<skip>(?:\s+|\#[^\n]*)+)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<number>[+-]?(?:\.?[0-9][0-9A-Za-z_.]*(?:(?<=[eE])[+-][0-9]+)?[fF]?))"
    r"|(?P<text>\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*')"
    r"|(?P<mark>[][{}<>:;,-])",
    re.DOTALL,
)
_ESCAPE: Final = re.compile(
    rb"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL
)
_ESCAPED: Final = dict(zip(b"abfnrtv\\'\"?", b"\a\b\f\n\r\t\v\\'\"?", strict=True))
_INTEGER: Final = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_FLOAT: Final = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[fF]?")
_CLOSING: Final = {"{": "}", "<": ">"}
_BOOLS: Final = {
    **dict.fromkeys(("true", "True", "t", "1"), True),
    **dict.fromkeys(("false", "False", "f", "0"), False),
}

Fields = dict[str, "Field"]
_Token = tuple[str, str, int]  # kind, text, offset
_S = TypeVar("_S", bound=msgspec.Struct)


@dataclass(slots=True, frozen=True)
class Field:
    """What follows a field's name."""

    kind: str  # "message", "text", "integer", "float", "bool" or "enum"
    is_repeated: bool = False
    is_map: bool = False
    message: Message | None = None


@dataclass(slots=True, frozen=True)
class Message:
    """The fields that a message may hold, by name."""

    fields: Fields


@functools.cache
def _message_of(struct: type[msgspec.Struct]) -> Message:
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    return Message({each.encode_name: _field_of(each.type) for each in info.fields})


def _field_of(kind: inspect.Type) -> Field:
    match kind:
        case inspect.UnionType(types=types):
            return _field_of(next(t for t in types if not isinstance(t, inspect.NoneType)))
        case inspect.VarTupleType(item_type=item):
            inner = _field_of(item)
            return Field(inner.kind, is_repeated=True, message=inner.message)
        case inspect.DictType(key_type=key, value_type=value):
            entry = Message({"key": _field_of(key), "value": _field_of(value)})
            return Field("message", is_map=True, message=entry)
        case inspect.StructType(cls=cls):
            return Field("message", message=_message_of(cls))
        case inspect.StrType():
            return Field("text")
        case inspect.IntType():
            return Field("integer")
        case inspect.FloatType():
            return Field("float")
        case inspect.BoolType():
            return Field("bool")
        case inspect.LiteralType():
            return Field("enum")
    raise AssertionError(f"no field of a message: {kind}")


def fields_of(struct: type[msgspec.Struct]) -> Fields:
    """Return the fields that a struct declares."""
    return _message_of(struct).fields


def parse(content: bytes, struct: type[_S], file_name: str) -> tuple[_S, list[str]]:
    """Read a file's content; return the message and the names of unknown fields.

    Raises RepositoryError that names the file, and the line or the field.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise RepositoryError(f"{file_name} is not UTF-8: {error}") from error
    reader = _Reader(text, file_name)
    tree = reader.message(_message_of(struct), "", "", 0)
    try:
        return msgspec.convert(tree, struct), reader.unknown
    except msgspec.ValidationError as error:
        raise RepositoryError(f"{file_name}: {error}".replace("`$.", "`")) from error


@dataclass(slots=True)
class _Reader:
    """Goes over the tokens once."""

    text: str
    file_name: str
    tokens: list[_Token] = field(default_factory=list)
    at: int = 0
    unknown: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        offset, end = 0, len(self.text)
        while offset < end:
            found = _TOKEN.match(self.text, offset)
            if found is None:
                self._fail(offset, f"{self.text[offset : offset + 10]!r} is no token")
            kind = found.lastgroup or ""
            if kind != "skip":
                self.tokens.append((kind, found.group(), offset))
            offset = found.end()
        self.tokens.append(("end", "", end))

    def _fail(self, offset: int, problem: str) -> NoReturn:
        line = self.text.count("\n", 0, offset) + 1
        raise RepositoryError(f"{self.file_name}, line {line}: {problem}")

    def _take(self) -> _Token:
        token = self.tokens[self.at]
        if token[0] != "end":
            self.at += 1
        return token

    def _has(self, *marks: str) -> bool:
        kind, text, _ = self.tokens[self.at]
        if kind == "mark" and text in marks:
            self.at += 1
            return True
        return False

    # --- messages -------------------------------------------------------------------------------
    def message(self, known: Message | None, path: str, closing: str, depth: int) -> Any:
        """Read fields up to the closing mark ("": the end of the file); known None: skip them."""
        if depth > DEPTH_MAX:
            self._fail(self.tokens[self.at][2], f"messages are nested more than {DEPTH_MAX} deep")
        tree: dict[str, Any] = {}
        while True:
            kind, name, offset = self._take()
            if (closing and name == closing and kind == "mark") or (kind == "end" and not closing):
                return tree
            if kind != "name":
                what = f"'{name}'" if name else "the end of the file"
                self._fail(offset, f"a field's name is expected, there is {what}")
            where = f"{path}.{name}" if path else name
            spec = None if known is None else known.fields.get(name)
            if spec is None and known is not None and len(self.unknown) < UNKNOWN_MAX:
                self.unknown.append(where)
            has_colon = self._has(":")
            values = self._values(spec, known is None or spec is None, where, has_colon, depth)
            if spec is not None:
                self._put(tree, name, spec, values, offset)
            self._has(";", ",")

    def _put(
        self, tree: dict[str, Any], name: str, spec: Field, values: list[Any], offset: int
    ) -> None:
        if spec.is_map:
            entries = tree.setdefault(name, {})
            for entry in values:
                assert spec.message is not None, "of key and value"
                none: Any = "" if spec.message.fields["key"].kind == "text" else 0
                entries[entry.get("key", none)] = entry.get("value", {})
        elif spec.is_repeated:
            tree.setdefault(name, []).extend(values)
        elif len(values) != 1 or name in tree:
            self._fail(offset, f"'{name}' can be there once only")
        else:
            tree[name] = values[0]

    def _values(
        self, spec: Field | None, skips: bool, where: str, has_colon: bool, depth: int
    ) -> list[Any]:
        offset = self.tokens[self.at][2]
        if self._has("["):
            if spec is not None and not spec.is_repeated and not spec.is_map:
                self._fail(offset, f"'{where}' is no list")
            values: list[Any] = []
            if self._has("]"):
                return values
            while True:
                values.append(self._value(spec, skips, where, True, depth))
                if self._has("]"):
                    return values
                if not self._has(","):
                    self._fail(self.tokens[self.at][2], f"'{where}': ',' or ']' is expected")
        return [self._value(spec, skips, where, has_colon, depth)]

    def _value(
        self, spec: Field | None, skips: bool, where: str, has_colon: bool, depth: int
    ) -> Any:
        kind, text, offset = self.tokens[self.at]
        is_message = kind == "mark" and text in _CLOSING
        if is_message:
            if spec is not None and spec.kind != "message":
                self._fail(offset, f"'{where}' is no message, but {spec.kind}")
            self.at += 1
            inner = None if skips or spec is None else spec.message
            return self.message(inner, where, _CLOSING[text], depth + 1)
        if not has_colon:
            self._fail(offset, f"'{where}': ':' or '{{' is expected")
        if skips or spec is None:
            self._skip_scalar(where)
            return None
        return self._scalar(spec.kind, where)

    # --- scalars --------------------------------------------------------------------------------
    def _skip_scalar(self, where: str) -> None:
        self._has("-")
        kind, text, offset = self._take()
        if kind not in ("name", "number", "text"):
            self._fail(offset, f"'{where}': a value is expected, there is '{text}'")
        while kind == "text" and self.tokens[self.at][0] == "text":
            self.at += 1

    def _scalar(self, wanted: str, where: str) -> Any:  # noqa: RET503
        sign = "-" if self._has("-") else ""
        kind, text, offset = self._take()
        match wanted:
            case "text" if kind == "text" and not sign:
                parts = [text]
                while self.tokens[self.at][0] == "text":
                    parts.append(self._take()[1])
                return self._unquote(parts, offset)
            case "bool" if text in _BOOLS and kind in ("name", "number") and not sign:
                return _BOOLS[text]
            case "enum" if kind == "name" and not sign:
                return text
            case "integer" if kind == "number" and _INTEGER.fullmatch(text):
                return _integer(sign + text)
            case "float" if kind == "number" and _FLOAT.fullmatch(text):
                return float(sign + text.rstrip("fF"))
            case "float" if text.lower() in ("inf", "infinity", "nan"):
                return float(sign + text)
            case _:
                shown = f"{sign}{text}" or "the end of the file"
                self._fail(offset, f"'{where}': {shown} is no {wanted}")

    def _unquote(self, parts: list[str], offset: int) -> str:
        content = b"".join(part[1:-1].encode() for part in parts)
        try:
            return (
                _ESCAPE.sub(_unescape, content).decode() if b"\\" in content else content.decode()
            )
        except (ValueError, OverflowError) as error:
            self._fail(offset, f"a text with a wrong escape: {error}")


def _integer(text: str) -> int:
    digits = text.lstrip("+-")
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" and len(digits) > 1 else 10
    value = int(digits, base)
    return -value if text[0] == "-" else value


def _unescape(found: re.Match[bytes]) -> bytes:
    octal, hexadecimal, short, long, mark = found.groups()
    if octal is not None:
        return bytes([int(octal, 8)])
    if hexadecimal is not None:
        return bytes([int(hexadecimal, 16)])
    if short is not None or long is not None:
        return chr(int(short or long, 16)).encode()
    if mark[0] not in _ESCAPED:
        raise ValueError(f"\\{mark.decode('utf-8', 'replace')}")
    return bytes([_ESCAPED[mark[0]]])
