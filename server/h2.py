"""Frames of HTTP/2 (RFC 9113): their numbers, and how they are written.

Pure.  Called by the HTTP/2 connection and by what answers calls.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD: Final = struct.Struct(">BHBBI")  # length (24 bits), kind, flags, stream
HEAD_BYTES: Final = 9
WINDOW_BYTES: Final = 65_535  # that a peer starts with, for each stream and the connection
WINDOW_BYTES_MAX: Final = (1 << 31) - 1
FRAME_BYTES: Final = 16_384  # of a frame, unless the peer takes more
STREAM_MAX: Final = (1 << 31) - 1

# Kinds of frames.
DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

# Flags.
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
HAS_PRIORITY: Final = 0x20

# Settings.
HEADER_TABLE_SIZE: Final = 1
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6

_SETTING: Final = struct.Struct(">HI")
_WORD: Final = struct.Struct(">I")


class Code(enum.IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class ConnectionBroken(Exception):
    """The peer broke a rule after which nothing on the connection can be trusted."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Write a frame of up to FRAME_BYTES."""
    length = len(payload)
    return HEAD.pack(length >> 16, length & 0xFFFF, kind, flags, stream) + payload


def frame_head(length: int, kind: int, flags: int) -> bytes:
    """Write the first five bytes of a frame; the stream's number follows, as `stream_bytes`."""
    return HEAD.pack(length >> 16, length & 0xFFFF, kind, flags, 0)[:5]


def stream_bytes(stream: int) -> bytes:
    """Write a stream's number."""
    return _WORD.pack(stream)


def settings(values: dict[int, int]) -> bytes:
    """Write a SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*item) for item in values.items()))


def read_settings(payload: bytes) -> list[tuple[int, int]]:
    """Read the settings of a frame."""
    if len(payload) % _SETTING.size:
        raise ConnectionBroken(Code.FRAME_SIZE_ERROR, "SETTINGS of an odd length")
    return list(_SETTING.iter_unpack(payload))


def window_update(stream: int, nbytes: int) -> bytes:
    """Write a WINDOW_UPDATE: so many more bytes may be sent."""
    return frame(WINDOW_UPDATE, 0, stream, _WORD.pack(nbytes))


def reset(stream: int, code: Code) -> bytes:
    """Write a RST_STREAM."""
    return frame(RST_STREAM, 0, stream, _WORD.pack(code))


def goaway(last_stream: int, code: Code, text: str = "") -> bytes:
    """Write a GOAWAY: no stream after this one is looked at."""
    payload = _WORD.pack(last_stream) + _WORD.pack(code) + text.encode()[:256]
    return frame(GOAWAY, 0, 0, payload)


def read_word(payload: bytes) -> int:
    """Read the 31 bits of a payload that is one number."""
    if len(payload) != _WORD.size:
        raise ConnectionBroken(Code.FRAME_SIZE_ERROR, "a frame of four bytes has another length")
    (value,) = _WORD.unpack(payload)
    return int(value) & STREAM_MAX


def without_padding(payload: bytes) -> bytes:
    """Take the padding off a frame's payload."""
    if not payload or payload[0] >= len(payload):
        raise ConnectionBroken(Code.PROTOCOL_ERROR, "padding is longer than its frame")
    return payload[1 : len(payload) - payload[0]]
