"""NaN and the infinities in the protocol's JSON: read and written as Triton and Python do."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from front_end_rig import ROUTE
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime import payload
from overcommit.runtime.config import TensorSpec
from overcommit.runtime.errors import BadRequest
from overcommit.server import codec, inference
from overcommit.server.limits import SPECIAL_STRINGS_MAX
from overcommit.server.plans import RoutePlans

NUMPY: dict[str, Any] = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64}
SPECIALS = [math.inf, -math.inf, math.nan]


def plans_of(*datatypes: str) -> RoutePlans:
    """Of a model with an input and an output of these datatypes."""
    pairs = zip("xy", datatypes * 2, strict=False)
    specs = [TensorSpec(name=name, datatype=kind, shape=(-1, -1)) for name, kind in pairs]
    return RoutePlans(
        msgspec.structs.replace(
            ROUTE, inputs=(specs[0],), outputs=(specs[1],), max_batch_size=1 << 20
        )
    )


def body_of(datatype: str, values: Any, shape: tuple[int, ...], **more: Any) -> bytes:
    tensor = {"name": "x", "datatype": datatype, "shape": shape, "data": values}
    return json.dumps({"inputs": [tensor], **more}).encode()


def answered(datatype: str, raw: bytes, count: int) -> list[Any]:
    """The data of an answer with these bytes, as Python's JSON reads it."""
    plans = plans_of("FP32", datatype)
    prepared, _ = inference.prepare(plans, body_of("FP32", [0], (1, 1)), None)
    places, total = payload.plan([(0, datatype, len(raw), (1, count))])
    block = memoryview(bytearray(total))
    payload.encode(block, places)
    block[places[0].offset : places[0].offset + len(raw)] = raw
    answer = inference.respond(prepared, block)
    (output,) = json.loads(b"".join(answer.pieces))["outputs"]
    return output["data"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("datatype", NUMPY)
@pytest.mark.parametrize("count", [4, 100, 5000])  # each is written in another way
def test_an_answer_says_which_number_is_none(datatype: str, count: int) -> None:
    values = np.arange(count).astype(NUMPY[datatype]) / 8
    values[[0, 1, 2, -1]] = [*SPECIALS, -math.inf]
    back = np.array(answered(datatype, values.tobytes(), count), NUMPY[datatype])
    assert back.tobytes() == values.tobytes()


def test_an_answer_in_bf16_says_so_too() -> None:
    raw = np.array([0x7F80, 0xFF80, 0x7FC0, 0x3F80], np.uint16).tobytes()
    assert str(answered("BF16", raw, 4)) == "[inf, -inf, nan, 1.0]"


@given(st.lists(st.floats(width=32), min_size=1, max_size=200))
def test_every_number_comes_back_as_it_was(values: list[float]) -> None:
    array = np.array(values, np.float32)
    body = body_of("FP32", array.tolist(), (1, array.size))
    _, data = inference.prepare(plans_of("FP32"), body, None)
    np.testing.assert_array_equal(np.frombuffer(data[0], np.float32), array)
    back = np.array(answered("FP32", array.tobytes(), array.size), np.float32)
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("datatype", NUMPY)
@pytest.mark.parametrize("nested", [False, True])
def test_a_request_may_hold_them(datatype: str, nested: bool) -> None:
    rows = [[*SPECIALS, 1.5]] * 2
    body = body_of(datatype, rows if nested else rows[0] + rows[1], (2, 4), id='NaN, \\" Infinity')
    plans = plans_of(datatype)
    for _ in range(3):  # also when a template reads such requests
        prepared, data = inference.prepare(plans, body, None)
        assert prepared.id == 'NaN, \\" Infinity'
        expected = np.array(rows, NUMPY[datatype])
        np.testing.assert_array_equal(
            np.frombuffer(data[0], NUMPY[datatype]).reshape(2, 4), expected
        )


def test_texts_that_look_like_them_stay_texts() -> None:
    text = ["NaN", 'a"NaN', "-Infinity\\", "Inf"]
    assert b"".join(
        inference.prepare(plans_of("BYTES"), body_of("BYTES", text, (1, 4)), None)[1]
    ) == codec.join_bytes([each.encode() for each in text])


def test_the_spellings_of_triton_are_read() -> None:
    body = body_of("FP32", [0], (1, 5)).replace(b"[0]", b"[Inf,-Inf, -NaN ,NaN,-Infinity]")
    _, data = inference.prepare(plans_of("FP32"), body, None)
    assert str(np.frombuffer(data[0], np.float32).tolist()) == "[inf, -inf, nan, nan, -inf]"


@pytest.mark.parametrize(
    "text",
    [b"[NaNa]", b"[1NaN]", b"[Infin]", b"[--Infinity]", b"[NaN", b'["x]', b"[nan]", b'["a"]'],
)
def test_what_is_still_no_json_is_refused(text: bytes) -> None:
    body = body_of("FP32", [0], (1, 1)).replace(b"[0]", text)
    with pytest.raises(BadRequest, match="model 'm': "):
        inference.prepare(plans_of("FP32"), body, None)


def test_integers_and_texts_cannot_be_nan() -> None:
    for datatype in ("INT32", "BOOL"):
        with pytest.raises(BadRequest, match="does not fit"):
            inference.prepare(plans_of(datatype), body_of(datatype, [math.nan], (1, 1)), None)
    body = body_of("FP32", [0], (1, 1)).replace(b"[1, 1]", b"[1, NaN]")
    with pytest.raises(BadRequest, match="does not fit the V2 inference protocol"):
        inference.prepare(plans_of("FP32"), body, None)


def test_requests_with_them_and_very_many_texts_are_refused_with_the_remedy() -> None:
    body = body_of("FP32", [math.nan], (1, 1), more=[""] * (SPECIAL_STRINGS_MAX + 1))
    with pytest.raises(BadRequest, match="binary form"):
        inference.prepare(plans_of("FP32"), body, None)
