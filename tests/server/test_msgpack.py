"""Bodies in MessagePack: the same tensors and the same refusals, without text."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from front_end_rig import Client, Peer, Rig, in_loop

HEAD = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b\r\n"


def tensor(values: np.ndarray[Any, Any], **changes: Any) -> dict[str, Any]:
    fields = {"name": "x", "datatype": "FP32", "shape": values.shape, "data": values.tobytes()}
    return fields | changes


def request(
    value: Any, kind: bytes = b"application/msgpack; charset=x", more: bytes = b""
) -> bytes:
    body = value if isinstance(value, bytes) else msgspec.msgpack.encode(value)
    return HEAD % (kind, len(body), more) + body


def exchange(data: bytes) -> tuple[int, bytes, bytes]:
    """Send one request to a model y = 2x; return status, media type and body."""
    found: list[tuple[int, bytes, bytes]] = []

    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1)
        client = rig.connect()
        client.send(data)
        peer.answer_all()
        found.append(parse(client))
        assert rig.is_empty()

    in_loop(test)
    return found[0]


def parse(client: Client) -> tuple[int, bytes, bytes]:
    head, _, body = client.written.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    fields = dict(line.lower().split(b": ") for line in lines[1:])
    assert int(fields[b"content-length"]) == len(body)
    return int(lines[0].split()[1]), fields[b"content-type"], body


def test_tensors_come_and_go_as_bytes() -> None:
    values = np.array([[1.5, np.nan, -np.inf]], np.float32)
    status, kind, body = exchange(
        request({"id": "ü", "inputs": [tensor(values)], "outputs": [{"name": "y"}], "more": 1})
    )
    assert (status, kind) == (200, b"application/msgpack")
    answer = msgspec.msgpack.decode(body)
    assert {key: answer[key] for key in ("model_name", "model_version", "id")} == {
        "model_name": "m",
        "model_version": "1",
        "id": "ü",
    }
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("y", "FP32", [1, 3])
    np.testing.assert_array_equal(np.frombuffer(output["data"], np.float32), 2 * values[0])


def test_json_and_msgpack_share_a_connection() -> None:
    text = json.dumps({"inputs": [tensor(np.ones((1, 1))) | {"data": [3.0]}]}).encode()

    def test() -> None:
        rig = Rig()
        peer = Peer(rig, 0, 1)
        client = rig.connect()
        for _ in range(2):  # the second time the heads could be known
            for data in (request(text, b"application/json"), request({"inputs": [ONE]})):
                client.transport.written.clear()
                client.send(data)
                peer.answer_all()
                status, kind, body = parse(client)
                assert status == 200
                decode = json.loads if kind == b"application/json" else msgspec.msgpack.decode
                assert decode(body)["outputs"][0]["name"] == "y"
        assert rig.is_empty()

    in_loop(test)


ONE = tensor(np.ones((1, 1), np.float32))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b"\xc1", "not MessagePack"),
        (b"", "not MessagePack"),
        (msgspec.msgpack.encode({"inputs": [ONE]})[:-1], "not MessagePack"),
        ({}, "missing required field `inputs`"),
        ({"inputs": [ONE | {"data": "text"}]}, "Expected `bytes`"),
        ({"inputs": [ONE | {"data": b"123"}]}, "input 'x'"),
        ({"inputs": [ONE | {"datatype": "FP16"}]}, "is FP16, it must be FP32"),
        ({"inputs": [ONE | {"shape": [-1, 1]}]}, "input 'x'"),
        ({"inputs": [ONE | {"name": "z"}]}, "z"),
        ({"inputs": [ONE], "outputs": [{"name": "nope"}]}, "unknown output 'nope'"),
        ({"inputs": [ONE], "parameters": {"timeout": -1}}, "timeout"),
    ],
)
def test_what_does_not_fit_is_refused_in_json(value: Any, says: str) -> None:
    status, kind, body = exchange(request(value))
    assert (status, kind) == (400, b"application/json")
    error = json.loads(body)["error"]
    assert says in error
    assert error.startswith("model 'm': ")


def test_a_json_length_has_no_place_in_front_of_msgpack() -> None:
    data = request({"inputs": [ONE]}, more=b"Inference-Header-Content-Length: 10\r\n")
    status, _, body = exchange(data)
    assert status == 400
    assert b"Inference-Header-Content-Length" in body
