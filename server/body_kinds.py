"""Which exchange reads a request's body, by its Content-Type: V2's own unless another kind is named.

Called by the protocol, for heads that it has not seen before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from overcommit.server import msgpack_body, shared_body
from overcommit.server.exchange import Exchange

_KINDS: Final[Mapping[bytes, type[Exchange]]] = {
    **dict.fromkeys(msgpack_body.MEDIA_TYPES, msgpack_body.MsgpackExchange),
    shared_body.MEDIA_TYPE: shared_body.SharedExchange,
}


def exchange_of(headers: Sequence[tuple[bytes, bytes]]) -> type[Exchange]:
    """Return what reads the body that these headers announce."""
    for name, value in headers:
        if name == b"content-type":
            return _KINDS.get(value.split(b";", 1)[0].strip().lower(), Exchange)
    return Exchange
