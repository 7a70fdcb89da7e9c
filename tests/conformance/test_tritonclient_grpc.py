"""Triton's gRPC client, sync and aio, against the real server."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from model_rig import DATATYPES, sample
from serving import WATCHDOG_S, Server
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as connected:
        yield connected


def tensor(name: str, array: Array, datatype: str) -> triton.InferInput:
    given = triton.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array)
    return given


def fp32(*rows: list[float], name: str = "x") -> triton.InferInput:
    return tensor(name, np.array(rows, np.float32), "FP32")


def code_of(error: pytest.ExceptionInfo[InferenceServerException]) -> str:
    return str(error.value.status())


# --- tensors ------------------------------------------------------------------------------------
@pytest.mark.parametrize("datatype", [*DATATYPES, "BYTES"])
def test_a_tensor_of_each_datatype_comes_back_as_it_was(
    client: triton.InferenceServerClient, datatype: str
) -> None:
    array = sample(datatype)
    result = client.infer(f"echo-{datatype.lower()}", [tensor("x", array, datatype)])
    output = result.get_output("y")
    assert (output.datatype, list(output.shape)) == (datatype, list(array.shape))
    np.testing.assert_array_equal(result.as_numpy("y"), array)


def test_an_answer_names_its_model_version_and_id(client: triton.InferenceServerClient) -> None:
    response = client.infer("add", add_inputs(), request_id="seven").get_response()
    assert (response.model_name, response.model_version, response.id) == ("add", "1", "seven")
    assert client.infer("add", add_inputs()).get_response().id == ""


def add_inputs() -> list[triton.InferInput]:
    a, b = np.array([[5, 6]], np.int32), np.array([[1, 2]], np.int32)
    return [tensor("a", a, "INT32"), tensor("b", b, "INT32")]


def test_outputs_that_are_asked_for_come_alone(client: triton.InferenceServerClient) -> None:
    result = client.infer("add", add_inputs(), outputs=[triton.InferRequestedOutput("difference")])
    assert [output.name for output in result.get_response().outputs] == ["difference"]
    np.testing.assert_array_equal(result.as_numpy("difference"), [[4, 4]])
    everything = client.infer("add", add_inputs())
    np.testing.assert_array_equal(everything.as_numpy("sum"), [[6, 8]])


def test_contents_are_read_as_raw_tensors_are(server: Server) -> None:
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = triton.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        fields = {
            "BOOL": ("bool_contents", [True, False]),
            "INT8": ("int_contents", [-128, 127]),
            "INT64": ("int64_contents", [-(2**63), 5]),
            "UINT16": ("uint_contents", [0, 65535]),
            "UINT64": ("uint64_contents", [0, 2**64 - 1]),
            "FP32": ("fp32_contents", [0.5, -2.0]),
            "FP64": ("fp64_contents", [0.1, 1e300]),
            "BYTES": ("bytes_contents", [b"\xff", b"text"]),
        }
        for datatype, (field, values) in fields.items():
            request = service_pb2.ModelInferRequest(model_name=f"echo-{datatype.lower()}")
            given = request.inputs.add(name="x", datatype=datatype, shape=[1, 2])
            getattr(given.contents, field).extend(values)
            result = triton.InferResult(stub.ModelInfer(request, timeout=WATCHDOG_S))
            assert result.as_numpy("y").ravel().tolist() == values, datatype


@pytest.mark.parametrize("mebibytes", [1, 63])
def test_large_tensors_go_there_and_back(
    client: triton.InferenceServerClient, mebibytes: int
) -> None:
    array = np.arange(mebibytes << 18, dtype=np.float32).reshape(1, -1)
    result = client.infer("echo-fp32", [tensor("x", array, "FP32")])
    np.testing.assert_array_equal(result.as_numpy("y"), array)


def test_a_message_over_the_limit_is_refused(client: triton.InferenceServerClient) -> None:
    array = np.zeros((1, 18 << 20), np.float32)
    with pytest.raises(InferenceServerException, match="the limit is") as caught:
        client.infer("echo-fp32", [tensor("x", array, "FP32")])
    assert code_of(caught) == "StatusCode.RESOURCE_EXHAUSTED"
    np.testing.assert_array_equal(client.infer("echo-fp32", [fp32([1.0])]).as_numpy("y"), [[1.0]])


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_are_answered_compressed(
    client: triton.InferenceServerClient, algorithm: str
) -> None:
    array = np.ones((4, 50_000), np.float32)
    result = client.infer(
        "echo-fp32", [tensor("x", array, "FP32")], compression_algorithm=algorithm
    )
    np.testing.assert_array_equal(result.as_numpy("y"), array)


# --- errors -------------------------------------------------------------------------------------
def test_refusals_have_the_codes_that_clients_know(client: triton.InferenceServerClient) -> None:
    x = fp32([1.0, 2.0])
    faults: list[tuple[str, str, dict[str, Any], list[triton.InferInput]]] = [
        (
            "NOT_FOUND",
            "Request for unknown model: 'nope' is not found",
            {"model_name": "nope"},
            [x],
        ),
        ("NOT_FOUND", "version 7", {"model_name": "faulty", "model_version": "7"}, [x]),
        ("INVALID_ARGUMENT", "version", {"model_name": "faulty", "model_version": "x"}, [x]),
        (
            "INVALID_ARGUMENT",
            "unknown input 'z'",
            {"model_name": "faulty"},
            [fp32([1.0], name="z")],
        ),
        ("INVALID_ARGUMENT", "is missing", {"model_name": "add"}, [add_inputs()[0]]),
        ("INVALID_ARGUMENT", "INT32", {"model_name": "add"}, [fp32([1.0], name="a")]),
        ("INVALID_ARGUMENT", "max_batch_size", {"model_name": "faulty"}, [fp32(*[[1.0]] * 9)]),
        ("INTERNAL", "too hot", {"model_name": "faulty"}, [fp32([101.0])]),
    ]
    for code, text, asked, inputs in faults:
        with pytest.raises(InferenceServerException, match=text) as caught:
            client.infer(inputs=inputs, **asked)
        assert code_of(caught) == f"StatusCode.{code}", text
    with pytest.raises(InferenceServerException, match="unknown output 'z'") as caught:
        client.infer("faulty", [x], outputs=[triton.InferRequestedOutput("z")])
    assert code_of(caught) == "StatusCode.INVALID_ARGUMENT"


def test_raw_contents_must_fit(server: Server) -> None:
    import grpc

    def ask(channel: Any, *raws: bytes, contents: bool = False) -> Any:
        request = service_pb2.ModelInferRequest(model_name="faulty")
        given = request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
        if contents:
            given.contents.fp32_contents.extend([1.0, 2.0])
        request.raw_input_contents.extend(raws)
        stub = triton.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return stub.ModelInfer(request, timeout=WATCHDOG_S)

    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        for raws, contents, text in (
            ((b"short",), False, "elements"),
            ((b"12345678", b"12345678"), False, "raw_input_contents"),
            ((b"12345678",), True, "must not be used together"),
            ((), False, "elements"),
        ):
            with pytest.raises(grpc.RpcError, match=text) as caught:
                ask(channel, *raws, contents=contents)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(ask(channel, b"\0" * 8).raw_output_contents) == 1


def test_unknown_methods_are_unimplemented(server: Server) -> None:
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/Dance")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=WATCHDOG_S)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"", timeout=WATCHDOG_S) == b"\x08\x01"


# --- time ---------------------------------------------------------------------------------------
def test_a_deadline_ends_the_wait_and_later_requests_are_answered(
    client: triton.InferenceServerClient,
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer("slow", [fp32([0.5], name="seconds")], client_timeout=0.1)
    assert code_of(caught) == "StatusCode.DEADLINE_EXCEEDED"
    result = client.infer("slow", [fp32([0.0], name="seconds")], client_timeout=WATCHDOG_S)
    np.testing.assert_array_equal(result.as_numpy("y"), [[0.0]])


def test_the_timeout_parameter_is_the_servers_to_keep(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="model 'slow'") as caught:
        client.infer("slow", [fp32([1.0], name="seconds")], timeout=200_000)
    assert code_of(caught) in ("StatusCode.DEADLINE_EXCEEDED", "StatusCode.UNAVAILABLE")


def test_cancelled_requests_leave_nothing_behind(
    server: Server, client: triton.InferenceServerClient
) -> None:
    answers: queue.Queue[Any] = queue.Queue()

    def on_answer(result: Any, error: Any) -> None:
        answers.put(error)

    calls = [
        client.async_infer("slow", [fp32([0.2], name="seconds")], on_answer) for _ in range(20)
    ]
    for call in calls:
        call.cancel()
    errors = [answers.get(timeout=WATCHDOG_S) for _ in calls]
    assert all("CANCELLED" in str(error.status()) for error in errors if error is not None)

    def is_settled() -> bool:
        (front,) = server.status()["front_ends"]
        return front["in_flight"] == 0 and front["blocks_used"] == 0

    server.wait_until(is_settled)


# --- streams ------------------------------------------------------------------------------------
def test_a_stream_answers_in_order_and_goes_on_after_an_error(
    client: triton.InferenceServerClient,
) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    values = [float(number) for number in range(50)]
    values[7] = 101.0  # too hot
    for number, value in enumerate(values):
        client.async_stream_infer(
            "faulty",
            [fp32([value])],
            request_id=str(number),
            enable_empty_final_response=number % 2 == 0,
        )
    for number, value in enumerate(values):
        result, error = answers.get(timeout=WATCHDOG_S)
        if number == 7:
            assert "too hot" in str(error)
            continue
        assert error is None
        response = result.get_response()
        assert response.id == str(number)
        assert response.parameters["triton_final_response"].bool_param
        np.testing.assert_array_equal(result.as_numpy("y"), [[2 * value]])
    client.stop_stream()
    assert answers.empty()


def test_a_stream_may_ask_for_large_answers(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    arrays = [np.full((1, 1 << 20), number, np.float32) for number in range(12)]
    for array in arrays:
        client.async_stream_infer("echo-fp32", [tensor("x", array, "FP32")])
    for array in arrays:
        result, error = answers.get(timeout=WATCHDOG_S)
        assert error is None
        np.testing.assert_array_equal(result.as_numpy("y"), array)
    client.stop_stream()


def test_a_cancelled_stream_leaves_nothing_behind(
    server: Server, client: triton.InferenceServerClient
) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for _ in range(10):
        client.async_stream_infer("slow", [fp32([0.1], name="seconds")])
    client.stop_stream(cancel_requests=True)
    server.wait_until(lambda: server.status()["front_ends"][0]["blocks_used"] == 0)


def test_the_aio_client_streams_and_infers(server: Server) -> None:
    async def run() -> None:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
            assert await client.is_server_live()
            results = await asyncio.gather(
                *(client.infer("faulty", [fp32([float(n)])]) for n in range(40))
            )
            assert [r.as_numpy("y")[0, 0] for r in results] == [2.0 * n for n in range(40)]

            async def requests() -> Any:
                for number in range(20):
                    yield {"model_name": "faulty", "inputs": [fp32([float(number)])]}

            got = []
            async for result, error in client.stream_infer(requests()):
                assert error is None
                got.append(result.as_numpy("y")[0, 0])
            assert got == [2.0 * n for n in range(20)]

    asyncio.run(run())


# --- description --------------------------------------------------------------------------------
def test_health_and_metadata(server: Server, client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("faulty")
    assert not client.is_model_ready("nope")
    assert not client.is_model_ready("faulty", "9")
    with pytest.raises(InferenceServerException, match="no version number") as caught:
        client.is_model_ready("faulty", "x")
    assert code_of(caught) == "StatusCode.INVALID_ARGUMENT"
    metadata = client.get_server_metadata()
    assert metadata.version
    assert "statistics" in metadata.extensions
    model = client.get_model_metadata("add")
    assert [(i.name, i.datatype, list(i.shape)) for i in model.inputs] == [
        ("a", "INT32", [-1, -1]),
        ("b", "INT32", [-1, -1]),
    ]
    assert list(model.versions) == ["1"]
    with pytest.raises(InferenceServerException, match="unknown model") as caught:
        client.get_model_metadata("nope")
    assert code_of(caught) == "StatusCode.NOT_FOUND"


def test_models_are_listed_unloaded_and_loaded(
    server: Server, client: triton.InferenceServerClient
) -> None:
    index = {model.name: model for model in client.get_model_repository_index().models}
    assert (index["loadable"].version, index["loadable"].state) == ("1", "READY")
    client.unload_model("loadable")
    assert not client.is_model_ready("loadable")
    with pytest.raises(InferenceServerException, match="no available versions") as caught:
        client.infer("loadable", [fp32([1.0])])
    assert code_of(caught) == "StatusCode.NOT_FOUND"
    client.load_model("loadable")
    server.wait_until(lambda: client.is_model_ready("loadable"))
    np.testing.assert_array_equal(client.infer("loadable", [fp32([1.0])]).as_numpy("y"), [[2.0]])
    with pytest.raises(InferenceServerException, match="nope") as caught:
        client.load_model("nope")
    assert code_of(caught) == "StatusCode.INTERNAL"


def test_keep_alive_pings_are_answered(server: Server) -> None:
    options = triton.KeepAliveOptions(
        keepalive_time_ms=10, keepalive_timeout_ms=20_000, keepalive_permit_without_calls=True
    )
    url = f"127.0.0.1:{server.grpc_port}"
    with triton.InferenceServerClient(url, keepalive_options=options) as client:
        result = client.infer("slow", [fp32([0.3], name="seconds")])
        np.testing.assert_array_equal(result.as_numpy("y"), np.array([[0.3]], np.float32))
