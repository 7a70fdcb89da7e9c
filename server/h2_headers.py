"""Header blocks of an HTTP/2 connection: put together of their frames, read, remembered.

Invariants
 1. Every block goes through the decoder once, in the order in which it was sent, unless an equal one
    left the table as it was: even one that nobody wants may change the table.
 2. What is kept of blocks that are not whole counts against the budget that bodies count against.

Called by the HTTP/2 connection; raises ConnectionBroken and CompressionError, which end it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from overcommit.server import hpack
from overcommit.server.h2 import Code, ConnectionBroken
from overcommit.server.limits import BODIES_BYTES_MAX, H2_BLOCK_BYTES_MAX, H2_HEADS_MAX

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd
    from overcommit.server.grpc_wire import CallHead

ReadHead = Callable[[Sequence[hpack.Header] | None], "CallHead"]


class Heads(dict[bytes, "CallHead"]):
    """Header block -> what it says; blocks that were not seen lately are decoded."""

    def __init__(self, read_head: ReadHead) -> None:
        super().__init__()
        self._read_head = read_head
        self._decoder = hpack.Decoder()
        self._generation = 0  # of the decoder, in which the blocks say this

    def __missing__(self, block: bytes) -> CallHead:
        headers = self._decoder.decode(block)
        head = self._read_head(headers)
        if self._generation != self._decoder.generation or len(self) >= H2_HEADS_MAX:
            self._generation = self._decoder.generation
            self.clear()
            # A block that changes the table means something else the next time.
        elif headers is not None:
            self[block] = head
        return head


class Unfinished:
    """The pieces of the one block that is under way."""

    def __init__(self, front: FrontEnd) -> None:
        self._front = front
        self._pieces: list[bytes] = []
        self._held = 0  # of the budget

    def add(self, piece: bytes) -> None:
        """Keep a piece."""
        self.hold(len(piece))
        self._pieces.append(piece)

    def hold(self, nbytes: int) -> None:
        """Count bytes of it that are, or will be, kept somewhere."""
        self._held += nbytes
        self._front.bodies_bytes += nbytes
        if self._held > H2_BLOCK_BYTES_MAX:
            text = f"a header block is over {H2_BLOCK_BYTES_MAX} bytes"
            raise ConnectionBroken(Code.ENHANCE_YOUR_CALM, text)
        if self._front.bodies_bytes > BODIES_BYTES_MAX:
            raise ConnectionBroken(Code.ENHANCE_YOUR_CALM, "too much is being received")

    def let_go(self, nbytes: int) -> None:
        """Bytes that were held are kept there no more."""
        self._held -= nbytes
        self._front.bodies_bytes -= nbytes

    def take(self) -> bytes:
        """Return all of it, and keep nothing."""
        block = b"".join(self._pieces)
        self._pieces.clear()
        self.let_go(self._held)
        return block
