"""Triton's HTTP client, sync and aio, against the real server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from model_rig import DATATYPES, NUMPY, sample
from serving import Server
from tritonclient.utils import InferenceServerException

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    url = f"127.0.0.1:{server.port}"
    with triton.InferenceServerClient(url, concurrency=4, network_timeout=60) as connected:
        yield connected


def tensor(name: str, array: Array, datatype: str, *, binary: bool = True) -> triton.InferInput:
    given = triton.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def fp32(*rows: list[float], name: str = "x", binary: bool = True) -> triton.InferInput:
    return tensor(name, np.array(rows, np.float32), "FP32", binary=binary)


def add_inputs() -> list[triton.InferInput]:
    a, b = np.array([[5, 6]], np.int32), np.array([[1, 2]], np.int32)
    return [tensor("a", a, "INT32"), tensor("b", b, "INT32", binary=False)]


@pytest.mark.parametrize("datatype", [*DATATYPES, "BYTES"])
def test_a_tensor_of_each_datatype_comes_back_as_it_was(
    client: triton.InferenceServerClient, datatype: str
) -> None:
    array = sample(datatype)
    output = triton.InferRequestedOutput("y", binary_data=True)
    model = f"echo-{datatype.lower()}"
    result = client.infer(model, [tensor("x", array, datatype)], outputs=[output])
    assert result.get_output("y")["datatype"] == datatype
    np.testing.assert_array_equal(result.as_numpy("y"), array)
    assert NUMPY[datatype] == result.as_numpy("y").dtype


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_json_and_binary_may_be_mixed(
    client: triton.InferenceServerClient, binary_in: bool, binary_out: bool
) -> None:
    outputs = [
        triton.InferRequestedOutput("sum", binary_data=binary_out),
        triton.InferRequestedOutput("difference", binary_data=True),
    ]
    inputs = add_inputs()
    inputs[0].set_data_from_numpy(np.array([[5, 6]], np.int32), binary_data=binary_in)
    result = client.infer("add", inputs, outputs=outputs, request_id="seven")
    np.testing.assert_array_equal(result.as_numpy("sum"), [[6, 8]])
    np.testing.assert_array_equal(result.as_numpy("difference"), [[4, 4]])
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == (
        *("seven", "add"),
        "1",
    )


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_bodies_may_be_compressed(client: triton.InferenceServerClient, algorithm: str) -> None:
    array = np.ones((4, 5000), np.float32)
    result = client.infer(
        "echo-fp32",
        [tensor("x", array, "FP32")],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    np.testing.assert_array_equal(result.as_numpy("y"), array)


def test_many_requests_at_once(client: triton.InferenceServerClient) -> None:
    waiting = [client.async_infer("faulty", [fp32([float(n)])]) for n in range(40)]
    values = [each.get_result().as_numpy("y")[0, 0] for each in waiting]
    assert values == [2.0 * n for n in range(40)]


@pytest.mark.parametrize(
    ("text", "asked", "inputs"),
    [
        ("Request for unknown model: 'nope' is not found", {"model_name": "nope"}, [fp32([1.0])]),
        ("version 7", {"model_name": "faulty", "model_version": "7"}, [fp32([1.0])]),
        ("unknown input 'z'", {"model_name": "faulty"}, [fp32([1.0], name="z")]),
        ("is missing", {"model_name": "add"}, add_inputs()[:1]),
        ("INT32", {"model_name": "add"}, [fp32([1.0], name="a")]),
        ("max_batch_size", {"model_name": "faulty"}, [fp32(*[[1.0]] * 9)]),
        ("too hot", {"model_name": "faulty"}, [fp32([101.0])]),
    ],
)
def test_refusals_are_in_words(
    client: triton.InferenceServerClient,
    text: str,
    asked: dict[str, str],
    inputs: list[triton.InferInput],
) -> None:
    with pytest.raises(InferenceServerException, match=text):
        client.infer(inputs=inputs, **asked)


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("faulty")
    assert not client.is_model_ready("nope")
    assert "statistics" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("add")
    assert [each["name"] for each in metadata["inputs"]] == ["a", "b"]


def test_models_are_listed_unloaded_and_loaded(
    server: Server, client: triton.InferenceServerClient
) -> None:
    index = {model["name"]: model for model in client.get_model_repository_index()}
    assert (index["loadable"]["version"], index["loadable"]["state"]) == ("1", "READY")
    client.unload_model("loadable")
    assert not client.is_model_ready("loadable")
    with pytest.raises(InferenceServerException, match="no available versions"):
        client.infer("loadable", [fp32([1.0])])
    client.load_model("loadable")
    server.wait_until(lambda: client.is_model_ready("loadable"))
    np.testing.assert_array_equal(client.infer("loadable", [fp32([1.0])]).as_numpy("y"), [[2.0]])
    with pytest.raises(InferenceServerException, match="nope"):
        client.load_model("nope")


def test_the_aio_client_infers(server: Server) -> None:
    async def run() -> None:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            assert await client.is_server_live()
            results = await asyncio.gather(
                *(client.infer("faulty", [fp32([float(n)])]) for n in range(40))
            )
            assert [each.as_numpy("y")[0, 0] for each in results] == [2.0 * n for n in range(40)]
            with pytest.raises(InferenceServerException, match="unknown model"):
                await client.infer("nope", [fp32([1.0])])

    asyncio.run(run())


def test_log_settings_reach_running_workers_and_those_to_come(
    server: Server, client: triton.InferenceServerClient
) -> None:
    def has_said(number: float) -> bool:
        return any(f"one says {number:.0f}" in line for line in server.log)

    def says(number: float) -> bool:
        client.infer("chatty", [fp32([number])])
        return has_said(number)

    def has_failed() -> bool:
        """Log an error, behind all that was logged before."""
        failures = sum("too hot" in line for line in server.log)
        with pytest.raises(InferenceServerException, match="too hot"):
            client.infer("chatty", [fp32([200.0])])
        return sum("too hot" in line for line in server.log) > failures

    client.infer("chatty", [fp32([11.0])])
    server.wait_until(has_failed)
    assert not has_said(11)
    client.update_log_settings({"log_verbose_level": 1})
    server.wait_until(lambda: says(12))
    (worker,) = server.pids("worker")
    os.kill(worker, 9)
    server.wait_until(lambda: server.pids("worker") not in ([], [worker]))
    server.wait_until(lambda: says(13))
    client.update_log_settings({"log_verbose_level": 0})
    numbers = iter(range(14, 100))
    server.wait_until(lambda: not says(next(numbers)))
    last = next(numbers)
    client.infer("chatty", [fp32([float(last)])])
    server.wait_until(has_failed)
    assert not has_said(last)
