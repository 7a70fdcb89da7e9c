"""The same gRPC calls to a real Triton and to us: the same status, the same answer.

Triton is the one of the bench's peers; without its environment the test is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from serving import WATCHDOG_S, Server
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from overcommit.bench import peers
from overcommit.bench.__main__ import WORK
from overcommit.bench.peers import PEERS, Job, Kind, environments

Ask = Callable[[Any], Any]
ROW = bytes(range(64))


def infer(
    model: str = "echo",
    version: str = "",
    raws: tuple[bytes, ...] = (ROW,),
    shape: tuple[int, ...] = (1, 16),
    name: str = "x",
    datatype: str = "FP32",
    output: str = "",
    contents: tuple[float, ...] = (),
    inputs: int = 1,
    **more: Any,
) -> Any:
    request = pb.ModelInferRequest(model_name=model, model_version=version, **more)
    for _ in range(inputs):
        given = request.inputs.add(name=name, datatype=datatype, shape=shape)
        given.contents.fp32_contents.extend(contents)
        if not contents:
            given.ClearField("contents")
    request.raw_input_contents.extend(raws)
    if output:
        request.outputs.add(name=output)
    return request


def model_infer(**asked: Any) -> Ask:
    return lambda stub: stub.ModelInfer(infer(**asked), timeout=WATCHDOG_S)


def method(name: str, /, **fields: Any) -> Ask:
    kind = getattr(pb, f"{name}Request")
    return lambda stub: getattr(stub, name)(kind(**fields), timeout=WATCHDOG_S)


def stream(stub: Any) -> list[Any]:
    sent = [
        infer(id="1"),
        infer(id="2", parameters={"triton_enable_empty_final_response": {"bool_param": True}}),
        infer(id="bad", name="z"),
        infer(id="unknown", model="nope"),
        infer(id="3"),
    ]
    found = []
    for reply in stub.ModelStreamInfer(iter(sent), timeout=WATCHDOG_S):
        answer = reply.infer_response
        final = {name: value.bool_param for name, value in answer.parameters.items()}
        found.append(
            (bool(reply.error_message), answer.id, final, list(answer.raw_output_contents))
        )
    return found


CASES: dict[str, Ask] = {
    "an answer": model_infer(id="q"),
    "a version": model_infer(version="1"),
    "three rows": model_infer(shape=(3, 16), raws=(ROW * 3,)),
    "an output by name": model_infer(output="y"),
    "contents": model_infer(raws=(), contents=(1.5,) * 16),
    "unknown model": model_infer(model="nope"),
    "no model": model_infer(model=""),
    "unknown version": model_infer(version="7"),
    "no number for a version": model_infer(version="x"),
    "too few bytes": model_infer(raws=(b"x",)),
    "raw and contents": model_infer(contents=(1.0,) * 16),
    "no data": model_infer(raws=()),
    "no input": model_infer(inputs=0, raws=()),
    "more raw than inputs": model_infer(raws=(ROW, ROW)),
    "another datatype": model_infer(datatype="INT32"),
    "no datatype": model_infer(datatype="FOO"),
    "unknown input": model_infer(name="z"),
    "unknown output": model_infer(output="z"),
    "too many rows": model_infer(shape=(65, 16), raws=(ROW * 65,)),
    "another shape": model_infer(shape=(1, 15), raws=(ROW[:60],)),
    "a stream": stream,
    "live": method("ServerLive"),
    "ready": method("ServerReady"),
    "model ready": method("ModelReady", name="echo"),
    "unknown model ready": method("ModelReady", name="nope"),
    "bad version ready": method("ModelReady", name="echo", version="x"),
    "metadata": method("ModelMetadata", name="echo"),
    "metadata of an unknown model": method("ModelMetadata", name="nope"),
    "configuration of an unknown model": method("ModelConfig", name="nope"),
    "statistics of an unknown model": method("ModelStatistics", name="nope"),
    "regions": method("SystemSharedMemoryStatus"),
    "unknown region": method("SystemSharedMemoryStatus", name="nope"),
    "a region of nothing": method(
        "SystemSharedMemoryRegister", name="a", key="/no-such-key", byte_size=8
    ),
    "unknown region forgotten": method("SystemSharedMemoryUnregister", name="nope"),
    "all regions forgotten": method("SystemSharedMemoryUnregister"),
    "CUDA regions": method("CudaSharedMemoryStatus"),
    "unknown CUDA region": method("CudaSharedMemoryStatus", name="nope"),
    "a CUDA region": method("CudaSharedMemoryRegister", name="a", raw_handle=b"x", byte_size=8),
    "CUDA regions forgotten": method("CudaSharedMemoryUnregister"),
}
# What we answer otherwise, and why.
CHOSEN = {
    # Triton drops what is too much; a client that sends it has mistaken itself.
    "more raw than inputs": "INVALID_ARGUMENT",
    # It is the client's key that is wrong, not the server.
    "a region of nothing": "INVALID_ARGUMENT",
}


def answer(ask: Ask, stub: Any) -> Any:
    try:
        found = ask(stub)
    except grpc.RpcError as error:
        return error.code().name
    if hasattr(found, "platform"):
        found.ClearField("platform")  # names the backend
    return found


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = WORK.expanduser()
    if environments.find(folder, "triton", PEERS["triton"].requirements) is None:
        pytest.skip("the environment of triton has not been made: the bench makes it")
    job = Job(Kind.ECHO, Path(tmp_path_factory.mktemp("triton")), {"echo": 2.0}, protocol="grpc")
    with (
        peers.serve("triton", job, folder) as target,
        grpc.insecure_channel(f"127.0.0.1:{target.port}") as channel,
    ):
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_we_answer_as_triton_does(server: Server, triton: Any, name: str) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        ours = answer(CASES[name], service_pb2_grpc.GRPCInferenceServiceStub(channel))
    theirs = answer(CASES[name], triton)
    if name in CHOSEN:
        assert ours == CHOSEN[name]
        assert ours != theirs, "no difference any more: take it out of the list"
    else:
        assert ours == theirs
