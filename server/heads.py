"""What the head of an inference request says, and the heads seen lately.

A client sends the same head again and again, byte for byte.  Parsing it costs ten calls back into
Python; finding it in a dict costs one.  So what was parsed once by the HTTP parser is remembered
under its bytes, and a request whose head is known and whose body is all there needs no parser.

A head is kept in two parts, the request line and the header lines.  The second is the same for every
model that a client asks, and hundreds of models with bodies of some lengths each take no more room
than their lines.  The parts mean the same in any combination: what the parser makes of the header
lines depends on the method and the protocol's version alone, and these are the same in all lines.

Invariants
 1. A part is remembered only after the parser has accepted a head of which it was a part, and only if
    all that it means is in `Target` and `Fields`: POST, HTTP/1.1, no chunks, no `Expect`, no
    compression, no end of the connection.
 2. At most LINES_MAX and FIELDS_MAX are remembered, none longer than HEAD_BYTES_MAX.
 3. What a target remembers of its route is used only while no route has changed since.

Called by the protocol; one `Heads` per front end.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from overcommit.server.limits import FIELDS_MAX, HEAD_BYTES_MAX, LINES_MAX

if TYPE_CHECKING:
    from overcommit.server.inference import Prepared
    from overcommit.server.plans import RoutePlans
    from overcommit.server.templates import Template

LINE_END: Final = b"\r\n"
END: Final = b"\r\n\r\n"


@dataclass(slots=True, eq=False)
class Target:
    """Whom a request line asks."""

    name: str
    version: str | None
    plans: RoutePlans | None = None  # of the route that it meant at the time of `epoch`
    epoch: int = 0  # of `Plans`
    template: Template | None = None  # that read its last requests
    prepared: Prepared | None = None  # what these have in common

    def point_at(self, plans: RoutePlans, epoch: int) -> None:
        """It means this route now."""
        self.plans, self.epoch = plans, epoch
        self.template = self.prepared = None


@dataclass(slots=True, frozen=True)
class Fields:
    """What follows, by the header lines."""

    body_bytes: int
    json_bytes: int | None  # binary tensors follow the JSON
    accepts: bytes = b""  # how the answer may be compressed
    asks: str | None = None  # for a version, where the request line does not


class Heads:
    """Both parts by their bytes, line ends included."""

    def __init__(self) -> None:
        self.targets: dict[bytes, Target] = {}
        self.fields: dict[bytes, Fields] = {}

    def remember(self, raw: bytes, url: bytes, target: Target, fields: Fields) -> None:
        """Keep a head that the parser has accepted, whose line has this URL."""
        line = b"POST %b HTTP/1.1\r\n" % url
        if len(raw) > HEAD_BYTES_MAX or not raw.startswith(line):
            return
        rest = raw[len(line) :]
        # A bare line feed may end a head for a lenient parser: then `raw` is not what it parsed.
        if b"\n\n" in rest or rest.startswith(b"\n") or rest.find(b"\n\r\n") != len(rest) - 3:
            return
        if line not in self.targets:
            if len(self.targets) >= LINES_MAX:
                self.targets.clear()
            target.name = sys.intern(target.name)
            self.targets[line] = target
        if len(self.fields) >= FIELDS_MAX:
            self.fields.clear()
        self.fields[rest] = fields
