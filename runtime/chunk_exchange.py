"""How a process comes by the chunks of a CUDA arena, on its control socket.

    supervisor             mover                        supervisor            worker
      | Start                |                             | Start              |
      | Chunks  -----------> | take                        | Chunks  ---------> | take
      | <------- ChunksTaken |  ... until it has           | <----- ChunksTaken |  ... until it has
      | Chunks  -----------> |  what is held               | Chunks  ---------> |  all
      |                      | make                        |                    |
      | <------------ Chunks |  ... until all are made     |                    |
      | <------------- Ready |                             | <----------- Ready |
      |                      |                             |                    |
      | Chunks, without any  |                             | the same ------->  | gives back
      | ------------------>  | gives back                  | <----- ChunksTaken |  what is over
      | <------- ChunksTaken |  what is over               |                    |
      | MakeChunks --------> | makes, maps                 |                    |
      | <------------ Chunks |                             | Chunks ----------> | take
      |                      |                             | <----- ChunksTaken |

Invariants
 1. A chunk that was made is held by the supervisor, or dies with the mover that made it: a message
    arrives whole or not at all, so none is lost and none is made twice.
 2. No descriptor is left open here, whatever fails.

Called before `Ready`; and later, when DEVICE shrinks and grows, for what there is more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

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
        try:
            if isinstance(message, Stop):
                return False
            is_wanted = isinstance(message, messages.Chunks) and (
                not fds or message.first == len(chunks)
            )
            if not isinstance(message, messages.Chunks) or not is_wanted:
                raise ProtocolError(f"chunk {len(chunks)} was expected, {message} came")
        except BaseException:
            _close(fds.values())
            raise
        take_message(chunks, message, fds)
        send(ChunksTaken(count=len(chunks)), ())
    return True


def take_message(chunks: Chunks, message: messages.Chunks, fds: dict[str, int]) -> None:
    """Give back what is over, take over what came.  Raises DriverError.

    What is over, nobody has mapped any more.
    """
    left = list(fds.values())
    try:
        if message.count:
            chunks.resize(message.count)
        while left:
            chunks.take(left.pop(0))
    finally:
        _close(left)


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def make_chunks(chunks: Chunks, send: Send, use: Callable[[], None] = lambda: None) -> None:
    """Make what is missing and send it to the supervisor, `use` it before.  Raises DriverError.

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
            use()
            send(messages.Chunks(first=first, count=chunks.limit, fds=names), fds)
        finally:
            _close(fds)
