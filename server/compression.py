"""Compression of answers over HTTP: which one a client takes, and how it is done.

Only what a client asks for is compressed, and only from COMPRESS_BYTES_MIN on; fast rather than small,
because numbers hardly shrink more with a higher level.

Pure.
"""

from __future__ import annotations

import zlib
from typing import Final

_LEVEL: Final = 1
_WINDOW: Final = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}


def choose(value: bytes) -> bytes:
    """Read Accept-Encoding: b"gzip", b"deflate", or b"" for neither; gzip where both are as good."""
    best, best_weight = b"", 0.0
    for part in value.lower().split(b","):
        name, _, parameter = part.partition(b";")
        name = name.strip()
        weight = 1.0
        if parameter.strip().startswith(b"q="):
            try:
                weight = float(parameter.strip()[2:])
            except ValueError:
                weight = 0.0
        if name in _WINDOW and (
            weight > best_weight or (weight == best_weight and name == b"gzip")
        ):
            best, best_weight = name, weight
    return best if best_weight > 0 else b""


def compress(body: bytes, encoding: bytes) -> bytes:
    """Return the body as gzip, or deflate in zlib's format as the standard has it."""
    stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW[encoding])
    return stream.compress(body) + stream.flush()
