"""The methods of GRPCInferenceService that answer one message and are no inference.

Each takes a message of the protocol and returns one; errors are raised, with the status that
Triton's clients know.  What a method says is what the HTTP endpoint of the same name says.

Called by the calls.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from google.protobuf.message import DecodeError, Message

import overcommit
from overcommit.runtime.config import VERSIONS_MAX, TensorSpec
from overcommit.runtime.errors import NotFound, Unavailable
from overcommit.server.app_extensions import EXTENSIONS
from overcommit.server.grpc_call import Handler
from overcommit.server.grpc_wire import CallFailed, Status
from overcommit.server.proto import messages
from overcommit.server.routing import check_usable

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd

M = TypeVar("M", bound=Message)

_HEALTH = "/grpc.health.v1.Health/Check"
_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"  # HealthCheckResponse.status
_STATUS = {400: Status.INVALID_ARGUMENT, 403: Status.PERMISSION_DENIED, 404: Status.NOT_FOUND}


class Methods:
    """See the module."""

    def __init__(self, front: FrontEnd) -> None:
        self._front = front

    def by_path(self, service: str) -> dict[str, Handler]:
        """Return who answers which path."""
        return {
            service + "ServerLive": _handler(messages.ServerLiveRequest, self.live),
            service + "ServerReady": _handler(messages.ServerReadyRequest, self.ready),
            service + "ModelReady": _handler(messages.ModelReadyRequest, self.model_ready),
            service + "ServerMetadata": _handler(messages.ServerMetadataRequest, self.metadata),
            service + "ModelMetadata": _handler(messages.ModelMetadataRequest, self.model_metadata),
            service + "RepositoryIndex": _handler(messages.RepositoryIndexRequest, self.index),
            service + "RepositoryModelLoad": _handler(
                messages.RepositoryModelLoadRequest, self.load
            ),
            service + "RepositoryModelUnload": _handler(
                messages.RepositoryModelUnloadRequest, self.unload
            ),
            _HEALTH: self.health,
        }

    # --- health and description -----------------------------------------------------------------
    async def health(self, message: bytes) -> bytes:
        """grpc.health.v1: of the whole server, whatever service is named."""
        return _SERVING if self._front.is_ready else _NOT_SERVING

    async def live(self, request: messages.ServerLiveRequest) -> Message:
        """Whether the server answers at all."""
        return messages.ServerLiveResponse(live=True)

    async def ready(self, request: messages.ServerReadyRequest) -> Message:
        """Whether requests can be served."""
        return messages.ServerReadyResponse(ready=self._front.is_ready)

    async def model_ready(self, request: messages.ModelReadyRequest) -> Message:
        """Whether a model can be asked; an unknown one cannot."""
        front = self._front
        try:
            route = front.table.find(request.name, request.version or None)
            is_ready = front.is_ready and check_usable(route)
        except (NotFound, Unavailable):
            is_ready = False
        return messages.ModelReadyResponse(ready=is_ready)

    async def metadata(self, request: messages.ServerMetadataRequest) -> Message:
        """What this server is."""
        return messages.ServerMetadataResponse(
            name="overcommit", version=overcommit.__version__, extensions=EXTENSIONS
        )

    async def model_metadata(self, request: messages.ModelMetadataRequest) -> Message:
        """What a model takes and gives."""
        front = self._front
        route = await front.wait_for_route(request.name, request.version or None)
        return messages.ModelMetadataResponse(
            name=route.name,
            versions=front.table.versions(route.name),
            platform=route.platform,
            inputs=[_tensor(spec) for spec in route.inputs],
            outputs=[_tensor(spec) for spec in route.outputs],
        )

    # --- repository -----------------------------------------------------------------------------
    async def index(self, request: messages.RepositoryIndexRequest) -> Message:
        """Every version that is known."""
        rows = await self._ask("index", ready=request.ready, offset=0, limit=VERSIONS_MAX)
        entry = messages.RepositoryIndexResponse.ModelIndex
        return messages.RepositoryIndexResponse(models=[entry(**row) for row in rows])

    async def load(self, request: messages.RepositoryModelLoadRequest) -> Message:
        """Load a model; KServe's clients name it where Triton's name a repository."""
        name = request.model_name or request.repository_name
        await self._ask("load", Status.INTERNAL, name=name)
        if request.model_name:
            return messages.RepositoryModelLoadResponse()
        return messages.RepositoryModelLoadResponse(model_name=name, isLoaded=True)

    async def unload(self, request: messages.RepositoryModelUnloadRequest) -> Message:
        """Unload a model."""
        name = request.model_name or request.repository_name
        await self._ask("unload", Status.INTERNAL, name=name)
        if request.model_name:
            return messages.RepositoryModelUnloadResponse()
        return messages.RepositoryModelUnloadResponse(model_name=name, isUnloaded=True)

    async def _ask(
        self, operation: str, otherwise: Status | None = None, **arguments: str | int | bool
    ) -> Any:
        """Have the supervisor answer; `otherwise`: the status of whatever it refuses."""
        answer = await self._front.ask(operation, **arguments)
        value = msgspec.json.decode(answer.body)
        if answer.status_code >= 400:
            status = otherwise or _STATUS.get(answer.status_code, Status.INTERNAL)
            raise CallFailed(status, value["error"])
        return value


def _tensor(spec: TensorSpec) -> messages.ModelMetadataResponse.TensorMetadata:
    return messages.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )


def _handler(kind: type[M], method: Callable[[M], Awaitable[Message]]) -> Handler:
    """Make a method that takes and returns bytes."""

    async def handle(data: bytes) -> bytes:
        try:
            request = kind.FromString(data)
        except DecodeError as error:
            raise CallFailed(
                Status.INVALID_ARGUMENT, f"the message is no {kind.__name__}: {error}"
            ) from error
        return (await method(request)).SerializeToString()

    return handle
