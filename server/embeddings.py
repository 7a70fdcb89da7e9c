"""Embeddings of text, in the form of OpenAI's API: `POST /v1/embeddings`, `GET /v1/models[/{name}]`.

    {"model": str, "input": str | [str] | [int] | [[int]],
     "encoding_format"?: "float" | "base64", "dimensions"?: int, "truncate"?: bool}

Each text is a request of its own, so texts of all clients share batches, and a long one pads no
other.  `truncate` is ours: without it a text that is too long is refused, as there.

Invariants
 1. A model's folder is read once for each announcement of its route, by one thread, whoever asks.
 2. Answers come in the order of the inputs, or not at all: one that fails fails the request, and
    the others are given up.
 3. At most EMBEDDINGS_IN_FLIGHT of one request are with workers at a time.

Called by the app.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from overcommit.runtime.errors import BadRequest, NotFound, OvercommitError
from overcommit.runtime.front_end_messages import Route
from overcommit.server.ensembles import ask_any, cast_of, slots_of
from overcommit.server.limits import (
    EMBEDDINGS_IN_FLIGHT,
    EMBEDDINGS_INPUTS_MAX,
    TEXT_MODELS_MAX,
)
from overcommit.server.text_model import Array, TextModel

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd


class EmbeddingsRequest(msgspec.Struct, kw_only=True):
    """What a client asks; unknown keys are ignored."""

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: str = "float"
    dimensions: int | None = None
    truncate: bool = False


class _Embedding(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class _Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class _Answer(msgspec.Struct):
    data: list[_Embedding]
    model: str
    usage: _Usage
    object: str = "list"


_DECODER: Final = msgspec.json.Decoder(EmbeddingsRequest)


def decode(body: bytes | bytearray) -> EmbeddingsRequest:
    """Read a request.  Raises BadRequest."""
    try:
        request = _DECODER.decode(body)
    except msgspec.ValidationError as error:
        raise BadRequest(f"the request does not fit the embeddings API: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the request is not JSON: {error}") from error
    if request.encoding_format not in ("float", "base64"):
        raise BadRequest(f"encoding_format is '{request.encoding_format}', not float or base64")
    return request


def inputs_of(request: EmbeddingsRequest) -> list[str] | list[list[int]]:
    """Return the texts, or the lists of token ids.  Raises BadRequest."""
    given = request.input
    if isinstance(given, str):
        return [given]
    texts = [each for each in given if isinstance(each, str)]
    ids = [each for each in given if isinstance(each, int)]
    lists = [each for each in given if isinstance(each, list)]
    if len(ids) == len(given) and ids:
        return [ids]
    if len(given) > EMBEDDINGS_INPUTS_MAX:
        raise BadRequest(
            f"model '{request.model}': {len(given)} inputs, the limit is {EMBEDDINGS_INPUTS_MAX}; "
            f"send several requests"
        )
    if given and len(texts) == len(given):
        return texts
    if given and len(lists) == len(given):
        return lists
    raise BadRequest(
        f"model '{request.model}': input must be a text, a list of texts, a list of token ids or a "
        f"list of such lists, and not empty"
    )


class Embeddings:
    """The text models of one front end."""

    def __init__(self, front: FrontEnd) -> None:
        self._front = front
        self._models: dict[int, tuple[Route, asyncio.Task[TextModel]]] = {}

    async def answer(self, body: bytes | bytearray) -> bytes:
        """Answer one request.  Raises OvercommitError."""
        request = decode(body)
        inputs = inputs_of(request)
        route = await self._front.wait_for_route(request.model, None)
        model = await self._model(route)
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(None, model.tokens, inputs, request.truncate)
        vectors = await self._vectors(model, tokens, request.dimensions)
        encodes = request.encoding_format == "base64"
        count = sum(len(ids) for ids in tokens)
        return msgspec.json.encode(
            _Answer(
                [
                    _Embedding(
                        index,
                        base64.b64encode(vector.tobytes()).decode() if encodes else vector.tolist(),
                    )
                    for index, vector in enumerate(vectors)
                ],
                request.model,
                _Usage(count, count),
            )
        )

    async def _vectors(
        self, model: TextModel, tokens: Sequence[Array], dimensions: int | None
    ) -> list[Array]:
        front, plans = self._front, self._front.plans.of(model.route)
        cast = cast_of(front.table, model.route)
        places = asyncio.Semaphore(EMBEDDINGS_IN_FLIGHT)

        async def one(ids: Array) -> Array:
            async with places:
                outputs = [model.recipe.output]
                answer = await ask_any(front, plans, model.tensors(ids), outputs, cast=cast)
            return model.vector(answer, dimensions)

        used = {model.route.slot} | slots_of(cast)
        try:
            with front.uses.keep(used):
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(ids)) for ids in tokens]
        except BaseExceptionGroup as errors:
            for error in errors.exceptions:
                if isinstance(error, OvercommitError):
                    raise error from None
            raise
        return [task.result() for task in tasks]

    async def _model(self, route: Route) -> TextModel:
        """Return a route's text model, read when it is asked for first."""
        found = self._models.pop(route.slot, None)
        if found is None or found[0] is not route or found[1].cancelled() or _failed(found[1]):
            while len(self._models) >= TEXT_MODELS_MAX:
                del self._models[next(iter(self._models))]
            found = route, asyncio.get_running_loop().create_task(self._load(route))
        self._models[route.slot] = found  # the last to go
        return await asyncio.shield(found[1])

    async def _load(self, route: Route) -> TextModel:
        answer = await self._front.ask("model", name=route.name)
        described: dict[str, Any] = msgspec.json.decode(answer.body)
        folders = [
            each["folder"]
            for each in described.get("versions", ())
            if each["version"] == route.version
        ]
        if not folders:
            raise NotFound(f"Request for unknown model: '{route.name}' is not found")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, TextModel.load, route, Path(folders[0]))


def _failed(task: asyncio.Task[TextModel]) -> bool:
    # A folder may be put right without the route changing: who asks again has it read again.
    return task.done() and task.exception() is not None


def card(name: str) -> dict[str, str | int]:
    """What clients of this API read of a model."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "overcommit"}


def error_body(error: OvercommitError) -> bytes:
    """A refusal as clients of this API read it."""
    kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    return msgspec.json.encode(
        {"error": {"message": error.message, "type": kind, "param": None, "code": error.code}}
    )
