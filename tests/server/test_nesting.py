"""Long JSON: nested data read by its brackets, and what is refused before it is read."""

from __future__ import annotations

import itertools
import json
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from overcommit.runtime.errors import BadRequest
from overcommit.server import binary, codec, nesting
from overcommit.server.limits import LISTS_MAX, PARAMETERS_BYTES_MAX

SHAPES = st.lists(st.integers(0, 3), min_size=2, max_size=4).map(tuple)
SCRAPS = st.sampled_from(["[", "]", ",", " ", "1", "-", "[]", "],[", "[1]", "null", "\n"])


def by_lists(text: bytes, shape: tuple[int, ...]) -> list[float] | None:
    """What the text holds, if it is nested as the shape says."""
    kind: Any = float
    for _ in shape:
        kind = list[kind]
    try:
        values: list[Any] = [msgspec.json.decode(text, type=kind)]
    except msgspec.DecodeError:
        return None
    for size in shape:
        if any(len(each) != size for each in values):
            return None
        values = list(itertools.chain.from_iterable(values))
    return values


def by_brackets(text: bytes, shape: tuple[int, ...]) -> list[float] | None:
    try:
        return msgspec.json.decode(nesting.flatten(text, shape), type=list[float])
    except (BadRequest, msgspec.DecodeError):
        return None


@given(
    SHAPES, st.sampled_from([None, 1]), st.lists(st.tuples(st.integers(0, 99), SCRAPS), max_size=3)
)
@example((2, 1), None, [])
def test_brackets_say_what_lists_would(
    shape: tuple[int, ...], indent: int | None, scraps: list[tuple[int, str]]
) -> None:
    values = np.arange(math.prod(shape), dtype=float).reshape(shape)
    text = json.dumps(values.tolist(), indent=indent)
    for at, scrap in scraps:
        text = text[:at] + scrap + text[at:]
    assert by_brackets(text.encode(), shape) == by_lists(text.encode(), shape)


@pytest.mark.parametrize(
    "text", ["[[1],2[]]", "[[1][2]]", "[[1 2],[]]", "[[1,2]]", "[[1],[2]", "[[1],[]2]"]
)
def test_what_would_be_read_without_its_brackets_is_refused(text: str) -> None:
    assert by_brackets(text.encode(), (2, 1)) is None


def peak_bytes(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_wrong_nesting_is_found_before_a_list_is_made() -> None:
    text = b"[" + b",".join([b"[1.0]"] * 200_000) + b"]"

    def decode() -> None:
        with pytest.raises(BadRequest, match=r"does not have the shape \[1, 200000\]"):
            codec.decode_data(msgspec.Raw(text), "FP32", (1, 200_000))

    assert peak_bytes(decode) < 200_000 * 24  # a list takes 56 bytes before it holds anything


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "INT32", "BOOL", "BYTES"])
def test_many_lists_hold_what_few_do(datatype: str) -> None:
    rows = LISTS_MAX + 1
    values: dict[str, list[Any]] = {"BOOL": [True, False], "BYTES": ["[é", "]"]}
    row = values.get(datatype, [1, 2])
    nested = json.dumps([row] * rows).encode()
    flat = json.dumps(row * rows).encode()
    shape = (rows, 2)
    data = codec.decode_data(msgspec.Raw(nested), datatype, shape)
    assert data == codec.decode_data(msgspec.Raw(flat), datatype, shape)
    with pytest.raises(BadRequest, match="does not have the shape"):
        codec.decode_data(msgspec.Raw(nested), datatype, (2, rows))


def test_many_lists_of_something_else_are_refused_by_its_type() -> None:
    text = json.dumps([["a"]] * (LISTS_MAX + 1)).encode()
    with pytest.raises(BadRequest, match="data does not fit FP32"):
        codec.decode_data(msgspec.Raw(text), "FP32", (LISTS_MAX + 1, 1))


@pytest.mark.parametrize("place", ["request", "input", "output"])
def test_parameters_are_limited(place: str) -> None:
    parameters = {f"k{number}": number for number in range(100_000)}
    request: dict[str, Any] = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}],
        "outputs": [{"name": "y"}],
    }
    of = {"request": request, "input": request["inputs"][0], "output": request["outputs"][0]}[place]
    of["parameters"] = parameters
    with pytest.raises(BadRequest, match=f"the limit is {PARAMETERS_BYTES_MAX}"):
        codec.decode_request(json.dumps(request).encode())
    of["parameters"] = dict(itertools.islice(parameters.items(), 1000))
    request["more"] = "x" * PARAMETERS_BYTES_MAX
    assert codec.decode_request(json.dumps(request).encode()).inputs[0].name == "x"
    request["outputs"] = None
    assert codec.decode_request(json.dumps(request).encode()).outputs is None


@given(st.lists(st.binary(max_size=9), max_size=5), st.integers(0, 60))
def test_bytes_elements_are_counted_as_they_are_split(elements: list[bytes], cut: int) -> None:
    data = binary.join_bytes(elements)
    assert binary.split_bytes(memoryview(data)) == elements
    assert binary.count_bytes_elements(memoryview(data)) == len(elements)
    piece = memoryview(data)[:cut]
    try:
        count = len(binary.split_bytes(piece))
    except BadRequest as error:
        with pytest.raises(BadRequest, match=error.message[:25]):
            binary.count_bytes_elements(piece)
    else:
        assert count == binary.count_bytes_elements(piece)


def test_texts_that_are_fewer_than_the_shape_says_are_refused() -> None:
    with pytest.raises(BadRequest, match=r"2 elements, its shape \[3\] needs 3"):
        codec.decode_data(msgspec.Raw(b'["a","b"]'), "BYTES", (3,))
