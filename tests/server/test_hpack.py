"""Header compression: the RFC's own examples, and blocks that are none."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.server import hpack
from overcommit.server.hpack import CompressionError, Decoder
from overcommit.server.limits import H2_HEADERS_BYTES_MAX

HEADERS = st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=300)), max_size=8)


def decode(decoder: Decoder, text: str) -> list[tuple[bytes, bytes]] | None:
    return decoder.decode(bytes.fromhex(text))


def test_the_requests_of_the_rfc_are_read() -> None:
    """RFC 7541, C.4: Huffman codes and the table, three requests of one connection."""
    decoder = Decoder()
    first = decode(decoder, "828684418cf1e3c2e5f23a6ba0ab90f4ff")
    begin = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/")]
    authority = (b":authority", b"www.example.com")
    assert first == [*begin, authority]
    second = decode(decoder, "828684be5886a8eb10649cbf")
    assert second == [*begin, authority, (b"cache-control", b"no-cache")]
    third = decode(decoder, "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf")
    assert third == [
        (b":method", b"GET"),
        (b":scheme", b"https"),
        (b":path", b"/index.html"),
        authority,
        (b"custom-key", b"custom-value"),
    ]


def test_entries_leave_the_table_as_the_rfc_says() -> None:
    """RFC 7541, C.6 has a table of 256 bytes; a client may ask for less than ours."""
    decoder = Decoder()
    decode(decoder, "3fe101")  # 256 bytes
    for number in range(8):
        decoder.decode(b"\x40\x04name\x28" + b"%040d" % number)
    assert decoder.decode(b"\xbe")[0][1] == b"%040d" % 7
    assert decoder.decode(b"\xc0")[0][1] == b"%040d" % 5
    with pytest.raises(CompressionError, match="not there"):
        decoder.decode(b"\xc1")


@given(st.lists(HEADERS, max_size=4))
def test_what_is_encoded_is_decoded(blocks: list[list[tuple[bytes, bytes]]]) -> None:
    decoder = Decoder()
    for headers in blocks:
        assert decoder.decode(hpack.encode(headers)) == headers


@given(st.binary(max_size=400))
def test_any_bytes_are_headers_or_are_refused(block: bytes) -> None:
    with contextlib.suppress(CompressionError):
        Decoder().decode(block)


@pytest.mark.parametrize(
    "text",
    [
        "80",  # index 0
        "be",  # an entry of an empty table
        "3fe27f",  # a table that is larger than allowed
        "823f00",  # a table size behind a header
        "ffffffffffff7f",  # a number without end
        "0001",  # ends inside a string
        "000161",  # no value
        "00016185ffffffffff",  # the end mark
        "0001618100",  # padding that is not of ones
    ],
)
def test_broken_blocks_are_refused(text: str) -> None:
    with pytest.raises(CompressionError):
        decode(Decoder(), text)


def test_a_few_bytes_cannot_name_a_long_header_again_and_again() -> None:
    decoder = Decoder()
    decoder.decode(b"\x40\x01a\x7f\x81\x0f" + b"x" * 2048)
    with pytest.raises(CompressionError, match="over"):
        decoder.decode(b"\xbe" * 1000)


def test_of_a_list_that_is_too_long_the_table_keeps_what_it_should() -> None:
    decoder = Decoder()
    long = hpack.encode([(b"long", b"x" * H2_HEADERS_BYTES_MAX)])
    assert decoder.decode(long + b"\x40\x01a\x01b") is None
    assert decoder.decode(b"\xbe") == [(b"a", b"b")]
    assert decoder.decode(b"\x40" + long[1:]) is None  # longer than the table: empties it
    with pytest.raises(CompressionError, match="not there"):
        decoder.decode(b"\xbe")


def test_a_packed_string_that_is_too_long_empties_the_table() -> None:
    decoder = Decoder()
    decoder.decode(b"\x40\x01a\x01b")
    packed = b"\xff\x82\x7f" + b"\0" * (H2_HEADERS_BYTES_MAX + 1)  # a "0" is packed as five zeros
    assert decoder.decode(b"\x40\x01c" + packed) is None
    with pytest.raises(CompressionError, match="not there"):
        decoder.decode(b"\xbe")


def test_the_generation_tells_when_equal_blocks_mean_the_same() -> None:
    decoder = Decoder()
    decoder.decode(b"\x40\x01a\x01b")
    known = decoder.generation
    decoder.decode(b"\xbe\x82")
    assert decoder.generation == known
    decoder.decode(b"\x40\x01c\x01d")
    assert decoder.generation != known
