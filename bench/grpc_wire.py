"""gRPC requests and answers as bytes: ModelInfer with one FP32 tensor, and the frames around it.

Written apart from the server's code on purpose, as `wire` is: protobuf and HTTP/2 by hand, no more
of them than one request needs.  A connection's first header block fills the server's table, as the
usual clients do; later ones are a few indices.

Pure but for `ask`; `decode` raises ValueError for an answer that is none.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"
DATA: Final = 0
HEADERS: Final = 1
RST_STREAM: Final = 3
SETTINGS: Final = 4
PING: Final = 6
GOAWAY: Final = 7
END_STREAM: Final = 1
ACK: Final = 1
HEAD_BYTES: Final = 9
_HEAD: Final = struct.Struct(">BHBBI")
_PREFIX_BYTES: Final = 5

Array = NDArray[np.float32]


# --- HTTP/2 -------------------------------------------------------------------------------------
def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Write a frame."""
    return _HEAD.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


def read_head(data: bytes, at: int) -> tuple[int, int, int, int]:
    """Read the head of a frame: length, kind, flags, stream."""
    high, low, kind, flags, stream = _HEAD.unpack_from(data, at)
    return high << 16 | low, kind, flags, stream


def greeting() -> bytes:
    """What a client says first: it takes answers of 2 GiB before it has to say so again."""
    window = (1 << 31) - 1
    settings = struct.pack(">HIHI", 2, 0, 4, window)  # no push; each stream's window
    update = struct.pack(">I", window - 65_535)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    return preface + frame(SETTINGS, 0, 0, settings) + frame(8, 0, 0, update)


def _literal(name: bytes, value: bytes, index: int = 0) -> bytes:
    """A header that the server is to keep; names and values are shorter than 127 bytes."""
    head = bytes((0x40 | index,)) if index else b"\x40" + bytes((len(name),)) + name
    return head + bytes((len(value),)) + value


FIRST_HEADERS: Final = (
    b"\x83\x86"  # POST, http
    + _literal(b":path", METHOD.encode(), 4)
    + _literal(b":authority", b"localhost", 1)
    + _literal(b"te", b"trailers")
    + _literal(b"content-type", b"application/grpc", 31)
    + _literal(b"user-agent", b"overcommit-bench", 58)
)
NEXT_HEADERS: Final = b"\x83\x86\xc2\xc1\xc0\xbf\xbe"  # the same, from the table: 66 down to 62


def call(stream: int, message: bytes, *, is_first: bool) -> bytes:
    """A call with one message."""
    headers = FIRST_HEADERS if is_first else NEXT_HEADERS
    return frame(HEADERS, 4, stream, headers) + frame(DATA, END_STREAM, stream, message)


# --- messages -----------------------------------------------------------------------------------
def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def _field(number: int, data: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(data)) + data


def _tensor(name: str, array: Array) -> bytes:
    shape = b"".join(_varint(size) for size in array.shape)
    return _field(1, name.encode()) + _field(2, b"FP32") + _field(3, shape)


def request(model: str, input_name: str, output: str, array: Array) -> bytes:
    """A ModelInferRequest behind its prefix."""
    message = _field(1, model.encode()) + _field(5, _tensor(input_name, array))
    message += _field(6, _field(1, output.encode())) + _field(7, array.tobytes())
    return b"\0" + len(message).to_bytes(4, "big") + message


def answer(model: str, output: str, array: Array) -> bytes:
    """A ModelInferResponse behind its prefix."""
    message = _field(1, model.encode()) + _field(2, b"1")
    message += _field(5, _tensor(output, array)) + _field(6, array.tobytes())
    return b"\0" + len(message).to_bytes(4, "big") + message


def _fields(data: bytes) -> list[tuple[int, bytes]]:
    """Fields with a length; ValueError for any other."""
    found: list[tuple[int, bytes]] = []
    at = 0
    while at < len(data):
        tag = data[at]
        at += 1
        size = shift = 0
        while True:
            size |= (data[at] & 127) << shift
            shift += 7
            at += 1
            if data[at - 1] < 128:
                break
        if tag & 7 != 2 or at + size > len(data):
            raise ValueError("the answer is no ModelInferResponse")
        found.append((tag >> 3, data[at : at + size]))
        at += size
    return found


def decode(body: bytes, output: str) -> tuple[str, Array]:
    """Return the model and the output's values of an answer of one output."""
    if len(body) < _PREFIX_BYTES or int.from_bytes(body[1:_PREFIX_BYTES], "big") + 5 != len(body):
        raise ValueError("the answer is no gRPC message")
    try:
        fields = _fields(body[_PREFIX_BYTES:])
        values = dict(fields)
        tensor = dict(_fields(values[5]))
        if (tensor[1], tensor[2]) != (output.encode(), b"FP32"):
            raise ValueError(f"the output is {tensor[1]!r}, {tensor[2]!r}")
        return values.get(1, b"").decode(), np.frombuffer(values[6], np.float32)
    except (IndexError, KeyError) as error:
        raise ValueError("the answer is no ModelInferResponse") from error


def ask(connection: socket.socket, message: bytes) -> bytes | None:
    """Send one call; return the message that answers it, None when it fails."""
    connection.sendall(greeting() + call(1, message, is_first=True))
    data = answer = b""
    while part := connection.recv(65_536):
        data += part
        while len(data) >= HEAD_BYTES:
            length, kind, flags, stream = read_head(data, 0)
            if len(data) < HEAD_BYTES + length:
                break
            payload, data = data[HEAD_BYTES : HEAD_BYTES + length], data[HEAD_BYTES + length :]
            if kind == DATA:
                answer += payload
            if kind == GOAWAY or (stream == 1 and flags & END_STREAM):
                return answer or None
    return None
