"""Triton's extensions of the protocol that are not inference, as endpoints of the app.

Model configuration, statistics, shared memory, trace and log settings.  What each of them means is in the
room of its name, which the gRPC methods share; here are paths, bodies and answers.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Final

from fastapi import FastAPI, Request, Response

from overcommit.runtime.errors import BadRequest, NotFound, NotOffered
from overcommit.runtime.front_end_messages import Region
from overcommit.server import openapi
from overcommit.server.bodies import Object, field, json_response, read_object
from overcommit.server.model_config import model_config
from overcommit.server.openapi import answers
from overcommit.server.regions import register, unregister
from overcommit.server.statistics import statistics
from overcommit.server.trace_log_settings import log_settings, trace_settings

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd

EXTENSIONS: Final = (
    *("classification", "model_repository", "model_repository(unload_dependents)"),
    *("schedule_policy", "model_configuration", "system_shared_memory", "cuda_shared_memory"),
    *("binary_tensor_data", "parameters", "statistics", "trace", "logging"),
)
# Listed where clients may use shared memory: leased regions, and bodies whose tensors lie there.
LEASED_REGIONS: Final = "system_shared_memory(leased)"
_CUDA_HANDLE_BYTES: Final = 64
_OFFSET_MAX: Final = (1 << 63) - 1


def add_descriptions(app: FastAPI, front: FrontEnd) -> None:
    """Model configuration and statistics."""

    @app.get("/v2/models/stats", tags=["statistics"], responses=answers())
    async def all_statistics() -> Response:
        return json_response(await statistics(front))

    @app.get("/v2/models/{name}/stats", tags=["statistics"], responses=answers())
    async def model_statistics(name: str) -> Response:
        return json_response(await statistics(front, name))

    @app.get("/v2/models/{name}/versions/{version}/stats", tags=["statistics"], responses=answers())
    async def version_statistics(name: str, version: str) -> Response:
        return json_response(await statistics(front, name, version))

    @app.get("/v2/models/{name}/config", tags=["models"], responses=answers(404))
    async def config(name: str) -> Response:
        return json_response(await model_config(front, name))

    @app.get("/v2/models/{name}/versions/{version}/config", tags=["models"], responses=answers(404))
    async def version_config(name: str, version: str) -> Response:
        return json_response(await model_config(front, name, version))


def add_shared_memory(app: FastAPI, front: FrontEnd) -> None:
    """System shared memory; CUDA shared memory as a server without a GPU answers."""

    @app.get("/v2/systemsharedmemory/status", tags=["shared memory"], responses=answers())
    async def regions() -> Response:
        return json_response(front.regions.listed())

    @app.get(
        "/v2/systemsharedmemory/region/{region}/status",
        tags=["shared memory"],
        responses=answers(404),
    )
    async def region_status(region: str) -> Response:
        return json_response(front.regions.listed(region))

    @app.post(
        "/v2/systemsharedmemory/region/{region}/register",
        tags=["shared memory"],
        responses=answers(403),
        openapi_extra=openapi.REGION,
    )
    async def register_region(region: str, request: Request) -> Response:
        body = await read_object(request)
        for name in ("key", "byte_size"):
            if name not in body:
                raise BadRequest(f"Shared memory register request has no '{name}' field")
        key, offset = field(body, "key", str), field(body, "offset", int, 0)
        byte_size = field(body, "byte_size", int)
        if not (0 <= offset <= _OFFSET_MAX and 0 <= byte_size <= _OFFSET_MAX):
            raise BadRequest("'offset' and 'byte_size' are whole numbers of at least 0")
        leased = field(body, "leased", bool, False)
        proof = await register(
            front,
            Region(name=region, key=key, offset=offset, byte_size=byte_size, leased=leased),
        )
        return json_response({"proof": proof} if leased else {})

    @app.post(
        "/v2/systemsharedmemory/region/{region}/unregister",
        tags=["shared memory"],
        responses=answers(),
    )
    async def unregister_region(region: str) -> Response:
        await unregister(front, region)
        return json_response({})

    @app.post("/v2/systemsharedmemory/unregister", tags=["shared memory"], responses=answers())
    async def unregister_regions() -> Response:
        await unregister(front, "")
        return json_response({})

    @app.get("/v2/cudasharedmemory/status", tags=["shared memory"], responses=answers())
    async def cuda_regions() -> Response:
        return json_response([])

    @app.get(
        "/v2/cudasharedmemory/region/{region}/status",
        tags=["shared memory"],
        responses=answers(404),
    )
    async def cuda_region_status(region: str) -> Response:
        raise NotFound(f"Unable to find cuda shared memory region: '{region}'")

    @app.post(
        "/v2/cudasharedmemory/region/{region}/register",
        tags=["shared memory"],
        responses=answers(),
        openapi_extra=openapi.CUDA_REGION,
    )
    async def register_cuda_region(region: str, request: Request) -> Response:
        _check_cuda(await read_object(request))
        raise BadRequest(
            f"failed to register shared memory region: '{region}': this server takes no CUDA shared "
            f"memory; use system shared memory"
        )

    @app.post(
        "/v2/cudasharedmemory/region/{region}/unregister",
        tags=["shared memory"],
        responses=answers(),
    )
    async def unregister_cuda_region(region: str) -> Response:
        return json_response({})

    @app.post("/v2/cudasharedmemory/unregister", tags=["shared memory"], responses=answers())
    async def unregister_cuda_regions() -> Response:
        return json_response({})


def _check_cuda(body: Object) -> None:
    for name in ("raw_handle", "device_id", "byte_size"):
        if name not in body:
            raise BadRequest(f"Shared memory register request has no '{name}' field")
    try:
        handle = base64.b64decode(field(field(body, "raw_handle", dict), "b64", str, ""))
    except (binascii.Error, ValueError):
        handle = b""
    if len(handle) != _CUDA_HANDLE_BYTES:
        raise BadRequest("'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t")


def add_settings(app: FastAPI, front: FrontEnd) -> None:
    """Trace and log settings."""

    @app.get("/v2/trace/setting", tags=["settings"], responses=answers())
    async def get_trace() -> Response:
        return json_response(await trace_settings(front))

    @app.post(
        "/v2/trace/setting", tags=["settings"], responses=answers(), openapi_extra=openapi.TRACE
    )
    async def set_trace(request: Request) -> Response:
        return json_response(await trace_settings(front, "", await read_object(request)))

    @app.get("/v2/models/{name}/trace/setting", tags=["settings"], responses=answers())
    async def get_model_trace(name: str) -> Response:
        return json_response(await trace_settings(front, name))

    @app.post(
        "/v2/models/{name}/trace/setting",
        tags=["settings"],
        responses=answers(),
        openapi_extra=openapi.TRACE,
    )
    async def set_model_trace(name: str, request: Request) -> Response:
        return json_response(await trace_settings(front, name, await read_object(request)))

    @app.get("/v2/logging", tags=["settings"], responses=answers())
    async def get_log() -> Response:
        return json_response(await log_settings(front))

    @app.post("/v2/logging", tags=["settings"], responses=answers(), openapi_extra=openapi.LOG)
    async def set_log(request: Request) -> Response:
        return json_response(await log_settings(front, await read_object(request)))


def add_not_offered(app: FastAPI, front: FrontEnd) -> None:
    """What Triton's clients may try and this server does not do: it says so."""

    def refuse(name: str, version: str | None) -> Response:
        front.table.find(name, version)
        raise NotOffered(
            f"model '{name}': the generate extension is not offered by this server; use "
            f"POST /v2/models/{name}/infer"
        )

    for last in ("generate", "generate_stream"):

        @app.post(f"/v2/models/{{name}}/{last}", tags=["inference"], responses=answers(404, 501))
        async def generate(name: str) -> Response:
            return refuse(name, None)

        @app.post(
            f"/v2/models/{{name}}/versions/{{version}}/{last}",
            tags=["inference"],
            responses=answers(404, 501),
        )
        async def generate_version(name: str, version: str) -> Response:
            return refuse(name, version)
