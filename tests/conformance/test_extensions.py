"""Triton's extensions of the protocol, by its HTTP and by its gRPC client, against the real server."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
import tritonclient.utils.shared_memory as shared_memory
from serving import Server
from tritonclient.utils import InferenceServerException

Client = Any  # both clients have the same methods


@pytest.fixture(scope="module", params=["http", "grpc"])
def triton(request: pytest.FixtureRequest) -> Any:
    return {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]


@pytest.fixture(scope="module")
def client(server: Server, triton: Any) -> Iterator[Client]:
    port = server.port if triton is tritonclient.http else server.grpc_port
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as connected:
        yield connected


def options(triton: Any) -> dict[str, Any]:
    return {"as_json": True} if triton is tritonclient.grpc else {}


def fp32(triton: Any, *rows: list[float]) -> Any:
    array = np.array(rows, np.float32)
    given = triton.InferInput("x", list(array.shape), "FP32")
    given.set_data_from_numpy(array)
    return given


# --- statistics and configuration ---------------------------------------------------------------
def counted(triton: Any, client: Client) -> dict[str, int]:
    found = client.get_inference_statistics("faulty", **options(triton))["model_stats"]
    (row,) = found
    assert (row["name"], row["version"]) == ("faulty", "1")
    stats = row["inference_stats"]
    parts = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    numbers = {name: int(stats.get(name, {}).get("count", 0)) for name in parts}
    numbers["inferences"] = int(row["inference_count"])
    if numbers["success"]:
        assert int(stats["compute_infer"]["ns"]) > 0
        assert int(stats["success"]["ns"]) >= int(stats["compute_infer"]["ns"])
    assert sum(int(batch["batch_size"]) > 0 for batch in row.get("batch_stats", [])) >= 1
    return numbers


def test_statistics_count_what_was_asked(triton: Any, client: Client) -> None:
    client.infer("faulty", [fp32(triton, [1.0])])
    before = counted(triton, client)
    for _ in range(3):
        client.infer("faulty", [fp32(triton, [1.0], [2.0])])
    with pytest.raises(InferenceServerException):
        client.infer("faulty", [fp32(triton, [101.0])])
    after = counted(triton, client)
    grown = {name: after[name] - before[name] for name in after}
    assert (grown["success"], grown["fail"], grown["inferences"]) == (3, 1, 6)
    assert grown["queue"] == grown["compute_infer"] == 3


def test_statistics_of_all_models_and_of_unknown_ones(triton: Any, client: Client) -> None:
    rows = client.get_inference_statistics(**options(triton))["model_stats"]
    assert {"add", "faulty"} <= {row["name"] for row in rows}
    with pytest.raises(InferenceServerException, match="nope"):
        client.get_inference_statistics("nope")


def test_metrics_have_tritons_names_where_they_are_asked_for(
    server: Server, triton: Any, client: Client
) -> None:
    # Names and labels as Triton 2.51 writes them.
    counters = {
        *("nv_inference_request_success", "nv_inference_request_failure", "nv_inference_count"),
        *("nv_inference_exec_count", "nv_inference_request_duration_us"),
        *("nv_inference_queue_duration_us", "nv_inference_compute_input_duration_us"),
        *("nv_inference_compute_infer_duration_us", "nv_inference_compute_output_duration_us"),
    }
    client.infer("faulty", [fp32(triton, [1.0])])
    told = counted(triton, client)
    text = server.get("/metrics?names=triton&model=faulty").body.decode()
    families = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert {name for name, kind in families.items() if kind == "counter"} == counters
    assert families["nv_cpu_memory_total_bytes"] == "gauge"
    labels = 'model="faulty",version="1"'
    rows = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert int(rows[f"nv_inference_request_success{{{labels}}}"]) == told["success"]
    assert int(rows[f"nv_inference_count{{{labels}}}"]) == told["inferences"]
    assert int(rows[f"nv_inference_compute_infer_duration_us{{{labels}}}"]) > 0
    failed = 'nv_inference_request_failure{model="faulty",reason="OTHER",version="1"}'
    assert int(rows[failed]) == told["fail"]
    everything = server.get("/metrics?names=triton").body.decode()
    assert f"nv_inference_exec_count{{{labels}}}" in everything
    assert server.get("/metrics?names=other").status == 400


def test_a_configuration_has_what_load_generators_read(triton: Any, client: Client) -> None:
    config = client.get_model_config("add", **options(triton))
    config = config.get("config", config)
    assert (config["name"], config["max_batch_size"]) == ("add", 8)
    assert [(each["name"], each["data_type"]) for each in config["input"]] == [
        ("a", "TYPE_INT32"),
        ("b", "TYPE_INT32"),
    ]
    assert [int(size) for size in config["input"][0]["dims"]] == [-1]
    assert "dynamic_batching" in config
    with pytest.raises(InferenceServerException, match="unknown model"):
        client.get_model_config("nope")


def test_a_load_that_brings_a_configuration_or_files_is_refused_in_words(
    triton: Any, client: Client
) -> None:
    with pytest.raises(InferenceServerException, match="takes no other configuration or files"):
        client.load_model("loadable", config="{}", files={"file:1/model.pt": b"x"})


# --- ensembles ----------------------------------------------------------------------------------
def test_an_ensemble_is_asked_as_a_model_is(triton: Any, client: Client) -> None:
    result = client.infer("chain", [fp32(triton, [1.0, 2.0])], request_id="seven")
    np.testing.assert_array_equal(result.as_numpy("y"), [[4.0, 8.0]])
    with pytest.raises(InferenceServerException, match="too hot"):
        client.infer("chain", [fp32(triton, [60.0])])


# --- classification -----------------------------------------------------------------------------
def test_the_highest_values_are_named(triton: Any, client: Client) -> None:
    rows = fp32(triton, [0.5, 3.0, -1.0], [7.0, 8.0, 9.0])
    output = triton.InferRequestedOutput("y", class_count=2)
    result = client.infer("faulty", [rows], outputs=[output])
    got = result.as_numpy("y").tolist()
    texts = [
        [bytes(each).decode() if isinstance(each, bytes) else each for each in row] for row in got
    ]
    parsed = [[(float(t.split(":")[0]), int(t.split(":")[1])) for t in row] for row in texts]
    assert parsed == [[(6.0, 1), (1.0, 0)], [(18.0, 2), (16.0, 1)]]


# --- shared memory ------------------------------------------------------------------------------
@pytest.fixture
def region() -> Iterator[Any]:
    name = f"overcommit-{uuid.uuid4().hex[:12]}"
    handle = shared_memory.create_shared_memory_region(name, f"/{name}", 256)
    try:
        yield name, handle
    finally:
        shared_memory.destroy_shared_memory_region(handle)


def test_tensors_are_read_from_and_written_to_shared_memory(
    triton: Any, client: Client, region: Any
) -> None:
    name, handle = region
    client.register_system_shared_memory(name, f"/{name}", 256)
    try:
        status = client.get_system_shared_memory_status(**options(triton))
        assert name in str(status)
        given = triton.InferInput("x", [2, 4], "FP32")
        asked = triton.InferRequestedOutput("y")
        for start in (0.0, 10.0):
            array = np.arange(start, start + 8, dtype=np.float32).reshape(2, 4)
            shared_memory.set_shared_memory_region(handle, [array])
            given.set_shared_memory(name, 32)
            asked.set_shared_memory(name, 32, offset=128)
            result = client.infer("faulty", [given], outputs=[asked])
            back = shared_memory.get_contents_as_numpy(handle, np.float32, [2, 4], offset=128)
            np.testing.assert_array_equal(back, 2 * array)
            output = result.get_output("y")
            shape = output["shape"] if isinstance(output, dict) else output.shape
            assert list(shape) == [2, 4]
            if triton is tritonclient.grpc:
                assert list(result.get_response().raw_output_contents) == [b""]
            else:
                assert "parameters" not in output
    finally:
        client.unregister_system_shared_memory(name)
    with pytest.raises(InferenceServerException, match="Unable to find"):
        client.infer("faulty", [given])
    with pytest.raises(InferenceServerException, match="Unable to find"):
        client.get_system_shared_memory_status(name)


def test_shared_memory_and_raw_tensors_may_be_mixed(
    triton: Any, client: Client, region: Any
) -> None:
    name, handle = region
    shared_memory.set_shared_memory_region(handle, [np.array([[5, 6]], np.int32)])
    client.register_system_shared_memory(name, f"/{name}", 256)
    try:
        for _ in range(2):
            a, b = (triton.InferInput(each, [1, 2], "INT32") for each in ("a", "b"))
            a.set_shared_memory(name, 8)
            b.set_data_from_numpy(np.array([[1, 2]], np.int32))
            outputs = [triton.InferRequestedOutput(each) for each in ("sum", "difference")]
            outputs[0].set_shared_memory(name, 64, offset=64)
            result = client.infer("add", [a, b], outputs=outputs)
            np.testing.assert_array_equal(result.as_numpy("difference"), [[4, 4]])
            back = shared_memory.get_contents_as_numpy(handle, np.int32, [1, 2], offset=64)
            np.testing.assert_array_equal(back, [[6, 8]])
        outputs[0].set_shared_memory(name, 4, offset=64)
        with pytest.raises(InferenceServerException, match="at least 8 bytes"):
            client.infer("add", [a, b], outputs=outputs)
    finally:
        client.unregister_system_shared_memory()
    with pytest.raises(InferenceServerException):
        client.register_system_shared_memory("none", "/no-such-region", 8)


def test_without_a_gpu_there_is_no_cuda_shared_memory(triton: Any, client: Client) -> None:
    client.unregister_cuda_shared_memory()
    assert not client.get_cuda_shared_memory_status(**options(triton))
    with pytest.raises(InferenceServerException):
        client.register_cuda_shared_memory("c", b"x" * 64, 0, 8)


# --- settings -----------------------------------------------------------------------------------
def test_trace_settings_are_kept(triton: Any, client: Client) -> None:
    found = client.get_trace_settings(**options(triton))
    found = found.get("settings", found)
    assert "OFF" in str(found["trace_level"])
    changed = client.update_trace_settings(
        "faulty", settings={"trace_rate": "7"}, **options(triton)
    )
    assert "7" in str(changed.get("settings", changed)["trace_rate"])
    server_wide = client.get_trace_settings(**options(triton))
    assert "1000" in str(server_wide.get("settings", server_wide)["trace_rate"])
    cleared = client.update_trace_settings(
        "faulty", settings={"trace_rate": None}, **options(triton)
    )
    assert "1000" in str(cleared.get("settings", cleared)["trace_rate"])


def test_log_settings_are_read_and_changed(triton: Any, client: Client) -> None:
    before = client.get_log_settings(**options(triton))
    assert "log_info" in str(before)
    client.update_log_settings({"log_verbose_level": 1})
    after = client.get_log_settings(**options(triton))
    after = after.get("settings", after)
    level = after["log_verbose_level"]
    assert int(level["uint32_param"] if isinstance(level, dict) else level) == 1
    client.update_log_settings({"log_verbose_level": 0})
