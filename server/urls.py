"""Where a server is, from what its user types.

Standard library only: the command line must start fast.  Called by the clients.
"""

from __future__ import annotations

from typing import Final, NamedTuple
from urllib.parse import urlsplit

from overcommit.runtime.errors import BadRequest

DEFAULT_URL: Final = "http://127.0.0.1:8000"


class Place(NamedTuple):
    """A server: `path` stands in front of all others, and does not end in a slash."""

    is_https: bool
    host: str
    port: int
    path: str


def place_of(url: str) -> Place:
    """Read a URL; without a scheme it is http.  Raises BadRequest."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise BadRequest(f"'{url}' is no URL: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise BadRequest(f"'{url}' is no URL: give it as {DEFAULT_URL}")
    is_https = parts.scheme == "https"
    return Place(is_https, host, port or (443 if is_https else 80), parts.path.rstrip("/"))
