"""Triton's raw binary requests: the body is the tensor, the model's configuration says what it is."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from front_end_rig import ROUTE, Peer, Rig, in_loop
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.config import TensorSpec
from overcommit.runtime.errors import BadRequest
from overcommit.runtime.front_end_messages import Route
from overcommit.server import inference
from overcommit.server.limits import BULK_BYTES_MIN
from overcommit.server.plans import RoutePlans

RAW = b"Inference-Header-Content-Length: 0"


def route_of(*shape: int, datatype: str = "FP32", batches: bool = False, inputs: int = 1) -> Route:
    specs = tuple(
        TensorSpec(name=f"x{number}", datatype=datatype, shape=shape) for number in range(inputs)
    )
    return msgspec.structs.replace(ROUTE, inputs=specs, max_batch_size=8 if batches else 0)


def prepared(route: Route, body: bytes) -> tuple[inference.Prepared, list[bytes]]:
    request, data = inference.prepare(RoutePlans(route), body, 0)
    return request, [bytes(each) for each in data]


@given(st.lists(st.integers(1, 4), max_size=3), st.integers(0, 5), st.data())
def test_one_open_dimension_follows_from_the_length(
    fixed: list[int], size: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(fixed)))
    batches = data.draw(st.booleans())
    spec, shape = ([*fixed[:at], each, *fixed[at:]] for each in (-1, size))
    if batches:
        spec, shape = [-1, *spec], [1, *shape]
    body = bytes(4 * math.prod(shape))
    request, tensors = prepared(route_of(*spec, batches=batches), body)
    assert request.plan.places[0].shape == tuple(shape)
    assert tensors == [body]
    assert request.all_binary


def test_the_element_of_a_text_input_is_the_body() -> None:
    for shape, batches in (((1,), False), ((-1, 1), True), ((-1,), True), ((1, 1), False)):
        request, tensors = prepared(
            route_of(*shape, datatype="BYTES", batches=batches), b"h\x00\xff"
        )
        assert request.plan.places[0].shape == tuple(1 for _ in shape)
        assert tensors == [struct.pack("<I", 3) + b"h\x00\xff"]


@pytest.mark.parametrize(
    ("route", "nbytes", "words"),
    [
        (route_of(4, inputs=2), 16, "2 inputs"),
        (route_of(-1, -1), 16, "more than one"),
        (route_of(-1, -1, -1, batches=True), 16, "more than one"),
        (route_of(2, 3), 16, "16 bytes do not fill"),
        (route_of(-1, 3), 16, "16 bytes do not fill"),
        (route_of(-1), 7, "7 bytes do not fill"),
        (route_of(0, -1), 8, "8 bytes do not fill"),
        (route_of(2, datatype="BYTES"), 3, "one element"),
        (route_of(-1, datatype="BYTES"), 3, "one element"),
    ],
)
def test_what_the_configuration_does_not_say_is_refused(
    route: Route, nbytes: int, words: str
) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        prepared(route, bytes(nbytes))
    assert caught.value.message.startswith("model 'm': ")


@pytest.mark.parametrize("count", [3, BULK_BYTES_MIN // 4])
def test_a_raw_request_is_answered_in_binary_however_long_it_is(count: int) -> None:
    values = np.arange(count, dtype=np.float32)
    head = b"POST /v2/models/m/infer HTTP/1.1\r\n%b\r\nContent-Length: %d\r\n\r\n"

    def test() -> None:
        rig = Rig()
        peer, client = Peer(rig, 0, 1), rig.connect()
        for _ in range(3):
            client.transport.written.clear()
            client.send(head % (RAW, values.nbytes) + values.tobytes())
            assert peer.answer_all() == 1
            assert_answer(client.written, 2 * values)
        assert rig.is_empty()

    in_loop(test)


def assert_answer(written: bytes, expected: np.ndarray[Any, Any]) -> None:
    head, _, content = written.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    (length,) = (
        int(line.split(b": ")[1])
        for line in head.split(b"\r\n")
        if line.startswith(b"inference-header-content-length")
    )
    (output,) = json.loads(content[:length])["outputs"]
    assert output["shape"] == [1, expected.size]
    assert output["parameters"] == {"binary_data_size": expected.nbytes}
    assert np.frombuffer(content[length:], np.float32).tolist() == expected.tolist()


def test_a_long_raw_body_is_received_in_place() -> None:
    values = np.arange(BULK_BYTES_MIN // 4, dtype=np.float32)

    def test() -> None:
        rig = Rig()
        peer, client = Peer(rig, 0, 1), rig.connect()
        head = b"POST /v2/models/m/infer HTTP/1.1\r\n%b\r\nContent-Length: %d\r\n\r\n"
        body = values.tobytes()
        client.send(head % (RAW, len(body)) + body[:1000])
        assert client.transport.protocol is not client.protocol
        client.send(body[1000:])
        assert peer.answer_all() == 1
        assert_answer(client.written, 2 * values)
        assert rig.is_empty()

    in_loop(test)
