"""Trace and log settings as clients read and write them, over HTTP and gRPC.

What they mean is `runtime/wire_settings.py`; the supervisor keeps them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from overcommit.server.questions import ask_value

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd

Object = dict[str, Any]


async def trace_settings(front: FrontEnd, model: str = "", changes: Object | None = None) -> Object:
    """Change trace settings of a model, or of the server, and return them.

    `changes` maps a setting to its value, a string or a list of strings; None clears it.
    Raises BadRequest.
    """
    return await _ask(front, "trace", changes, model=model)


async def log_settings(front: FrontEnd, changes: Object | None = None) -> Object:
    """Change log settings and return them.  Raises BadRequest."""
    return await _ask(front, "log", changes)


async def _ask(front: FrontEnd, operation: str, changes: Object | None, **arguments: str) -> Object:
    if changes is not None:
        arguments["changes"] = msgspec.json.encode(changes).decode()
    value: Object = await ask_value(front, operation, **arguments)
    return value
