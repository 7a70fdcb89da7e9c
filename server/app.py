"""Everything that is not on the hot path, as a FastAPI app: health, metadata, repository, metrics.

Invariants
 1. Every error is `{"error": "..."}`, also those that FastAPI raises itself.
 2. A path decides nothing on disk: names are only looked up in the routing table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import overcommit
from overcommit.runtime.config import VERSIONS_MAX, TensorSpec
from overcommit.runtime.entries import State
from overcommit.runtime.errors import BadRequest, NotFound, OvercommitError
from overcommit.runtime.front_end_messages import Route
from overcommit.server import app_extensions, docs_page, embeddings, load_overrides, openapi
from overcommit.server.app_extensions import EXTENSIONS, LEASED_REGIONS
from overcommit.server.bodies import error_response, field, json_response, read_body, read_object
from overcommit.server.body_budget import BodyBudget
from overcommit.server.exchange import retry_headers
from overcommit.server.limits import ADMIN_PAGE_MAX
from overcommit.server.openapi import answers

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd

STATES: Final = tuple(State.__members__)  # of versions, as operators are told them


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _metadata(route: Route, versions: list[str]) -> dict[str, Any]:
    return {
        "name": route.name,
        "versions": versions,
        "platform": route.platform,
        "inputs": [_tensor(spec) for spec in route.inputs],
        "outputs": [_tensor(spec) for spec in route.outputs],
    }


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(OvercommitError)
    async def refused(request: Request, error: OvercommitError) -> Response:
        headers = dict(retry_headers(error.retry_after_s))
        return error_response(error.http_status, error.message, headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 404 and path.startswith("/v2/models/"):
            name = path.removeprefix("/v2/models/").split("/")[0]
            return error_response(
                404, f"Request for unknown model: '{name}' is not found, or no such path"
            )
        message = f"{request.method} {path}: {error.detail}"
        return error_response(error.status_code, message, dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response()  # to nobody: without it, a log would show where the app waited

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return error_response(400, f"{request.method} {request.url.path}: {problems}")


def _add_health(app: FastAPI, front: FrontEnd) -> None:
    @app.get("/v2/health/live", tags=["health"], responses=answers())
    async def live() -> Response:
        return json_response({"live": True})

    @app.get("/v2/health/ready", tags=["health"], responses=answers())
    async def ready() -> Response:
        body: dict[str, Any] = {"ready": front.is_ready}
        if front.thrashing:
            # Ready all the same: a load balancer that took this box out would make others thrash.
            body["thrashing"] = front.thrashing
        return json_response(body, 200 if front.is_ready else 503)

    @app.get("/v2", tags=["health"], responses=answers())
    @app.get("/v2/", include_in_schema=False)
    async def server_metadata() -> Response:
        more = (LEASED_REGIONS,) if front.regions.is_allowed else ()
        extensions = EXTENSIONS + more
        return json_response(
            {"name": "overcommit", "version": overcommit.__version__, "extensions": extensions}
        )


def _add_models(app: FastAPI, front: FrontEnd) -> None:
    async def described(name: str, version: str | None) -> Response:
        route = await front.wait_for_route(name, version)
        return json_response(_metadata(route, front.table.versions(name)))

    async def is_ready(name: str, version: str | None) -> Response:
        try:
            ready = front.is_ready and front.table.is_ready(name, version)
        except OvercommitError as error:
            raise BadRequest(f"model '{name}' is not ready: {error.message}") from error
        return json_response({"name": name, "ready": ready}, 200 if ready else 400)

    @app.get("/v2/models/{name}", tags=["models"], responses=answers(404))
    async def model_metadata(name: str) -> Response:
        return await described(name, None)

    @app.get("/v2/models/{name}/versions/{version}", tags=["models"], responses=answers(404))
    async def version_metadata(name: str, version: str) -> Response:
        return await described(name, version)

    @app.get("/v2/models/{name}/ready", tags=["models"], responses=answers())
    async def model_ready(name: str) -> Response:
        return await is_ready(name, None)

    @app.get("/v2/models/{name}/versions/{version}/ready", tags=["models"], responses=answers())
    async def version_ready(name: str, version: str) -> Response:
        return await is_ready(name, version)

    # Declared for the documentation and for other methods; POST is answered before it gets here.
    documented: Any = {
        "tags": ["inference"],
        "responses": answers(403, 404, 500),
        "openapi_extra": openapi.INFER,
    }

    @app.post("/v2/models/{name}/infer", **documented)
    async def infer(name: str) -> Response:
        raise NotFound(f"Request for unknown model: '{name}' is not found")

    @app.post("/v2/models/{name}/versions/{version}/infer", **documented)
    async def infer_version(name: str, version: str) -> Response:
        raise NotFound(f"Request for unknown model: '{name}' is not found")


def _add_repository(app: FastAPI, front: FrontEnd) -> None:
    @app.post(
        "/v2/repository/index",
        tags=["repository"],
        responses=answers(),
        openapi_extra=openapi.INDEX,
    )
    async def index(request: Request, offset: int = 0, limit: int | None = None) -> Response:
        ready = field(await read_object(request), "ready", bool, False)
        if offset < 0 or (limit is not None and limit < 1):
            raise BadRequest("offset must be 0 or more, limit 1 or more (without: all)")
        return await front.ask("index", ready=ready, offset=offset, limit=limit or VERSIONS_MAX)

    @app.post(
        "/v2/repository/models/{name}/load",
        tags=["repository"],
        responses=answers(403, 404, 500, 507),
        openapi_extra=openapi.LOAD,
    )
    async def load(name: str, request: Request) -> Response:
        body = await read_object(request)
        return await load_overrides.load(front, name, field(body, "parameters", dict, {}))

    @app.post(
        "/v2/repository/models/{name}/unload",
        tags=["repository"],
        responses=answers(),
        openapi_extra=openapi.UNLOAD,
    )
    async def unload(name: str, request: Request) -> Response:
        parameters = field(await read_object(request), "parameters", dict, {})
        along = field(parameters, "unload_dependents", bool, False)
        return await front.ask("unload", name=name, unload_dependents=along)

    @app.get("/metrics", tags=["operations"], responses=answers(404))
    async def metrics(model: str = "", names: str = "") -> Response:
        if names not in ("", "overcommit", "triton"):
            raise BadRequest("names must be overcommit or triton")
        return await front.ask("metrics", model=model, names=names)

    @app.get("/v2/overcommit/models", tags=["operations"], responses=answers())
    async def models(
        offset: int = 0,
        limit: int = 100,
        order: str = "name",
        state: str = "",
        reason: bool = False,
    ) -> Response:
        if offset < 0 or not 0 < limit <= ADMIN_PAGE_MAX:
            raise BadRequest(f"offset must be 0 or more, limit 1 to {ADMIN_PAGE_MAX}")
        if order not in ("name", "requests"):
            raise BadRequest("order must be name or requests")
        if state not in ("", *STATES):
            raise BadRequest(f"state must be one of {', '.join(STATES)}")
        page: dict[str, int | str] = {"offset": offset, "limit": limit, "order": order}
        return await front.ask("models", **page, state=state, reason=reason)

    @app.get("/v2/overcommit/models/{name}", tags=["operations"], responses=answers(404))
    async def model_detail(name: str) -> Response:
        return await front.ask("model", name=name)

    @app.post("/v2/overcommit/models/{name}/rollout", tags=["operations"], responses=answers(404))
    async def rollout(name: str, request: Request) -> Response:
        """Give versions shares of the requests that name none, and the model further names."""
        body = await read_object(request)
        said = {key: msgspec.json.encode(body[key]).decode() for key in body}
        if unknown := sorted(said.keys() - {"weights", "aliases"}):
            raise BadRequest(f"unknown key '{unknown[0]}'; known are weights, aliases")
        return await front.ask("rollout", name=name, **said)

    @app.get("/v2/overcommit/status", tags=["operations"], responses=answers())
    async def status() -> Response:
        return await front.ask("status")


def _add_embeddings(app: FastAPI, front: FrontEnd) -> None:
    texts = embeddings.Embeddings(front)

    def refused(error: OvercommitError) -> Response:
        headers = dict(retry_headers(error.retry_after_s))
        text = embeddings.error_body(error)
        return Response(text, error.http_status, headers, "application/json")

    @app.post("/v1/embeddings", tags=["embeddings"])
    async def embed(request: Request) -> Response:
        try:
            body = await texts.answer(await read_body(request))
        except OvercommitError as error:
            return refused(error)
        return Response(body, media_type="application/json")

    @app.get("/v1/models", tags=["embeddings"])
    async def listed() -> Response:
        rows = [embeddings.card(name) for name in front.table.names()]
        return json_response({"object": "list", "data": rows})

    @app.get(
        "/v1/models/{name}", tags=["embeddings"], responses=answers(404, form=openapi.OPENAI_ERROR)
    )
    async def retrieved(name: str) -> Response:
        try:
            front.table.find(name, None)
        except OvercommitError as error:
            return refused(error)
        return json_response(embeddings.card(name))


def make_app(front: FrontEnd) -> FastAPI:
    """Build the app of one front end."""
    app = FastAPI(title="overcommit", version=overcommit.__version__, docs_url=None, redoc_url=None)
    app.add_middleware(BodyBudget, front=front)
    _add_error_handlers(app)
    _add_health(app, front)
    app_extensions.add_descriptions(app, front)  # before models: one may be named "stats"
    _add_models(app, front)
    _add_repository(app, front)
    _add_embeddings(app, front)
    app_extensions.add_shared_memory(app, front)
    app_extensions.add_settings(app, front)
    app_extensions.add_not_offered(app, front)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(docs_page.page(app.openapi()), media_type="text/html")

    return app
