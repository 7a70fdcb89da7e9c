"""How gRPC lies on HTTP/2: messages with a prefix, time-outs, status, compression.

Pure.  `CallHead` is what the headers of a call say; `read_head` finds every fault of them.
Called by the calls.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final
from urllib.parse import quote

from overcommit.runtime.errors import OvercommitError
from overcommit.server import binary, hpack
from overcommit.server.limits import (
    GRPC_MESSAGE_CHARS_MAX,
    GRPC_TIMEOUT_S_MAX,
    H2_HEADERS_BYTES_MAX,
)
from overcommit.server.routing import CANARY, STABLE

PREFIX_BYTES: Final = 5  # of a message: whether it is compressed, and its length
ENCODINGS: Final = ("identity", "gzip", "deflate")
CONTENT_TYPE: Final = b"application/grpc"

_TIMEOUT: Final = re.compile(rb"(\d{1,8})([HMSmun])")
_UNIT_NS: Final = {
    b"H": 3600 * 10**9,
    b"M": 60 * 10**9,
    b"S": 10**9,
    b"m": 10**6,
    b"u": 10**3,
    b"n": 1,
}
_CANARY: Final = {b"always": CANARY, b"never": STABLE}
_LEVEL: Final = 1  # of compression: numbers hardly shrink more with a higher one


class Status(IntEnum):
    """The codes of gRPC that this server answers with."""

    OK = 0
    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class CallFailed(Exception):
    """A call ends with this status."""

    def __init__(self, status: Status, text: str, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.retry_after_s = retry_after_s


def failure_of(error: OvercommitError) -> CallFailed:
    """Say an error of ours in gRPC's words."""
    return CallFailed(Status[error.grpc_code], error.message, error.retry_after_s)


@dataclass(slots=True, frozen=True)
class CallHead:
    """What the headers of a call say."""

    path: str
    timeout_ns: int | None  # None: it may take as long as the server allows
    encoding: str  # of compressed messages
    answers_in: str  # how to compress answers: as the client does
    wants_status: bool  # a stream ends with the status of its first error (triton_grpc_error)
    version: str | None  # in the place of one, for requests that name none (x-overcommit-canary)
    fault: CallFailed | None  # what is wrong with them


def read_head(headers: Sequence[hpack.Header]) -> CallHead:
    """Read the headers of a call."""
    known = dict(headers)
    fault: CallFailed | None = None
    if known.get(b":method") != b"POST":
        fault = CallFailed(Status.UNIMPLEMENTED, "gRPC calls are POST requests")
    elif not known.get(b"content-type", b"").startswith(CONTENT_TYPE):
        fault = CallFailed(Status.INVALID_ARGUMENT, "gRPC calls have the type application/grpc")
    encoding = known.get(b"grpc-encoding", b"identity").decode("latin-1")
    if encoding not in ENCODINGS:
        fault = CallFailed(
            Status.UNIMPLEMENTED,
            f"messages are compressed with '{encoding}'; this server knows {', '.join(ENCODINGS)}",
        )
    timeout_ns = None
    text = known.get(b"grpc-timeout")
    if text is not None:
        found = _TIMEOUT.fullmatch(text)
        if found is None:
            fault = CallFailed(Status.INVALID_ARGUMENT, "grpc-timeout is no time")
        else:
            timeout_ns = int(found[1]) * _UNIT_NS[found[2]]
            timeout_ns = min(timeout_ns, int(GRPC_TIMEOUT_S_MAX * 1e9))
    accepted = known.get(b"grpc-accept-encoding", b"").decode("latin-1").replace(" ", "").split(",")
    return CallHead(
        path=known.get(b":path", b"").decode("latin-1"),
        timeout_ns=timeout_ns,
        encoding=encoding,
        answers_in=encoding if encoding in accepted else "identity",
        wants_status=known.get(b"triton_grpc_error", b"").lower() == b"true",
        version=_CANARY.get(known.get(b"x-overcommit-canary", b"").strip().lower()),
        fault=fault,
    )


def _too_long() -> CallHead:
    text = (
        f"the call's metadata is over {H2_HEADERS_BYTES_MAX} bytes, which is the limit, counting "
        f"{hpack.ENTRY_BYTES} for each entry beside its name and value; send less"
    )
    head = read_head([(b":method", b"POST"), (b"content-type", CONTENT_TYPE)])
    return replace(head, fault=CallFailed(Status.RESOURCE_EXHAUSTED, text))


TOO_LONG: Final = _too_long()  # what is known of a call whose headers were dropped


# --- messages -----------------------------------------------------------------------------------
def prefix(length: int, *, is_compressed: bool = False) -> bytes:
    """Write what stands before a message of this length."""
    return bytes((is_compressed,)) + length.to_bytes(4, "big")


def compress(message: bytes, encoding: str) -> bytes:
    """Compress an answer."""
    if encoding == "gzip":
        return gzip.compress(message, _LEVEL, mtime=0)
    return zlib.compress(message, _LEVEL)


def decompress(message: bytes, encoding: str, limit: int) -> bytes:
    """Undo a message's compression.  Raises BadRequest, and PayloadTooLarge over the limit."""
    return binary.decompress(message, encoding.encode(), limit)


# --- header blocks of answers -------------------------------------------------------------------
def _begin(encoding: str) -> bytes:
    headers = [(b":status", b"200"), (b"content-type", CONTENT_TYPE)]
    headers.append((b"grpc-accept-encoding", b"identity,gzip,deflate"))
    if encoding != "identity":
        headers.append((b"grpc-encoding", encoding.encode()))
    return hpack.encode(headers)


BEGIN: Final = {encoding: _begin(encoding) for encoding in ENCODINGS}
TRAILERS_OK: Final = hpack.encode([(b"grpc-status", b"0")])


def trailers(failure: CallFailed | None, *, is_only: bool) -> bytes:
    """Write how a call ended; `is_only`: nothing was sent before."""
    if failure is None:
        return TRAILERS_OK
    headers = [(b":status", b"200"), (b"content-type", CONTENT_TYPE)] if is_only else []
    text = quote(failure.text[:GRPC_MESSAGE_CHARS_MAX], safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}")
    headers.append((b"grpc-status", str(int(failure.status)).encode()))
    headers.append((b"grpc-message", text.encode()))
    if failure.retry_after_s is not None:
        pause_ms = max(1, int(failure.retry_after_s * 1000 + 0.999))
        headers.append((b"grpc-retry-pushback-ms", str(pause_ms).encode()))
    return hpack.encode(headers)
