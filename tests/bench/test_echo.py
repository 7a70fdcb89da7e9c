from __future__ import annotations

import json
from typing import Any

import pytest

from overcommit.bench import cpu, pingpong
from overcommit.bench.dialect import Dialect
from overcommit.bench.echo import EchoPlan, EchoWorkload
from overcommit.bench.processes import read_row

PLAIN = Dialect(kind="json", path="/f", request_key="x", response_key="y", model_header="which")
ID = b"0123456789abcdef"


def workload(dialect: Dialect, **more: Any) -> EchoWorkload:
    scales = {"one": 1.0, "odd": 1 + 3 / 256}
    return EchoWorkload(EchoPlan(dialect=dialect, scales=scales, **more), 1)


def body_of(payload: bytes) -> Any:
    head, _, body = payload.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    return json.loads(body)


def test_v2_asks_one_row_and_takes_the_exact_answer_with_its_id() -> None:
    echo = workload(Dialect())
    request = echo.draw(ID)
    asked = body_of(request.payload)
    assert asked["id"] == ID.decode()
    assert asked["inputs"][0]["shape"] == [1, 16]
    scale = {"one": 1.0, "odd": 1 + 3 / 256}[request.target]
    data = [value * scale for value in asked["inputs"][0]["data"]]
    answer = {"id": ID.decode(), "model_name": "m", "outputs": [{"name": "y", "data": data}]}
    assert echo.judge(request, {}, json.dumps(answer).encode()) is None
    answer["id"] = "another"
    assert "id" in str(echo.judge(request, {}, json.dumps(answer).encode()))


def test_plain_json_names_the_model_in_its_header() -> None:
    echo = workload(PLAIN)
    request = echo.draw(ID)
    assert request.payload.startswith(b"POST /f HTTP/1.1\r\n")
    assert f"which: {request.target}\r\n".encode() in request.payload
    assert ID not in request.payload
    scale = {"one": 1.0, "odd": 1 + 3 / 256}[request.target]
    row = [value * scale for value in body_of(request.payload)["x"]]
    assert echo.judge(request, {}, json.dumps({"y": row}).encode()) is None
    row[5] += 0.125
    assert "instead of" in str(echo.judge(request, {}, json.dumps({"y": row}).encode()))


def test_an_answer_printed_as_the_shortest_fp32_is_right() -> None:
    import numpy as np

    echo = workload(PLAIN)
    for _ in range(40):
        request = echo.draw(ID)
        scale = np.float32({"one": 1.0, "odd": 1 + 3 / 256}[request.target])
        row = np.asarray(body_of(request.payload)["x"], np.float32) * scale
        text = ",".join(np.format_float_positional(value, unique=True, trim="0") for value in row)
        assert echo.judge(request, {}, f'{{"y":[{text}]}}'.encode()) is None


@pytest.mark.parametrize("body", [b"", b"{}", b'{"y":"no"}', b'{"y":[]}', b'{"y":[1,2]}'])
def test_what_is_no_answer_is_wrong(body: bytes) -> None:
    echo = workload(PLAIN)
    assert echo.judge(echo.draw(ID), {}, body) is not None


def test_a_zipf_law_prefers_some_models_and_exponent_0_none() -> None:
    for exponent, low, high in ((0.0, 350, 650), (3.0, 0, 200)):
        echo = workload(PLAIN, exponent=exponent)
        drawn = [echo.draw(ID).target for _ in range(1000)]
        assert low <= min(drawn.count("one"), drawn.count("odd")) <= high


@pytest.mark.slow
def test_ping_pong_goes_there_and_back() -> None:
    assert pingpong.measure(2, 0.2) > 10


def test_cpu_time_of_this_process_grows() -> None:
    import os

    row = read_row(os.getpid())
    assert row is not None
    before = cpu.seconds_of([row])
    assert before > 0
    while cpu.seconds_of([row]) == before:
        sum(range(10_000))
