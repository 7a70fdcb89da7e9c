"""What the head of an inference request says, and the heads seen lately.

A client sends the same head again and again, byte for byte.  Parsing it costs ten calls back into
Python; finding it in a dict costs one.  So what was parsed once by the HTTP parser is remembered
under its bytes, and a request whose head is known and whose body is all there needs no parser.

Invariants
 1. A head is remembered only after the parser has accepted it, and only if all that it means is in
    `Head`: no chunks, no `Expect`, no compression, no end of the connection.
 2. At most HEADS_MAX are remembered, none longer than HEAD_BYTES_MAX.

Called by the protocol; one `Heads` per front end.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from overcommit.server.limits import HEAD_BYTES_MAX, HEADS_MAX

END = b"\r\n\r\n"


@dataclass(slots=True, frozen=True)
class Head:
    """A request for an inference: whom it asks, and what follows."""

    name: str
    version: str | None
    body_bytes: int
    json_bytes: int | None  # binary tensors follow the JSON
    accepts: bytes = b""  # how the answer may be compressed


class Heads(dict[bytes, Head]):
    """Heads by their bytes, the blank line included."""

    def remember(self, raw: bytes, head: Head) -> None:
        """Keep a head that the parser has accepted."""
        # A bare line feed may end a head for a lenient parser: then `raw` is not what it parsed.
        if len(raw) > HEAD_BYTES_MAX or b"\n\n" in raw or raw.find(b"\n\r\n") != len(raw) - 3:
            return
        if len(self) >= HEADS_MAX:
            self.clear()
        # Each length of a body has a head of its own, all of a model the same name.
        self[raw] = replace(head, name=sys.intern(head.name))
