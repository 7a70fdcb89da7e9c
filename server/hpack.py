"""Header compression of HTTP/2 (RFC 7541): reading what clients send, writing what we answer.

Reading keeps the table that the client fills.  Writing uses none: an answer has the same three
headers each time, as literals that are made once, so nothing has to be kept in step.

Invariants
 1. The table holds at most `TABLE_BYTES` by the RFC's count, whatever the client asks for.
 2. Of a list over H2_HEADERS_BYTES_MAX nothing is kept but what it does to the table: its call can
    be refused alone (RFC 9113, 10.5.1).
 3. A block that decodes to over H2_BLOCK_BYTES_MAX is refused: a few bytes may name a long entry again
    and again.
 4. `generation` changes with the table: as long as it does not, equal blocks mean the same.

Pure; raises `CompressionError`, after which the connection is lost (RFC 9113, 4.3).
Called by the HTTP/2 connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from overcommit.server.limits import H2_BLOCK_BYTES_MAX, H2_HEADERS_BYTES_MAX

TABLE_BYTES: Final = 4096  # SETTINGS_HEADER_TABLE_SIZE, left as it is by default
ENTRY_BYTES: Final = 32  # that an entry counts beside its name and value
_CODE_BITS_MAX: Final = 30  # of one byte, packed

Header = tuple[bytes, bytes]

# Index 1 to 61 (RFC 7541, appendix A); "name value" where there is one.
_STATIC_TEXT: Final = """\
:authority|:method GET|:method POST|:path /|:path /index.html|:scheme http|:scheme https|:status 200
:status 204|:status 206|:status 304|:status 400|:status 404|:status 500|accept-charset
accept-encoding gzip, deflate|accept-language|accept-ranges|accept|access-control-allow-origin|age
allow|authorization|cache-control|content-disposition|content-encoding|content-language
content-length|content-location|content-range|content-type|cookie|date|etag|expect|expires|from
host|if-match|if-modified-since|if-none-match|if-range|if-unmodified-since|last-modified|link
location|max-forwards|proxy-authenticate|proxy-authorization|range|referer|refresh|retry-after
server|set-cookie|strict-transport-security|transfer-encoding|user-agent|vary|via|www-authenticate"""
STATIC: Final[tuple[Header, ...]] = tuple(
    (name.encode(), value.encode())
    for name, _, value in (
        entry.partition(" ") for entry in _STATIC_TEXT.replace("\n", "|").split("|")
    )
)
assert len(STATIC) == 61

# Lengths of the Huffman codes of the bytes 0 to 255 and of the end mark, from "A" for 5 bits on.  The
# code is canonical (RFC 7541, appendix B): lengths say everything.
_CODE_LENGTHS: Final = (
    "ISXXXXXXXTZXXZXXXXXXXXZXXXXXXXXXBFFHIBDGFFDGDBBBAAABBBBBBBCDKBHFIBCCCCCCCCCCCCCCCCCCCCCCDCDIOIJB"
    "KABABABBBACCBBBABCBAABCCCCCKGJIXPRPPRRRSRSSSSSTSTTRSTSSSSQRSRSSTRQPRRSSQSRRTQRSSQQRQSRSSPRRRSRRS"
    "VVPORSRUVVVWWVTUOQVWWVWTQQVVXWWWPTPQRQQSRRUUTTVSVWVVWWWWWXWWWWWVZ"
)
_END_MARK: Final = 256


class CompressionError(Exception):
    """A header block that is none."""


def _make_codes() -> dict[tuple[int, int], int]:
    """(length, code) -> byte, assigned in the order of length, then byte."""
    lengths = [ord(letter) - ord("A") + 5 for letter in _CODE_LENGTHS]
    codes: dict[tuple[int, int], int] = {}
    code, length = 0, 0
    for symbol in sorted(range(len(lengths)), key=lambda each: (lengths[each], each)):
        code <<= lengths[symbol] - length
        length = lengths[symbol]
        codes[length, code] = symbol
        code += 1
    return codes


_CODES: Final = _make_codes()


def _make_states() -> dict[tuple[int, int], int]:
    """What may have been read of a code -> a number for it; 0: between codes."""
    states = {(0, 0): 0}
    for length, code in _CODES:
        for shorter in range(1, length):
            states.setdefault((shorter, code >> (length - shorter)), len(states))
    return states


_STATES: Final = _make_states()


def _make_steps() -> list[list[tuple[int, bytes]]]:
    """A machine that takes 4 bits at a time: state, bits -> next state, bytes that end there.

    A next state of -1: no string has these bits.
    """
    steps: list[list[tuple[int, bytes]]] = []
    for start in _STATES:
        row: list[tuple[int, bytes]] = []
        for bits in range(16):
            at, ended = start, b""
            for shift in (3, 2, 1, 0):
                at = (at[0] + 1, at[1] << 1 | (bits >> shift & 1))
                symbol = _CODES.get(at)
                if symbol is not None and symbol != _END_MARK:
                    ended += bytes((symbol,))
                    at = (0, 0)
            row.append((_STATES.get(at, -1), ended))
        steps.append(row)
    return steps


_STEPS: Final = _make_steps()
# Where a string may end: between codes, or within the first 7 bits of the end mark, which are ones.
_PADDINGS: Final = frozenset(
    number
    for (length, code), number in _STATES.items()
    if length <= 7 and code == (1 << length) - 1
)


def decode_huffman(data: bytes) -> bytes:
    """Return the string that is packed in `data`.  Raises CompressionError."""
    state = 0
    parts: list[bytes] = []
    for byte in data:
        for bits in (byte >> 4, byte & 15):
            state, ended = _STEPS[state][bits]
            if state < 0:
                raise CompressionError("a string holds the end mark")
            if ended:
                parts.append(ended)
    if state not in _PADDINGS:
        raise CompressionError("a string ends inside a code")
    return b"".join(parts)


def encode(headers: Iterable[Header]) -> bytes:
    """Write headers as literals that no table keeps; `:status: 200` is one byte."""
    parts: list[bytes] = []
    for name, value in headers:
        if (name, value) == (b":status", b"200"):
            parts.append(b"\x88")
            continue
        parts += (b"\x00", _integer(len(name), 7), name, _integer(len(value), 7), value)
    return b"".join(parts)


def _integer(value: int, bits: int) -> bytes:
    """Write a number in a prefix of so many bits, whose other bits are zero."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes((value,))
    out = bytearray((limit,))
    value -= limit
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class Decoder:
    """What one client's header blocks mean, in the order in which they were sent."""

    __slots__ = ("_limit", "_table", "_used", "generation")

    def __init__(self) -> None:
        self._table: deque[Header] = deque()  # the newest first
        self._used = 0
        self._limit = TABLE_BYTES
        self.generation = 0

    def decode(self, block: bytes) -> list[Header] | None:
        """Return the headers of a block; None: they are over H2_HEADERS_BYTES_MAX.

        Raises CompressionError.
        """
        headers: list[Header] = []
        total = at = 0
        end = len(block)
        while at < end:
            byte = block[at]
            if byte & 0x80:
                index, at = _read_integer(block, at, 7)
                header = self._entry(index)
            elif byte & 0xE0 == 0x20:
                if total:
                    raise CompressionError("the table's size changes inside a block")
                size, at = _read_integer(block, at, 5)
                self._resize(size)
                continue
            else:
                keeps = bool(byte & 0x40)
                index, at = _read_integer(block, at, 6 if keeps else 4)
                if index:
                    name = self._entry(index)[0]
                else:
                    name, at = _read_string(block, at)
                value, at = _read_string(block, at)
                header = (name, value)
                if keeps:
                    self._add(header)
            total += len(header[0]) + len(header[1]) + ENTRY_BYTES
            if total <= H2_HEADERS_BYTES_MAX:
                headers.append(header)
            elif total > H2_BLOCK_BYTES_MAX:
                raise CompressionError(f"the headers are over {H2_BLOCK_BYTES_MAX} bytes")
        return headers if total <= H2_HEADERS_BYTES_MAX else None

    def _entry(self, index: int) -> Header:
        if 0 < index <= len(STATIC):
            return STATIC[index - 1]
        index -= len(STATIC) + 1
        if not 0 <= index < len(self._table):
            raise CompressionError("a header names an entry that is not there")
        return self._table[index]

    def _add(self, header: Header) -> None:
        self.generation += 1
        self._table.appendleft(header)
        self._used += len(header[0]) + len(header[1]) + ENTRY_BYTES
        self._shrink()

    def _resize(self, size: int) -> None:
        if size > TABLE_BYTES:
            raise CompressionError(f"a table of {size} bytes, {TABLE_BYTES} are allowed")
        self.generation += 1
        self._limit = size
        self._shrink()

    def _shrink(self) -> None:
        while self._used > self._limit:
            name, value = self._table.pop()
            self._used -= len(name) + len(value) + ENTRY_BYTES


def _read_integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    limit = (1 << bits) - 1
    value = block[at] & limit
    at += 1
    if value < limit:
        return value, at
    for shift in (0, 7, 14, 21):
        if at >= len(block):
            raise CompressionError("a block ends inside a number")
        byte = block[at]
        at += 1
        value += (byte & 127) << shift
        if byte < 128:
            return value, at
    raise CompressionError("a number is too long")


def _read_string(block: bytes, at: int) -> tuple[bytes, int]:
    if at >= len(block):
        raise CompressionError("a block ends before a string")
    is_packed = bool(block[at] & 0x80)
    length, at = _read_integer(block, at, 7)
    if at + length > len(block):
        raise CompressionError("a block ends inside a string")
    data = block[at : at + length]
    if is_packed and length <= H2_HEADERS_BYTES_MAX:
        data = decode_huffman(data)
    return data, at + length


# A longer string is too long, packed or not, and empties the table: it need not be unpacked.
assert H2_HEADERS_BYTES_MAX * 8 // _CODE_BITS_MAX > TABLE_BYTES
