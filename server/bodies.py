"""Reading and writing the JSON of endpoints that are not inference."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Request, Response

from overcommit.runtime.errors import BadRequest, shortened

Object = dict[str, Any]


def json_response(value: Any, status: int = 200) -> Response:
    """Answer with JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Answer with an error, in the one form that errors have."""
    body = msgspec.json.encode({"error": shortened(message)})
    return Response(body, status, headers, "application/json")


async def read_body(request: Request) -> bytearray:
    """Return what a client has sent.

    In one piece as it comes: thousands of small ones (`request.body`) leave a heap of holes behind.
    """
    body = bytearray()
    async for piece in request.stream():
        body += piece
    return body


async def read_object(request: Request) -> Object:
    """Return the JSON object that a client has sent; nothing at all is an empty one.

    Raises BadRequest.
    """
    data = await read_body(request)
    try:
        value = msgspec.json.decode(data) if data.strip() else {}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"failed to parse the request JSON buffer: {error}") from error
    except RecursionError as error:
        raise BadRequest("the request's JSON is nested too deeply") from error
    if not isinstance(value, dict):
        raise BadRequest("the request must be a JSON object")
    return value


def field(value: Object, name: str, kind: type, default: Any = None) -> Any:
    """Return a field of this type; `default`, where it is absent.  Raises BadRequest."""
    found = value.get(name, default)
    if found is not default and (
        not isinstance(found, kind) or (kind is int and isinstance(found, bool))
    ):
        wanted = {bool: "true or false", int: "a whole number", str: "a string", dict: "an object"}
        raise BadRequest(f"'{name}' must be {wanted[kind]}")
    return found
