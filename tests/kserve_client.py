"""What KServe's own SDK gets from a server: run as a process, `HTTP_PORT GRPC_PORT`; prints JSON.

A process of its own, because the SDK's messages and those of Triton's client have the same names and
cannot be in one process.  The package's `__init__` would import a Kubernetes client and a model
server, with their requirements; its inference clients need none of them.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import types
from typing import Any

import numpy as np

spec = importlib.util.find_spec("kserve")
assert spec is not None
package = types.ModuleType("kserve")
package.__path__ = list(spec.submodule_search_locations or ())
sys.modules["kserve"] = package

import grpc  # noqa: E402
from kserve.inference_client import (  # noqa: E402
    InferenceGRPCClient,
    InferenceRESTClient,
    RESTConfig,
)
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb  # noqa: E402
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub  # noqa: E402
from kserve.protocol.infer_type import InferInput, InferRequest  # noqa: E402

LIMIT_S = 60


def request(model: str, *, binary: bool, **parameters: Any) -> InferRequest:
    tensor = InferInput("x", [2, 2], "FP32")
    tensor.set_data_from_numpy(np.array([[1, 2], [3, 4]], np.float32), binary_data=binary)
    return InferRequest(model, [tensor], request_id="seven", parameters=parameters or None)


def described(response: Any) -> dict[str, Any]:
    (output,) = response.outputs
    return {
        "model": response.model_name,
        "id": response.id,
        "name": output.name,
        "datatype": output.datatype,
        "values": output.as_numpy().tolist(),
    }


async def over_grpc(port: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    url = f"127.0.0.1:{port}"
    async with InferenceGRPCClient(url, timeout=LIMIT_S) as client:
        found["live"] = await client.is_server_live()
        found["ready"] = await client.is_server_ready()
        found["model_ready"] = await client.is_model_ready("faulty")
        found["unknown_ready"] = await client.is_model_ready("nope")
        found["raw"] = described(await client.infer(request("faulty", binary=True)))
        found["contents"] = described(await client.infer(request("faulty", binary=False)))
        mixed = request("add", binary=True)
        mixed.inputs = [
            InferInput("a", [1, 1], "INT32", data=[5]),
            InferInput("b", [1, 1], "INT32"),
        ]
        mixed.inputs[1].set_data_from_numpy(np.array([[1]], np.int32))
        try:
            await client.infer(mixed)
        except grpc.RpcError as error:
            found["mixed"] = error.code().name
    async with grpc.aio.insecure_channel(url) as channel:
        stub = GRPCInferenceServiceStub(channel)
        unloaded = await stub.RepositoryModelUnload(
            pb.RepositoryModelUnloadRequest(model_name="loadable"), timeout=LIMIT_S
        )
        found["unload"] = [unloaded.model_name, unloaded.isUnloaded]
        loaded = await stub.RepositoryModelLoad(
            pb.RepositoryModelLoadRequest(model_name="loadable"), timeout=LIMIT_S
        )
        found["load"] = [loaded.model_name, loaded.isLoaded]
        metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="add"), timeout=LIMIT_S)
        found["inputs"] = [tensor.name for tensor in metadata.inputs]
    return found


async def over_http(port: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    url = f"http://127.0.0.1:{port}"
    async with InferenceRESTClient(RESTConfig(protocol="v2", timeout=LIMIT_S)) as client:
        found["live"] = await client.is_server_live(url)
        found["ready"] = await client.is_server_ready(url)
        found["model_ready"] = await client.is_model_ready(url, "faulty")
        for name, binary in (("raw", True), ("contents", False)):
            asked = request("faulty", binary=binary, binary_data_output=binary)
            found[name] = described(await client.infer(url, asked, model_name="faulty"))
        try:
            await client.infer(url, request("nope", binary=False), model_name="nope")
        except Exception as error:
            found["unknown"] = str(error)
    return found


async def main() -> None:
    http_port, grpc_port = map(int, sys.argv[1:3])
    found = {"grpc": await over_grpc(grpc_port), "http": await over_http(http_port)}
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main())
