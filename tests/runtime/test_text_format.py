"""The text format: what protobuf's own reader takes, ours takes alike."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import msgspec
import pytest
from google.protobuf import json_format, text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.text_format import DEPTH_MAX, parse
from overcommit.runtime.triton_model import TritonModel


class Innermost(msgspec.Struct):
    text: str = ""


class Inner(msgspec.Struct):
    text: str = ""
    inner: Innermost | None = None


class Outer(msgspec.Struct):
    text: str = ""
    count: int = 0
    share: float = 0.0
    flag: bool = False
    kind: Literal["ONE", "TWO"] = "ONE"
    numbers: tuple[int, ...] = ()
    inner: Inner | None = None
    inners: tuple[Inner, ...] = ()
    table: dict[str, Inner] = {}


def read(text: str) -> Outer:
    outer, unknown = parse(text.encode(), Outer, "file")
    assert not unknown
    return outer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Outer()),
        ('text: "a" # b\n', Outer(text="a")),
        ("text: 'a' \"b\"\n'c'", Outer(text="abc")),
        (r'text: "\n\x41\101\u00e9\"\\"', Outer(text='\nAA\u00e9"\\')),
        ("count: -0x10;", Outer(count=-16)),
        ("count: 017,", Outer(count=15)),
        ("share: -1.5e-3f", Outer(share=-0.0015)),
        ("share: - 2", Outer(share=-2.0)),
        ("flag: t kind: TWO", Outer(flag=True, kind="TWO")),
        ("numbers: [1, -2] numbers: 3", Outer(numbers=(1, -2, 3))),
        ("numbers: []", Outer()),
        ("inner { inner: < text: 'x' > }", Outer(inner=Inner(inner=Innermost("x")))),
        ("inners [ { text: 'a' }, {} ] inners {}", Outer(inners=(Inner("a"), Inner(), Inner()))),
        ("table { key: 'a' value { text: 'b' } }", Outer(table={"a": Inner("b")})),
    ],
)
def test_each_way_of_writing_a_value_is_read(text: str, expected: Outer) -> None:
    assert read(text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("text 'a'", "line 1: 'text': ':' or '{' is expected"),
        ("\ntext: 3", "line 2: 'text': 3 is no text"),
        ("count: 1.5", "'count': 1.5 is no integer"),
        ("count: 1 count: 2", "'count' can be there once only"),
        ("count: [1]", "'count' is no list"),
        ("kind: THREE", "Invalid enum value 'THREE'"),
        ("inner { text: 'a'", "line 1: a field's name is expected, there is the end of the file"),
        ("inner: 3", "'inner': 3 is no message"),
        ("text: 'a\n'", "is no token"),
        ("numbers: [1 2]", "',' or ']' is expected"),
        (r"text: '\q'", "wrong escape"),
        ("new {" * (DEPTH_MAX + 2), "nested more than"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(RepositoryError) as raised:
        read(text)
    assert problem in raised.value.message


def test_unknown_fields_are_skipped_whole_and_named() -> None:
    text = "new { a: [1, 'x'] b < c: -3 > } count: 4 inner { newer: ONE }"
    outer, unknown = parse(text.encode(), Outer, "file")
    assert outer == Outer(count=4, inner=Inner())
    assert unknown == ["new", "inner.newer"]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200) | st.text(alphabet='ab:{}[]<>,;"\\-01. \n#', max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(RepositoryError):
        parse(text.encode("utf-8", "surrogatepass"), Outer, "file")


# --- beside protobuf's own ------------------------------------------------------------------------
names = st.text(min_size=1, max_size=8)
tensors = st.fixed_dictionaries(
    {
        "name": names,
        "data_type": st.integers(1, 14),
        "dims": st.lists(st.integers(-1, 99), max_size=3),
    }
)
models = st.fixed_dictionaries(
    {},
    optional={
        "name": names,
        "max_batch_size": st.integers(0, 100),
        "input": st.lists(tensors, max_size=3),
        "output": st.lists(tensors, max_size=3),
        "dynamic_batching": st.fixed_dictionaries(
            {},
            optional={
                "preferred_batch_size": st.lists(st.integers(1, 64), max_size=3),
                "max_queue_delay_microseconds": st.integers(0, 2**60),
                "default_queue_policy": st.fixed_dictionaries(
                    {"timeout_action": st.integers(0, 1), "max_queue_size": st.integers(0, 99)}
                ),
            },
        ),
        "parameters": st.dictionaries(names, st.builds(dict, string_value=names), max_size=3),
        "version_policy": st.sampled_from(
            [{"all": {}}, {"latest": {"num_versions": 2}}, {"specific": {"versions": [1, 5]}}]
        ),
    },
)


@settings(max_examples=150, deadline=None)
@given(models, st.booleans(), st.booleans())
def test_what_protobuf_writes_is_read_as_protobuf_reads_it(
    fields: dict[str, Any], as_one_line: bool, as_utf8: bool
) -> None:
    message = model_config_pb2.ModelConfig()
    json_format.ParseDict(fields, message)
    text = text_format.MessageToString(message, as_one_line=as_one_line, as_utf8=as_utf8)
    ours, unknown = parse(text.encode(), TritonModel, "config.pbtxt")
    assert unknown == []
    built = msgspec.to_builtins(ours)
    theirs = json_format.MessageToDict(message, preserving_proto_field_name=True)
    assert _lean(built) == _lean(theirs)


def _lean(value: Any) -> Any:
    """Leave out defaults, and read the numbers that JSON has as texts."""
    if isinstance(value, dict):
        lean = {key: _lean(each) for key, each in value.items()}
        defaults = ("", 0, None, [], {}, "TYPE_INVALID", "FORMAT_NONE", "REJECT", False)
        return {key: each for key, each in lean.items() if each not in defaults}
    if isinstance(value, list | tuple):
        return [_lean(each) for each in value]
    return (
        int(value)
        if isinstance(value, str) and value.lstrip("-").isascii() and (value.lstrip("-").isdigit())
        else value
    )
