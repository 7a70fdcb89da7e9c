"""The numbers of an answer as JSON: whoever reads them as FP32 has the model's own bits."""

from __future__ import annotations

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime import payload
from overcommit.runtime.config import TensorSpec
from overcommit.runtime.front_end_messages import Route
from overcommit.server import codec, inference
from overcommit.server.answer_plans import SHORT_NUMBERS_MIN
from overcommit.server.plans import RoutePlans

BITS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40)


def answer(values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> bytes:
    """The body that a front end makes of an egress block with this output."""
    x = TensorSpec(name="x", datatype="FP32", shape=(-1,), axes=("batch",))
    y = TensorSpec(name="y", datatype="FP32", shape=(-1,))
    route = Route(slot=1, name="m", version="1", state="ready", inputs=(x,), outputs=(y,))
    prepared, _ = inference.prepare(
        RoutePlans(route),
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}',
        None,
    )
    places, nbytes = payload.plan([(0, "FP32", values.nbytes, values.shape)])
    block = bytearray(nbytes)
    payload.encode(memoryview(block), places)
    at = places[0].offset
    block[at : at + values.nbytes] = values.tobytes()
    return b"".join(inference.respond(prepared, memoryview(block)).pieces)


@given(BITS)
def test_every_finite_fp32_comes_back_bit_by_bit_and_others_are_null(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    read = orjson.loads(codec.encode(codec.encode_fp32(memoryview(values.tobytes()))))
    for value, found in zip(values, read, strict=True):
        if np.isfinite(value):
            assert np.float32(found).tobytes() == value.tobytes()
        else:
            assert found is None


@pytest.mark.parametrize("count", [1, SHORT_NUMBERS_MIN - 1, SHORT_NUMBERS_MIN, 12_288])
def test_an_answer_of_any_length_holds_the_models_numbers(count: int) -> None:
    values = np.random.default_rng(1).normal(size=count).astype(np.float32)
    (output,) = orjson.loads(answer(values))["outputs"]
    assert output["shape"] == [count]
    assert np.array_equal(np.array(output["data"], np.float32), values)


def test_long_answers_have_the_digits_that_fp32_needs_and_no_more() -> None:
    body = answer(np.full(SHORT_NUMBERS_MIN, 0.1, np.float32))
    assert b"[0.1,0.1," in body
