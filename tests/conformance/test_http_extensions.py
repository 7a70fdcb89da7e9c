"""Triton's extensions over HTTP, by Triton's own client, on a server with two front ends."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import os
import struct
import uuid
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.utils.shared_memory as shm
from serving import WATCHDOG_S, Server
from tritonclient.utils import InferenceServerException

X = np.array([[1, 3, 2], [9, 8, 7]], np.float32)


@pytest.fixture
def client(extended: Server) -> Iterator[triton.InferenceServerClient]:
    """A new connection: which front end has it is chance."""
    with triton.InferenceServerClient(f"127.0.0.1:{extended.port}", network_timeout=60) as made:
        yield made


@pytest.fixture
def region() -> Iterator[Any]:
    """Shared memory of the client, 4 KiB."""
    key = f"/overcommit-test-{uuid.uuid4().hex}"
    handle = shm.create_shared_memory_region("r", key, 4096)
    yield key, handle
    shm.destroy_shared_memory_region(handle)


def tensor(array: Any = X, name: str = "x", datatype: str = "FP32") -> triton.InferInput:
    given = triton.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array)
    return given


def in_region(name: str, nbytes: int, offset: int = 0) -> triton.InferInput:
    given = triton.InferInput("x", list(X.shape), "FP32")
    given.set_shared_memory(name, nbytes, offset)
    return given


# --- classification -----------------------------------------------------------------------------
@pytest.mark.parametrize("binary", [True, False])
def test_classes_have_value_index_and_label(
    client: triton.InferenceServerClient, binary: bool
) -> None:
    output = triton.InferRequestedOutput("y", binary_data=binary, class_count=2)
    result = client.infer("labelled", [tensor()], outputs=[output])
    classes = result.as_numpy("y").astype(str)
    assert classes.tolist() == [
        ["3.000000:1:dog", "2.000000:2:bird"],
        ["9.000000:0:cat", "8.000000:1:dog"],
    ]
    assert result.get_output("y")["datatype"] == "BYTES"


def test_more_classes_than_there_are_are_all_and_bytes_have_none(
    client: triton.InferenceServerClient,
) -> None:
    output = triton.InferRequestedOutput("y", class_count=9)
    result = client.infer("echo-fp32", [tensor()], outputs=[output])
    assert result.as_numpy("y").shape == (2, 3)
    words = tensor(np.array([[b"a"]], np.object_), datatype="BYTES")
    with pytest.raises(InferenceServerException, match="cannot be classified"):
        client.infer("echo-bytes", [words], outputs=[output])


# --- shared memory ------------------------------------------------------------------------------
def test_tensors_go_both_ways_through_shared_memory_on_every_front_end(
    extended: Server, client: triton.InferenceServerClient, region: Any
) -> None:
    key, handle = region
    shm.set_shared_memory_region(handle, [X], 128)
    client.register_system_shared_memory("both", key, 4096 - 64, 64)
    output = triton.InferRequestedOutput("y")
    for count in range(8):  # each a connection of its own
        output.set_shared_memory("both", X.nbytes, 256 + 32 * count)
        with triton.InferenceServerClient(f"127.0.0.1:{extended.port}") as other:
            result = other.infer("echo-fp32", [in_region("both", X.nbytes, 64)], outputs=[output])
        assert "parameters" not in result.get_output("y")
        got = shm.get_contents_as_numpy(handle, np.float32, [2, 3], 64 + 256 + 32 * count)
        np.testing.assert_array_equal(got, X)
    status = client.get_system_shared_memory_status()
    assert status == [{"name": "both", "key": key, "offset": 64, "byte_size": 4032}]
    client.unregister_system_shared_memory("both")
    for _ in range(8):
        with triton.InferenceServerClient(f"127.0.0.1:{extended.port}") as other:
            assert other.get_system_shared_memory_status() == []
            with pytest.raises(InferenceServerException, match="Unable to find"):
                other.infer("echo-fp32", [in_region("both", X.nbytes)])


def test_a_front_end_that_is_started_later_knows_the_regions(
    extended: Server, client: triton.InferenceServerClient, region: Any
) -> None:
    client.register_system_shared_memory("stays", region[0], 64)
    victims = extended.pids("front_end")
    os.kill(victims[0], 9)
    extended.wait_until(lambda: victims[0] not in extended.pids("front_end"))
    extended.wait_until(lambda: len(extended.pids("front_end")) == len(victims))
    for _ in range(8):
        with triton.InferenceServerClient(f"127.0.0.1:{extended.port}") as other:
            assert [row["name"] for row in other.get_system_shared_memory_status("stays")]
    with triton.InferenceServerClient(f"127.0.0.1:{extended.port}") as other:
        other.unregister_system_shared_memory()


def test_a_region_never_reaches_beyond_itself(
    extended: Server, client: triton.InferenceServerClient, region: Any
) -> None:
    key, handle = region
    before = shm.get_contents_as_numpy(handle, np.uint8, [4096]).copy()
    client.register_system_shared_memory("small", key, 32)
    wrong = triton.InferRequestedOutput("y")
    wrong.set_shared_memory("small", 64)
    with pytest.raises(InferenceServerException, match="Invalid offset"):
        client.infer("echo-fp32", [tensor()], outputs=[wrong])
    wrong.set_shared_memory("small", 8)
    with pytest.raises(InferenceServerException, match="should be at least 24 bytes"):
        client.infer("echo-fp32", [tensor()], outputs=[wrong])
    with pytest.raises(InferenceServerException, match="Invalid offset"):
        client.infer("echo-fp32", [in_region("small", 24, 16)])
    with pytest.raises(InferenceServerException, match="needs 6"):
        client.infer("echo-fp32", [in_region("small", 16)])
    np.testing.assert_array_equal(shm.get_contents_as_numpy(handle, np.uint8, [4096]), before)
    client.unregister_system_shared_memory("small")


def test_a_client_that_shrinks_its_memory_hurts_nobody(
    extended: Server, client: triton.InferenceServerClient
) -> None:
    path = f"/dev/shm/overcommit-test-{uuid.uuid4().hex}"
    with open(path, "wb") as file:
        file.truncate(8192)
    try:
        client.register_system_shared_memory("shrinks", os.path.basename(path), 8192)
        os.truncate(path, 16)
        output = triton.InferRequestedOutput("y")
        output.set_shared_memory("shrinks", 24, 4096)
        with pytest.raises(InferenceServerException, match="shorter"):
            client.infer("echo-fp32", [in_region("shrinks", 24, 4096)])
        with pytest.raises(InferenceServerException, match="shorter"):
            client.infer("echo-fp32", [tensor()], outputs=[output])
        assert os.path.getsize(path) == 16
        assert client.is_server_live()
    finally:
        client.unregister_system_shared_memory("shrinks")
        os.unlink(path)


@pytest.mark.parametrize("key", ["../etc/passwd", "/../../etc/passwd", "..", "", "a/b", "/"])
def test_a_key_is_a_name_in_dev_shm(client: triton.InferenceServerClient, key: str) -> None:
    with pytest.raises(InferenceServerException, match="Unable to open"):
        client.register_system_shared_memory("evil", key, 16)


def test_neither_a_link_nor_a_pipe_is_taken(client: triton.InferenceServerClient) -> None:
    path = f"/dev/shm/overcommit-test-{uuid.uuid4().hex}"
    for make in (lambda: os.symlink("/etc/hostname", path), lambda: os.mkfifo(path)):
        make()
        try:
            with pytest.raises(InferenceServerException, match="Unable to open"):
                client.register_system_shared_memory("evil", os.path.basename(path), 1)
        finally:
            os.unlink(path)


def test_cuda_shared_memory_is_answered_as_without_a_gpu(
    client: triton.InferenceServerClient,
) -> None:
    assert client.get_cuda_shared_memory_status() == []
    client.unregister_cuda_shared_memory()
    client.unregister_cuda_shared_memory("none")
    with pytest.raises(InferenceServerException, match="takes no CUDA shared memory"):
        client.register_cuda_shared_memory("c", base64.b64encode(b"A" * 64), 0, 64)


# --- statistics and configuration ---------------------------------------------------------------
def count_of(client: triton.InferenceServerClient, model: str) -> dict[str, Any]:
    (row,) = client.get_inference_statistics(model)["model_stats"]
    counted: dict[str, Any] = row
    return counted


def test_every_request_is_counted_at_once_whichever_front_end_had_it(
    extended: Server, client: triton.InferenceServerClient
) -> None:
    before = count_of(client, "add")
    a, b = np.array([[5], [6]], np.int32), np.array([[1], [2]], np.int32)
    for _ in range(10):
        with triton.InferenceServerClient(f"127.0.0.1:{extended.port}") as other:
            other.infer("add", [tensor(a, "a", "INT32"), tensor(b, "b", "INT32")])
    after = count_of(client, "add")
    assert after["inference_count"] - before["inference_count"] == 20
    assert after["execution_count"] - before["execution_count"] == 10
    assert after["last_inference"] > 0
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        old, new = before["inference_stats"][name], after["inference_stats"][name]
        assert new["count"] - old["count"] == 10, name
        assert new["ns"] > old["ns"], name
    stats = after["inference_stats"]
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert stats["success"]["ns"] >= sum(stats[name]["ns"] for name in parts)
    (batch,) = [row for row in after["batch_stats"] if row["batch_size"] == 2]
    assert batch["compute_infer"]["count"] >= 10
    assert after["memory_usage"][0]["byte_size"] > 0


def test_what_fails_is_counted_as_failed(client: triton.InferenceServerClient) -> None:
    before = count_of(client, "faulty")["inference_stats"]["fail"]
    with pytest.raises(InferenceServerException, match="too hot"):
        client.infer("faulty", [tensor(X * 1000)])
    after = count_of(client, "faulty")["inference_stats"]["fail"]
    assert after["count"] == before["count"] + 1
    assert after["ns"] > before["ns"]


def test_a_configuration_says_what_load_generators_read(
    client: triton.InferenceServerClient,
) -> None:
    config = client.get_model_config("labelled")
    assert (config["name"], config["max_batch_size"]) == ("labelled", 8)
    (given,), (found,) = config["input"], config["output"]
    assert (given["name"], given["data_type"], given["dims"]) == ("x", "TYPE_FP32", [-1])
    assert (found["name"], found["label_filename"]) == ("y", "labels.txt")
    assert "sequence_batching" not in config
    with pytest.raises(InferenceServerException, match="Request for unknown model"):
        client.get_model_config("nope")


# --- settings -----------------------------------------------------------------------------------
def test_settings_are_read_back_from_every_front_end(
    extended: Server, client: triton.InferenceServerClient
) -> None:
    assert client.update_trace_settings("add", {"trace_rate": "7"})["trace_rate"] == "7"
    assert client.update_log_settings({"log_verbose_level": 1})["log_verbose_level"] == 1
    for _ in range(6):
        with triton.InferenceServerClient(f"127.0.0.1:{extended.port}") as other:
            assert other.get_trace_settings("add")["trace_rate"] == "7"
            assert other.get_trace_settings()["trace_rate"] == "1000"
            assert other.get_log_settings()["log_verbose_level"] == 1
    client.update_trace_settings("add", {"trace_rate": None})
    client.update_log_settings({"log_verbose_level": 0})
    assert client.get_trace_settings("add")["trace_rate"] == "1000"
    with pytest.raises(InferenceServerException, match="writes no trace files"):
        client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]})
    with pytest.raises(InferenceServerException, match="can not be updated"):
        client.update_log_settings({"log_file": "/tmp/x"})


def test_the_metadata_lists_what_is_there(client: triton.InferenceServerClient) -> None:
    extensions = client.get_server_metadata()["extensions"]
    assert {"statistics", "system_shared_memory", "classification", "logging"} <= {*extensions}


def test_what_is_not_offered_says_so(extended: Server) -> None:
    for last in ("generate", "generate_stream"):
        answer = extended.post(f"/v2/models/add/{last}", {"text_input": "a"})
        assert (answer.status, "not offered" in answer.json()["error"]) == (501, True)
    override = {"parameters": {"config": "{}"}}
    assert extended.post("/v2/repository/models/add/load", override).status == 403


# --- compression --------------------------------------------------------------------------------
def raw_infer(server: Server, columns: int, accept: str, binary: bool) -> tuple[Any, bytes]:
    body = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "datatype": "FP32",
                    "shape": [1, columns],
                    "data": [1.5] * columns,
                }
            ],
            "parameters": {"binary_data_output": binary},
        }
    )
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WATCHDOG_S)
    try:
        for _ in range(3):  # from the second on, the head is known
            connection.request(
                "POST", "/v2/models/echo-fp32/infer", body, {"accept-encoding": accept}
            )
            response = connection.getresponse()
            data = response.read()
        return response, data
    finally:
        connection.close()


@pytest.mark.parametrize("accept", ["gzip", "deflate", "gzip, deflate", "gzip;q=0.1, deflate"])
@pytest.mark.parametrize("columns", [2000, 50_000])
def test_a_long_answer_is_compressed_as_the_client_asks(
    extended: Server, accept: str, columns: int
) -> None:
    response, data = raw_infer(extended, columns, accept, binary=True)
    encoding = response.getheader("content-encoding")
    assert encoding == ("deflate" if accept.endswith("deflate") and accept[4:5] != "," else "gzip")
    plain = gzip.decompress(data) if encoding == "gzip" else zlib.decompress(data)
    start = int(response.getheader("inference-header-content-length"))
    assert plain[start:] == struct.pack("<f", 1.5) * columns


def test_a_short_answer_and_an_unasked_one_are_as_they_are(extended: Server) -> None:
    for columns, accept in ((2, "gzip"), (2000, "identity"), (2000, "gzip;q=0, br")):
        response, data = raw_infer(extended, columns, accept, binary=False)
        assert response.getheader("content-encoding") is None
        assert len(json.loads(data)["outputs"][0]["data"]) == columns
