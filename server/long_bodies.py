"""Long JSON bodies: decoded by another thread, so that other clients need not wait for them.

Decoding holds the GIL, and a loop that wants it gets it between two pieces: numbers are decoded in
pieces of PIECE_BYTES, cut at commas, which is no slower and takes less memory than all at once.  What
does not take long, and what needs the version's plans, is done by the loop afterwards.

Invariants
 1. `Decoded.prepare` returns and raises what `inference.prepare` would.
 2. One body is decoded at a time: each thread more would be one more to wait for.

Called by the exchange.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from overcommit.runtime.errors import BadRequest
from overcommit.runtime.payload import DATATYPES
from overcommit.server import codec
from overcommit.server.failures import named
from overcommit.server.inference import Data, Prepared, prepare_decoded
from overcommit.server.limits import DECODE_PIECE_BYTES
from overcommit.server.plans import RoutePlans

THREAD: Final = ThreadPoolExecutor(1, "decode")


class Decoded:
    """A body, decoded but not checked against a version."""

    def __init__(self, body: bytes) -> None:
        """Decode; what is wrong is said by `prepare`."""
        self._fault: BadRequest | None = None
        self._data: dict[int, bytes | BadRequest] = {}  # by the identity of its text
        try:
            self._request = codec.decode_request(body)
        except BadRequest as error:
            self._fault = error
            return
        for item in self._request.inputs:
            if item.datatype in DATATYPES and len(memoryview(item.data)) > DECODE_PIECE_BYTES:
                try:
                    self._data[id(item.data)] = _decode(item)
                except BadRequest as error:
                    self._data[id(item.data)] = error

    def prepare(
        self, plans: RoutePlans, body: bytes, json_bytes: int | None
    ) -> tuple[Prepared, Sequence[Data]]:
        """Check it.  Raises BadRequest that names the model."""
        if self._fault is not None:
            raise named(self._fault, plans.route)
        return prepare_decoded(plans, self._request, memoryview(b""), self._data_of)

    def _data_of(self, text: msgspec.Raw, datatype: str, shape: tuple[int, ...]) -> bytes:
        found = self._data.get(id(text))
        if found is None:
            return codec.decode_data(text, datatype, shape)
        if isinstance(found, BadRequest):
            raise found
        return found


def _decode(item: codec.RequestInput) -> bytes:
    if item.datatype == "BYTES":
        return codec.decode_data(item.data, item.datatype, item.shape)
    pieces = _pieces(codec.flat_text(item.data, item.shape))
    return b"".join([codec.decode_data(piece, item.datatype, item.shape) for piece in pieces])


def _pieces(text: bytes) -> Iterator[msgspec.Raw]:
    """Cut a flat list of numbers into several."""
    at, end = text.index(b"[") + 1, text.rindex(b"]")
    while True:
        comma = text.find(b",", at + DECODE_PIECE_BYTES, end)
        yield msgspec.Raw(b"[%b]" % text[at : comma if comma >= 0 else end])
        if comma < 0:
            return
        at = comma + 1
