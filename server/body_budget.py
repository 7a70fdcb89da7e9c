"""How much of clients' bodies is in memory on the way through the app.

Invariants
 1. No more of a body is read than its path takes: `--max-body` where bodies are long by nature,
    SMALL_BODY_BYTES elsewhere.  One that says it is longer is not read at all.
 2. What is read of long bodies counts against BODIES_BYTES_MAX, which /infer and gRPC count against
    too, until the request is answered or its client is gone.

An ASGI middleware: what a body costs is counted where it is received, so no endpoint can forget it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overcommit.runtime.errors import PayloadTooLarge
from overcommit.server import failures
from overcommit.server.limits import BODIES_BYTES_MAX, SMALL_BODY_BYTES

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd

_LONG: Final = re.compile(r"/v1/embeddings|/v2/repository/models/[^/]+/load")


class BodyBudget:
    """See the module."""

    def __init__(self, app: ASGIApp, front: FrontEnd) -> None:
        self._app = app
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; where it reads a body that is too much, PayloadTooLarge or Overloaded is raised."""
        front = self._front
        limit, remedy = (
            front.settings.body_bytes_max,
            "send less in one request or raise --max-body",
        )
        if not _LONG.fullmatch(scope["path"]) and limit > SMALL_BODY_BYTES:
            limit, remedy = SMALL_BODY_BYTES, "this path takes no more"
        headers = scope["headers"]
        said = next((int(value) for name, value in headers if name == b"content-length"), 0)
        taken = held = 0

        async def counted() -> Message:
            nonlocal taken, held
            # A client that waits for `100 Continue` gets that from `receive`.
            message = await receive() if said <= limit else {}
            taken += len(message.get("body", b""))
            if max(said, taken) > limit:
                raise PayloadTooLarge(
                    f"the body is over {limit} bytes, which is the limit; {remedy}"
                )
            if taken > SMALL_BODY_BYTES:
                front.bodies_bytes += taken - held
                held = taken
                if front.bodies_bytes > BODIES_BYTES_MAX:
                    raise failures.bodies_full()
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            front.bodies_bytes -= held
