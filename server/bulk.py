"""Receiving a long body where it will be read.

For the length of one body a `BulkReceiver` stands in the connection's place: the kernel copies the
bytes straight into the request's ingress block, and nothing is parsed, cut or joined on the way.

Invariants
 1. It reads exactly the bytes of this body: what follows stays in the kernel for the protocol.
 2. Whatever ends the connection is told to the protocol, which owns the block.

Put in place and taken away by the protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from overcommit.server.protocol import HotProtocol


class BulkReceiver(asyncio.BufferedProtocol):
    """Fills the pieces of a block in order."""

    def __init__(self, protocol: HotProtocol, space: Sequence[memoryview]) -> None:
        self._protocol = protocol
        self._space = [piece for piece in reversed(space) if len(piece)]

    def take(self, data: memoryview) -> None:
        """Put away what came before the receiver was in place."""
        while len(data):
            piece = self._space.pop()
            count = min(len(piece), len(data))
            piece[:count] = data[:count]
            if count < len(piece):
                self._space.append(piece[count:])
            data = data[count:]

    @property
    def is_done(self) -> bool:
        """Whether every byte is there."""
        return not self._space

    def get_buffer(self, sizehint: int) -> memoryview:
        """Say where the next bytes go."""
        return self._space[-1]

    def buffer_updated(self, nbytes: int) -> None:
        """Go on behind what was received."""
        piece = self._space.pop()
        if nbytes < len(piece):
            self._space.append(piece[nbytes:])
        elif not self._space:
            self._protocol.on_bulk_done()

    def eof_received(self) -> None:
        """The client says no more: its request will never be whole."""
        self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the protocol."""
        self._space.clear()
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        """Tell the protocol."""
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Tell the protocol."""
        self._protocol.resume_writing()
