"""How a process comes by the chunks of a CUDA arena, on its control socket.

    supervisor             mover                        supervisor            worker
      | Start                |                             | Start              |
      | Chunks  -----------> | take                        | Chunks  ---------> | take
      | <------- ChunksTaken |  ... until it has           | <----- ChunksTaken |  ... until it has
      | Chunks  -----------> |  what is held               | Chunks  ---------> |  all
      |                      | make                        |                    |
      | <------------ Chunks |  ... until all are made     |                    |
      | <------------- Ready |                             | <----------- Ready |

Invariants
 1. A chunk that was made is held by the supervisor, or dies with the mover that made it: a message
    arrives whole or not at all, so none is lost and none is made twice.
 2. No descriptor is left open here, whatever fails.

Called once, before `Ready`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from overcommit.runtime import messages
from overcommit.runtime.chunks import Chunks
from overcommit.runtime.config import CONTROL_FDS_MAX
from overcommit.runtime.driver import DriverError, Result
from overcommit.runtime.errors import ProtocolError
from overcommit.runtime.messages import ChunksTaken, Message, Stop

Receive = Callable[[], tuple[Message, dict[str, int]]]
Send = Callable[[Message, Sequence[int]], None]


def take_chunks(chunks: Chunks, count: int, receive: Receive, send: Send) -> bool:
    """Take over chunks until `count` of them are here; False: told to stop instead.

    Raises DriverError, and ProtocolError for any other message.
    """
    while len(chunks) < min(count, chunks.limit):
        message, fds = receive()
        left = list(fds.values())
        try:
            if isinstance(message, Stop):
                return False
            is_wanted = isinstance(message, messages.Chunks) and (
                not left or message.first == len(chunks)
            )
            if not isinstance(message, messages.Chunks) or not is_wanted:
                raise ProtocolError(f"chunk {len(chunks)} was expected, {message} came")
            if message.count:
                chunks.shrink(message.count)
            is_limit_only = not left
            while left:
                chunks.take(left.pop(0))
        finally:
            for fd in left:
                os.close(fd)
        if not is_limit_only:
            send(ChunksTaken(count=len(chunks)), ())
    return True


def make_chunks(chunks: Chunks, send: Send) -> None:
    """Make what is missing and send it to the supervisor.  Raises DriverError.

    A GPU that has no memory for all of them, because somebody else took it since, has fewer.
    """
    while not chunks.is_complete:
        first = len(chunks)
        fds: list[int] = []
        try:
            while len(fds) < CONTROL_FDS_MAX and not chunks.is_complete:
                try:
                    fds.append(chunks.make())
                except DriverError as error:
                    if error.result is not Result.OUT_OF_MEMORY or not len(chunks):
                        raise
                    chunks.limit = len(chunks)
            names = tuple(f"chunk{first + number}" for number in range(len(fds)))
            send(messages.Chunks(first=first, count=chunks.limit, fds=names), fds)
        finally:
            for fd in fds:
                os.close(fd)
