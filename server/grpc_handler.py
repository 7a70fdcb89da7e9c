"""A method that takes and returns messages, as the bytes that a call has.

Called by the rooms with methods.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from overcommit.server.grpc_wire import CallFailed, Status

M = TypeVar("M", bound=Message)

Handler = Callable[[bytes], Awaitable[bytes]]


def handler(kind: type[M], method: Callable[[M], Awaitable[Message]]) -> Handler:
    """Make a handler of bytes.  It raises CallFailed for bytes that are no such message."""

    async def handle(data: bytes) -> bytes:
        try:
            request = kind.FromString(data)
        except DecodeError as error:
            raise CallFailed(
                Status.INVALID_ARGUMENT, f"the message is no {kind.__name__}: {error}"
            ) from error
        return (await method(request)).SerializeToString()

    return handle
