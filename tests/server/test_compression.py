"""Which compression a client takes."""

from __future__ import annotations

import gzip
import zlib

import pytest

from overcommit.server.compression import choose, compress


@pytest.mark.parametrize(
    ("value", "chosen"),
    [
        (b"", b""),
        (b"identity", b""),
        (b"br, zstd", b""),
        (b"gzip", b"gzip"),
        (b"GZIP", b"gzip"),
        (b"deflate", b"deflate"),
        (b"deflate, gzip", b"gzip"),
        (b"gzip, deflate, br", b"gzip"),
        (b"gzip;q=0.5, deflate;q=0.8", b"deflate"),
        (b"gzip; q=0", b""),
        (b"gzip;q=x", b""),
        (b"*", b""),
    ],
)
def test_the_better_of_two_is_chosen(value: bytes, chosen: bytes) -> None:
    assert choose(value) == chosen


def test_what_was_compressed_is_read_back() -> None:
    body = b"0.5,1.5," * 1000
    assert gzip.decompress(compress(body, b"gzip")) == body
    assert zlib.decompress(compress(body, b"deflate")) == body
