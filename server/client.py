"""A small client of a running server, for the command line.

Blocking, one request a call, standard library only: the command line must start fast.  Raises
errors of `runtime/errors.py`, with the server's own words where there are any.
"""

from __future__ import annotations

import http.client
import json
from typing import Any, Final, cast
from urllib.parse import quote

from overcommit.runtime.errors import OvercommitError, Unavailable
from overcommit.server.urls import place_of

TIMEOUT_S: Final = 120.0
ANSWER_BYTES_MAX: Final = 1 << 30


class ServerError(OvercommitError):
    """The server answered with an error."""

    code = "server_error"


def get_models(
    url: str, offset: int, limit: int, top: bool = False, state: str = "", reasons: bool = False
) -> dict[str, Any]:
    """Return one page of the server's models, by name or the most asked first, and its tiers.

    `state`: of those that are in it alone; `reasons`: of which something is to be said.
    """
    query = f"offset={offset}&limit={limit}"
    query += "&order=requests" if top else ""
    query += f"&state={quote(state)}" if state else ""
    query += "&reason=true" if reasons else ""
    page = _call(url, "GET", f"/v2/overcommit/models?{query}")
    if not {"models", "total", "device", "host"} <= page.keys():
        raise ServerError(f"what answers at {url} is no overcommit server: it lists no models")
    return page


def infer(url: str, model: str, version: str | None, request: bytes) -> dict[str, Any]:
    """Send a V2 inference request, given as JSON text."""
    path = f"/v2/models/{quote(model, safe='')}"
    if version:
        path += f"/versions/{quote(version, safe='')}"
    return _call(url, "POST", f"{path}/infer", request)


def _call(url: str, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
    connection, prefix = _connect(url)
    try:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, prefix + path, body, headers)
        response = connection.getresponse()
        answer = response.read(ANSWER_BYTES_MAX)
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(
            f"no server answers at {url}: {error or type(error).__name__}; start one with "
            f"`overcommit serve`, or name it with --url"
        ) from error
    finally:
        connection.close()
    try:
        value = json.loads(answer)
    except ValueError:
        value = None
    if response.status != 200:
        said = value.get("error") if isinstance(value, dict) else None
        raise ServerError(f"the server says {response.status}: {said or response.reason}")
    if not isinstance(value, dict):
        raise ServerError(
            f"what answers at {url} is no overcommit server: {path} is no JSON object"
        )
    return cast(dict[str, Any], value)


def _connect(url: str) -> tuple[http.client.HTTPConnection, str]:
    place = place_of(url)
    kind = http.client.HTTPSConnection if place.is_https else http.client.HTTPConnection
    return kind(place.host, place.port, timeout=TIMEOUT_S), place.path
