"""HTTP on the real server: order, limits, odd clients, clear refusals."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import model_rig
import numpy as np
import pytest
from serving import WATCHDOG_S, Server

from overcommit.server.limits import ADMIN_PENDING_MAX

DATATYPES = [*model_rig.DATATYPES, "BYTES"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("models")
    for datatype in DATATYPES:
        model_rig.add_model(root, f"echo-{datatype.lower()}", model_rig.ECHO, {"x": datatype})
    model_rig.add_model(root, "choosy", model_rig.FAULTY, {"x": "FP32"})
    model_rig.add_model(root, "fixed", model_rig.ECHO, {"x": "FP32"}, columns=4)
    flags = ("--allow-code", "--max-body", "1MiB", "--request-timeout", "20")
    with Server(root, cache=tmp_path_factory.mktemp("cache"), flags=flags) as running:
        running.wait_until(
            lambda: all(row["state"] == "READY" for row in running.models().values())
        )
        yield running


def tensor(data: Any, shape: list[int], datatype: str = "FP32", **more: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": datatype, "shape": shape, "data": data, **more}


def infer(server: Server, model: str, *tensors: dict[str, Any], **more: Any) -> Any:
    return server.post(f"/v2/models/{model}/infer", {"inputs": list(tensors), **more})


def raw(server: Server, data: bytes, answers: int = 1) -> list[tuple[int, bytes, bytes]]:
    """Send bytes; read that many responses: (status, head, body)."""
    with socket.create_connection(("127.0.0.1", server.port), WATCHDOG_S) as connection:
        connection.sendall(data)
        return [read_one(connection) for _ in range(answers)]


def read_one(connection: socket.socket) -> tuple[int, bytes, bytes]:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        assert byte, f"closed after {head!r}"
        head += byte
    lines = head.lower().split(b"\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length")), 0
    )
    body = b""
    while len(body) < length:
        part = connection.recv(length - len(body))
        assert part
        body += part
    return int(head.split()[1]), head, body


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def long_request(values: Any) -> bytes:
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "datatype": "FP32",
                    "shape": list(values.shape),
                    "parameters": {"binary_data_size": values.nbytes},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    return post(
        "/v2/models/echo-fp32/infer",
        head + values.tobytes(),
        f"Inference-Header-Content-Length: {len(head)}",
    )


def body_of(value: float, rows: int = 1) -> bytes:
    data = [value] * 2 * rows
    return json.dumps({"inputs": [tensor(data, [rows, 2])], "id": str(value)}).encode()


# --- tensors --------------------------------------------------------------------------------------
VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False, True, True],
    "BYTES": ["a", "", "\u00e9\u4e2d", "long" * 10],
    "FP16": [0.5, -2.0, 0.0, 65504.0],
    "FP32": [0.1, -2.5, 1e30, 0.0],
    "FP64": [0.1, -2.5, 1e300, 0.0],
}


@pytest.mark.parametrize("datatype", [d for d in DATATYPES if d != "BF16"])
def test_json_tensors_come_back_as_they_were_sent(server: Server, datatype: str) -> None:
    values = VALUES.get(datatype, [0, 1, 2, 127])
    answer = infer(server, f"echo-{datatype.lower()}", tensor(values, [2, 2], datatype))
    assert answer.status == 200, answer.body
    output = answer.json()["outputs"][0]
    assert (output["datatype"], output["shape"]) == (datatype, [2, 2])
    if datatype == "FP32":
        assert np.array_equal(np.float32(output["data"]), np.float32(values))
    else:
        assert output["data"] == values


@pytest.mark.parametrize("datatype", DATATYPES)
def test_binary_tensors_come_back_bit_for_bit(server: Server, datatype: str) -> None:
    if datatype == "BYTES":
        blob = b"".join(struct.pack("<I", len(v)) + v for v in (b"\xff\x00", b"", b"x", b"yy"))
    else:
        width = {"BOOL": 1, "BF16": 2}.get(datatype) or int(datatype.lstrip("UINTFP")) // 8
        blob = bytes([1, 0, 1, 1]) if datatype == "BOOL" else bytes(range(1, 1 + 4 * width))
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "datatype": datatype,
                    "shape": [2, 2],
                    "parameters": {"binary_data_size": len(blob)},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    answer = server.request(
        "POST",
        f"/v2/models/echo-{datatype.lower()}/infer",
        head + blob,
        {"Inference-Header-Content-Length": str(len(head))},
    )
    assert answer.status == 200, answer.body
    length = int(answer.headers["inference-header-content-length"])
    output = json.loads(answer.body[:length])["outputs"][0]
    assert output["parameters"]["binary_data_size"] == len(blob)
    assert answer.body[length:] == blob


def test_nested_data_and_whole_floats_are_accepted(server: Server) -> None:
    answer = infer(server, "echo-int32", tensor([[1.0, 2], [3, 4.0]], [2, 2], "INT32"))
    assert answer.json()["outputs"][0]["data"] == [1, 2, 3, 4]


def test_the_id_comes_back_and_only_asked_outputs_are_given(server: Server) -> None:
    answer = infer(server, "echo-fp32", tensor([1, 2], [1, 2]), id="mine", outputs=[{"name": "y"}])
    assert answer.json()["id"] == "mine"
    assert answer.json()["model_version"] == "1"


@pytest.mark.parametrize(
    ("model", "tensors", "words"),
    [
        ("fixed", [], "input 'x' is missing"),
        ("fixed", [tensor([1] * 4, [1, 4]), tensor([1] * 4, [1, 4])], "given twice"),
        ("fixed", [tensor([1] * 4, [1, 4], name="z")], "unknown input 'z'"),
        ("fixed", [tensor([1] * 4, [1, 4], "INT32")], "must be FP32"),
        ("fixed", [tensor([1] * 3, [1, 3])], "must fit [-1, 4]"),
        ("fixed", [tensor([1] * 4, [4])], "must fit [-1, 4]"),
        ("fixed", [tensor([1] * 4, [-1, 4])], "sizes of a request are whole numbers from 0"),
        ("fixed", [tensor([1] * 5, [1, 4])], "has 5 elements"),
        ("fixed", [tensor([1] * 36, [9, 4])], "max_batch_size is 8"),
        ("fixed", [tensor(["a"] * 4, [1, 4])], "does not fit FP32"),
        ("echo-int8", [tensor([300, 1], [1, 2], "INT8")], "300 does not fit INT8"),
        ("echo-uint8", [tensor([-1, 1], [1, 2], "UINT8")], "-1 does not fit UINT8"),
        ("echo-int8", [tensor([1.5, 1], [1, 2], "INT8")], "1.5 is not a whole number"),
        ("echo-bf16", [tensor([1, 1], [1, 2], "BF16")], "binary"),
        ("echo-fp32", [{"name": "x", "datatype": "FP32", "shape": [1, 2]}], "neither data nor"),
    ],
)
def test_a_wrong_request_is_a_400_that_names_the_model_and_the_reason(
    server: Server, model: str, tensors: list[dict[str, Any]], words: str
) -> None:
    answer = infer(server, model, *tensors)
    assert answer.status == 400, answer.body
    assert f"model '{model}'" in answer.json()["error"]
    assert words in answer.json()["error"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"inputs": 3}', b"\xff\xfe", b"[" * 100_000]
)
def test_what_is_not_a_request_is_a_400(server: Server, body: bytes) -> None:
    answer = server.request("POST", "/v2/models/echo-fp32/infer", body)
    assert answer.status == 400
    assert "echo-fp32" in answer.json()["error"]


def test_a_models_own_error_is_a_500_with_its_words_and_spares_its_neighbours(
    server: Server,
) -> None:
    bad = infer(server, "choosy", tensor([1, 1000], [1, 2]))
    assert bad.status == 500
    assert "choosy" in bad.json()["error"]
    assert "too hot" in bad.json()["error"]
    pieces = [post("/v2/models/choosy/infer", body_of(v)) for v in (1.0, 500.0, 2.0)]
    answers = raw(server, b"".join(pieces), 3)
    assert [status for status, _, _ in answers] == [200, 500, 200]


# --- the protocol ---------------------------------------------------------------------------------
def test_pipelined_hot_and_cold_requests_are_answered_in_order(server: Server) -> None:
    path = "/v2/models/echo-fp32/infer"
    get = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    data = b""
    for value in range(8):
        data += post(path, body_of(float(value))) + (get if value % 2 else b"")
    answers = raw(server, data, 12)
    assert [status for status, _, _ in answers] == [200] * 12
    ids = [json.loads(body).get("id", "live") for _, _, body in answers]
    assert ids == [
        "0.0",
        "1.0",
        "live",
        "2.0",
        "3.0",
        "live",
        "4.0",
        "5.0",
        "live",
        "6.0",
        "7.0",
        "live",
    ]


def test_a_request_in_single_bytes_and_chunks_is_understood(server: Server) -> None:
    body = body_of(4.0)
    head = (
        b"POST /v2/models/echo-fp32/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunks = b"".join(b"%x\r\n%c\r\n" % (1, byte) for byte in body) + b"0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), WATCHDOG_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head:
            connection.send(bytes([byte]))
        connection.sendall(chunks)
        status, _, answer = read_one(connection)
    assert (status, json.loads(answer)["id"]) == (200, "4.0")


def test_expect_100_continue_is_answered_before_the_body_comes(server: Server) -> None:
    body = body_of(1.0)
    request = post("/v2/models/echo-fp32/infer", body, "Expect: 100-continue")
    with socket.create_connection(("127.0.0.1", server.port), WATCHDOG_S) as connection:
        connection.sendall(request[: -len(body)])
        assert read_one(connection)[0] == 100
        connection.sendall(body)
        assert read_one(connection)[0] == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_body_is_understood(server: Server, encoding: str) -> None:
    data = gzip.compress(body_of(3.0)) if encoding == "gzip" else zlib.compress(body_of(3.0))
    request = post("/v2/models/echo-fp32/infer", data, f"Content-Encoding: {encoding}")
    assert raw(server, request)[0][0] == 200


def test_a_compressed_bomb_is_refused(server: Server) -> None:
    bomb = gzip.compress(b" " * (8 << 20))
    status, _, body = raw(
        server, post("/v2/models/echo-fp32/infer", bomb, "Content-Encoding: gzip")
    )[0]
    assert status == 413
    assert b"1048576" in body


def test_a_body_over_the_limit_is_refused_before_it_is_read(server: Server) -> None:
    head = b"POST /v2/models/echo-fp32/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n"
    status, answer_head, body = raw(server, head)[0]
    assert status == 413
    assert b"connection: close" in answer_head.lower()
    error = json.loads(body)["error"]
    assert "echo-fp32" in error
    assert "1048576" in error
    assert "--max-body" in error


def test_a_chunked_body_over_the_limit_is_refused(server: Server) -> None:
    head = (
        b"POST /v2/models/echo-fp32/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    assert raw(server, head + chunk * 17)[0][0] == 413


def test_long_questions_that_are_refused_shut_nobody_out(server: Server) -> None:
    body = {"weights": [1e15] * 10_000}  # longer than a datagram, when it is written again
    text = json.dumps(body).replace(str(1e15), "1e15").encode()
    for _ in range(ADMIN_PENDING_MAX + 1):
        answer = server.request("POST", "/v2/overcommit/models/fixed/rollout", text)
        assert answer.status == 400, answer.body
    assert server.get("/v2/overcommit/models/fixed").status == 200


def test_headers_over_the_limit_are_refused(server: Server) -> None:
    filler = "".join(f"X-{number}: {'y' * 1000}\r\n" for number in range(100))
    request = f"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n{filler}\r\n".encode()
    status, _, body = raw(server, request)[0]
    assert status == 431
    assert b"limits" in body


def test_malformed_http_is_a_json_400(server: Server) -> None:
    status, _, body = raw(server, b"NONSENSE\r\n\r\n")[0]
    assert status == 400
    assert "malformed HTTP" in json.loads(body)["error"]


def test_a_client_that_leaves_costs_nothing(server: Server) -> None:
    request = post("/v2/models/choosy/infer", body_of(1.0))
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", server.port), WATCHDOG_S) as connection:
            connection.sendall(request)
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    server.wait_until(lambda: server.status()["front_ends"][0]["blocks_used"] == 0)
    assert infer(server, "choosy", tensor([1, 2], [1, 2])).status == 200


def test_http_10_and_connection_close_are_honoured(server: Server) -> None:
    for request in (
        post("/v2/models/echo-fp32/infer", body_of(1.0)).replace(b"HTTP/1.1", b"HTTP/1.0"),
        post("/v2/models/echo-fp32/infer", body_of(1.0), "Connection: close"),
    ):
        with socket.create_connection(("127.0.0.1", server.port), WATCHDOG_S) as connection:
            connection.sendall(request)
            assert read_one(connection)[0] == 200
            assert connection.recv(1) == b""


def test_a_large_answer_to_a_slow_reader_is_whole_and_only_its_own(server: Server) -> None:
    # The transport keeps reading what it was given; a block that was freed too early would put
    # another client's bytes into this answer.
    blob = np.full((8, 12_000), 7.0, np.float32)
    request = long_request(blob)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.settimeout(WATCHDOG_S)
    slow.connect(("127.0.0.1", server.port))
    slow.sendall(request)
    server.wait_until(lambda: server.status()["front_ends"][0]["in_flight"] == 0)
    for _ in range(20):
        assert raw(server, long_request(blob + 2))[0][0] == 200
    status, answer_head, body = read_one(slow)
    slow.close()
    length = int(answer_head.lower().split(b"inference-header-content-length: ")[1].split()[0])
    assert status == 200
    assert body[length:] == blob.tobytes()


@pytest.mark.parametrize("piece", [37_777, 200_000, 10_000_000])
def test_long_binary_bodies_are_whole_however_they_are_cut(server: Server, piece: int) -> None:
    rng = np.random.default_rng(piece)
    with socket.create_connection(("127.0.0.1", server.port), WATCHDOG_S) as connection:
        for _ in range(3):
            blob = rng.standard_normal((4, 60_000)).astype(np.float32)
            stream = long_request(blob) + post("/v2/models/echo-fp32/infer", body_of(3.0))
            for start in range(0, len(stream), piece):
                connection.sendall(stream[start : start + piece])
            status, _, body = read_one(connection)
            assert (status, body[-blob.nbytes :]) == (200, blob.tobytes())
            status, _, body = read_one(connection)
            assert (status, json.loads(body)["outputs"][0]["data"]) == (200, [3.0, 3.0])


def test_clients_that_leave_in_the_middle_of_long_bodies_cost_nothing(server: Server) -> None:
    request = long_request(np.zeros((4, 60_000), np.float32))
    for cut in (300, 150_000, 700_000):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port), WATCHDOG_S) as connection:
                connection.sendall(request[:cut])
    server.wait_until(lambda: server.status()["front_ends"][0]["blocks_used"] == 0)
    assert raw(server, request)[0][0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/echo-fp32/infer", 405),
        ("GET", "/v2/repository/index", 405),
        ("GET", "/nothing", 404),
        ("GET", "/v2/models/nope", 404),
        ("GET", "/v2/models/nope/ready", 400),
        ("GET", "/v2/models/echo-fp32/versions/7", 404),
        ("GET", "/v2/models/echo-fp32/versions/x", 400),
        ("GET", "/v2/overcommit/models?limit=0", 400),
        ("GET", "/v2/overcommit/models?limit=x", 400),
        ("GET", "/v2/overcommit/models?order=size", 400),
        ("GET", "/v2/overcommit/models?state=LOADING", 400),
        ("GET", "/v2/overcommit/models/nope", 404),
        ("GET", "/metrics?model=nope", 404),
        ("POST", "/v2/repository/index?limit=0", 400),
        ("POST", "/v2/repository/models/nope/load", 404),
    ],
)
def test_every_refusal_is_json(server: Server, method: str, path: str, status: int) -> None:
    answer = server.request(method, path)
    assert answer.status == status
    assert answer.json()["error"]


def test_health_metadata_and_docs(server: Server) -> None:
    assert server.get("/v2/health/live").json() == {"live": True}
    assert server.get("/v2/health/ready").json() == {"ready": True}
    assert server.get("/v2").json()["name"] == "overcommit"
    assert server.get("/docs").status == 200
    metadata = server.get("/v2/models/fixed/versions/1").json()
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert metadata["versions"] == ["1"]
    assert server.get("/v2/models/fixed/ready").status == 200
    page = server.get("/v2/overcommit/models?offset=0&limit=5").json()
    assert len(page["models"]) == 5
    assert page["total"] == len(DATATYPES) + 2
    assert page["states"] == {"READY": page["total"]}
    none = server.get("/v2/overcommit/models?state=UNLOADED").json()
    assert (none["models"], none["total"], none["states"]) == ([], 0, page["states"])


def test_the_pages_of_the_index_are_the_index(server: Server) -> None:
    whole = server.post("/v2/repository/index", {}).json()
    assert len(whole) == len(DATATYPES) + 2
    for ready in (False, True):
        rows: list[Any] = []
        while page := server.post(
            f"/v2/repository/index?offset={len(rows)}&limit=4", {"ready": ready}
        ).json():
            assert len(page) <= 4
            rows += page
        assert rows == [row for row in whole if row["state"] == "READY" or not ready]
