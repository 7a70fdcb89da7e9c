"""The methods of GRPCInferenceService that answer one message and are no inference.

Each takes a message of the protocol and returns one; errors are raised, with the status that
Triton's clients know.  What a method says is what the HTTP endpoint of the same name says.

Called by the calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import Response
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

import overcommit
from overcommit.runtime.config import VERSIONS_MAX, TensorSpec
from overcommit.runtime.errors import NotFound, Unavailable
from overcommit.server import load_overrides
from overcommit.server.app_extensions import EXTENSIONS
from overcommit.server.grpc_handler import Handler, handler
from overcommit.server.grpc_shared_memory import SharedMemory
from overcommit.server.grpc_wire import CallFailed, Status
from overcommit.server.model_config import model_config
from overcommit.server.proto import messages
from overcommit.server.statistics import statistics
from overcommit.server.trace_log_settings import log_settings, trace_settings

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd

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
            service + "ServerLive": handler(messages.ServerLiveRequest, self.live),
            service + "ServerReady": handler(messages.ServerReadyRequest, self.ready),
            service + "ModelReady": handler(messages.ModelReadyRequest, self.model_ready),
            service + "ServerMetadata": handler(messages.ServerMetadataRequest, self.metadata),
            service + "ModelMetadata": handler(messages.ModelMetadataRequest, self.model_metadata),
            service + "RepositoryIndex": handler(messages.RepositoryIndexRequest, self.index),
            service + "RepositoryModelLoad": handler(
                messages.RepositoryModelLoadRequest, self.load
            ),
            service + "RepositoryModelUnload": handler(
                messages.RepositoryModelUnloadRequest, self.unload
            ),
            service + "ModelConfig": handler(messages.ModelConfigRequest, self.config),
            service + "ModelStatistics": handler(messages.ModelStatisticsRequest, self.statistics),
            service + "TraceSetting": handler(messages.TraceSettingRequest, self.trace),
            service + "LogSettings": handler(messages.LogSettingsRequest, self.log),
            **SharedMemory(self._front).by_path(service),
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
            version = request.version or None
            is_ready = front.is_ready and front.table.is_ready(request.name, version)
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

    async def config(self, request: messages.ModelConfigRequest) -> Message:
        """A version's configuration, as Triton would say it."""
        value = await model_config(self._front, request.name, request.version)
        answer = messages.ModelConfigResponse()
        ParseDict(value, answer.config, ignore_unknown_fields=True)
        return answer

    async def statistics(self, request: messages.ModelStatisticsRequest) -> Message:
        """What was counted for a version, a model, or all."""
        value = await statistics(self._front, request.name, request.version)
        return ParseDict(value, messages.ModelStatisticsResponse(), ignore_unknown_fields=True)

    # --- settings -------------------------------------------------------------------------------
    async def trace(self, request: messages.TraceSettingRequest) -> Message:
        """Change trace settings, if any are given, and return all; no value clears one."""
        changes = {name: list(given.value) or None for name, given in request.settings.items()}
        found = await trace_settings(self._front, request.model_name, _simple(changes) or None)
        answer = messages.TraceSettingResponse()
        for name, value in found.items():
            values = value if isinstance(value, list) else [value]
            answer.settings[name].value.extend(str(each) for each in values)
        return answer

    async def log(self, request: messages.LogSettingsRequest) -> Message:
        """Change log settings, if any are given, and return all."""
        changes: dict[str, Any] = {}
        for name, given in request.settings.items():
            choice = given.WhichOneof("parameter_choice")
            if choice is not None:
                changes[name] = getattr(given, choice)
        answer = messages.LogSettingsResponse()
        for name, value in (await log_settings(self._front, changes or None)).items():
            setting = answer.settings[name]
            if isinstance(value, bool):
                setting.bool_param = value
            elif isinstance(value, int):
                setting.uint32_param = value
            else:
                setting.string_param = str(value)
        return answer

    # --- repository -----------------------------------------------------------------------------
    async def index(self, request: messages.RepositoryIndexRequest) -> Message:
        """Every version that is known."""
        rows = await self._ask("index", ready=request.ready, offset=0, limit=VERSIONS_MAX)
        entry = messages.RepositoryIndexResponse.ModelIndex
        return messages.RepositoryIndexResponse(models=[entry(**row) for row in rows])

    async def load(self, request: messages.RepositoryModelLoadRequest) -> Message:
        """Load a model; KServe's clients name it where Triton's name a repository."""
        name = request.model_name or request.repository_name
        given = {key: _given(value) for key, value in request.parameters.items()}
        answer = await load_overrides.load(self._front, name, given)
        _value(answer, Status.INTERNAL)
        if request.model_name:
            return messages.RepositoryModelLoadResponse()
        return messages.RepositoryModelLoadResponse(model_name=name, isLoaded=True)

    async def unload(self, request: messages.RepositoryModelUnloadRequest) -> Message:
        """Unload a model."""
        name = request.model_name or request.repository_name
        along = request.parameters["unload_dependents"] if request.parameters else None
        arguments = {"unload_dependents": along is not None and along.bool_param}
        await self._ask("unload", Status.INTERNAL, name=name, **arguments)
        if request.model_name:
            return messages.RepositoryModelUnloadResponse()
        return messages.RepositoryModelUnloadResponse(model_name=name, isUnloaded=True)

    async def _ask(
        self, operation: str, otherwise: Status | None = None, **arguments: str | int | bool
    ) -> Any:
        """Have the supervisor answer; `otherwise`: the status of whatever it refuses."""
        return _value(await self._front.ask(operation, **arguments), otherwise)


def _value(answer: Response, otherwise: Status | None = None) -> Any:
    """What an answer says.  Raises CallFailed."""
    value = msgspec.json.decode(answer.body)
    if answer.status_code >= 400:
        status = otherwise or _STATUS.get(answer.status_code, Status.INTERNAL)
        raise CallFailed(status, value["error"])
    return value


def _simple(changes: dict[str, list[str] | None]) -> dict[str, Any]:
    """As JSON would have it: a list of one value is that value, but for levels."""
    return {
        name: value[0] if value is not None and len(value) == 1 and name != "trace_level" else value
        for name, value in changes.items()
    }


def _given(value: messages.ModelRepositoryParameter) -> Any:
    """A parameter of a load; a file's content is bytes here."""
    choice = value.WhichOneof("parameter_choice")
    return None if choice is None else getattr(value, choice)


def _tensor(spec: TensorSpec) -> messages.ModelMetadataResponse.TensorMetadata:
    return messages.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )
