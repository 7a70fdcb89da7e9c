"""The binary tensor extension: tensors behind the JSON, raw, little-endian, row-major.

A request says with `Inference-Header-Content-Length` how long its JSON is and with each input's
`binary_data_size` how much of what follows is that input's.  BYTES elements are a 4-byte length and
their bytes.  Everything here is checked against what is really there.

Pure; `split` and `split_bytes` raise BadRequest.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Sequence
from typing import Final

from overcommit.runtime.errors import BadRequest, PayloadTooLarge

LENGTH_BYTES: Final = 4
_LENGTH: Final = struct.Struct("<I")

# Blocks hold native order and the wire is little-endian: the bytes are copied as they are.
assert sys.byteorder == "little"


def split(body: bytes, json_bytes: int | None) -> tuple[bytes | memoryview, memoryview]:
    """Cut a body into its JSON and its binary part."""
    if json_bytes is None:
        return body, memoryview(b"")
    if not 0 <= json_bytes <= len(body):
        raise BadRequest(
            f"Inference-Header-Content-Length is {json_bytes}, the body has {len(body)} bytes"
        )
    view = memoryview(body)
    return view[:json_bytes], view[json_bytes:]


def split_bytes(view: memoryview) -> list[bytes]:
    """Return the elements of a BYTES tensor."""
    elements: list[bytes] = []
    data, start, at, end = bytes(view), 0, 0, len(view)
    unpack = _LENGTH.unpack_from
    try:
        while at < end:
            start = at + LENGTH_BYTES
            at = start + unpack(data, at)[0]
            elements.append(data[start:at])
    except struct.error as error:
        raise BadRequest("BYTES data ends inside the length of an element") from error
    if at > end:
        raise BadRequest(f"BYTES data ends inside an element of {at - start} bytes")
    return elements


def count_bytes_elements(view: memoryview) -> int:
    """Count the elements of a BYTES tensor, checking every length."""
    count, at, end = 0, 0, len(view)
    unpack = _LENGTH.unpack_from
    try:
        while at < end:
            at += LENGTH_BYTES + unpack(view, at)[0]
            count += 1
    except struct.error as error:
        raise BadRequest("BYTES data ends inside the length of an element") from error
    if at > end:
        raise BadRequest("BYTES data ends inside an element")
    return count


def join_bytes(elements: Sequence[bytes]) -> bytes:
    """Return the bytes of a BYTES tensor."""
    pack = _LENGTH.pack
    return b"".join([part for element in elements for part in (pack(len(element)), element)])


def decompress(body: bytes, encoding: bytes, limit: int) -> bytes:
    """Undo a request's Content-Encoding, gzip or deflate, up to `limit` bytes of result.

    Raises BadRequest for a broken stream, PayloadTooLarge for one that would grow over the limit.
    """
    # "deflate" means zlib by the standard and raw deflate by some clients; 32 finds gzip and zlib.
    for window in (32 + zlib.MAX_WBITS, -zlib.MAX_WBITS):
        stream = zlib.decompressobj(window)
        try:
            data = stream.decompress(body, limit + 1)
        except zlib.error as error:
            if encoding == b"deflate" and window > 0:
                continue
            raise BadRequest(f"the body is not valid {encoding.decode()}: {error}") from error
        if len(data) > limit:
            raise PayloadTooLarge(
                f"the body is over {limit} bytes when decompressed, which is the limit; send less "
                f"in one request or raise body_bytes_max"
            )
        if not stream.eof or stream.unused_data:
            raise BadRequest(f"the body is not one complete {encoding.decode()} stream")
        return data
    raise BadRequest("the body is neither zlib nor raw deflate data")
