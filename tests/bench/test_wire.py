"""Requests and answers as bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from overcommit.bench.wire import decode, infer_template

INPUTS = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.array([[1, 1, 0]])}
ID = b"0123456789abcdef"


def test_a_json_request_is_one_that_any_v2_server_reads() -> None:
    whole = infer_template("m", INPUTS, "y", binary=False).render(ID)
    head, _, body = whole.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v2/models/m/infer HTTP/1.1\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    content = json.loads(body)
    assert content["id"] == ID.decode()
    assert content["inputs"][0]["data"] == [1, 2, 3]
    assert content["inputs"][1]["shape"] == [1, 3]


def test_a_binary_request_carries_its_tensors_behind_the_json() -> None:
    whole = infer_template("m", INPUTS, "y", binary=True).render(ID)
    head, _, body = whole.partition(b"\r\n\r\n")
    headers = dict(line.split(b": ") for line in head.split(b"\r\n")[1:])
    assert int(headers[b"Content-Length"]) == len(body)
    text = int(headers[b"Inference-Header-Content-Length"])
    content = json.loads(body[:text])
    assert content["id"] == ID.decode()
    assert content["parameters"] == {"binary_data_output": True}
    assert body[text:] == INPUTS["input_ids"].tobytes() + INPUTS["attention_mask"].tobytes()


def test_binary_and_json_answers_decode_to_the_same() -> None:
    array = np.array([[1.5, -2.0]], np.float32)
    output = {"name": "y", "datatype": "FP32", "shape": [1, 2]}
    plain = json.dumps({"id": "7", "outputs": [{**output, "data": [1.5, -2.0]}]}).encode()
    marked = {**output, "parameters": {"binary_data_size": 8}}
    text = json.dumps({"id": "7", "outputs": [marked]}).encode()
    header = {b"inference-header-content-length": str(len(text)).encode()}
    for answer in (decode({}, plain), decode(header, text + array.tobytes())):
        assert answer.id == "7"
        np.testing.assert_array_equal(answer.outputs["y"], array)


def test_bytes_that_belong_to_no_output_are_refused() -> None:
    text = b'{"outputs": []}'
    header = {b"inference-header-content-length": str(len(text)).encode()}
    with pytest.raises(ValueError, match="4 bytes"):
        decode(header, text + b"rest")
