"""Block headers: what is encoded comes back, and a peer's lies are found."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime import payload
from overcommit.runtime.errors import ProtocolError

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> list[tuple[int, str, int, tuple[int, ...]]]:
    out = []
    for index in range(draw(st.integers(0, 5))):
        datatype = draw(st.sampled_from(sorted(payload.DATATYPES)))
        shape = draw(SHAPES)
        size = payload.DATATYPES[datatype][1]
        nbytes = draw(st.integers(0, 100)) if size == 0 else size
        if size:
            for dimension in shape:
                nbytes *= dimension
        out.append((index, datatype, nbytes, shape))
    return out


@given(tensors())
def test_decode_gives_back_what_encode_wrote(
    given_tensors: list[tuple[int, str, int, tuple[int, ...]]],
) -> None:
    places, nbytes = payload.plan(given_tensors)
    block = memoryview(bytearray(max(nbytes, 64)))
    payload.encode(block, places)
    assert payload.decode(block) == places
    ends = [(place.offset, place.offset + place.nbytes) for place in places]
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(ends))


@given(st.binary(min_size=0, max_size=400))
def test_any_bytes_are_decoded_within_bounds_or_refused(data: bytes) -> None:
    try:
        places = payload.decode(memoryview(data))
    except ProtocolError:
        return
    assert all(p.offset >= 0 and p.offset + p.nbytes <= len(data) for p in places)


@pytest.mark.parametrize(
    "words",
    [
        [-1, 0],
        [10_000, 0],
        [1, 0],
        [1, 0, 0, 99, 64, 4, 0],
        [1, 0, 0, 11, 64, 4, 17],
        [1, 0, 0, 11, 64, 1 << 40, 1, 1],
        [1, 0, 0, 11, -64, 4, 1, 1],
        [1, 0, 0, 11, 64, 4, 1, -1],
        [1, 0, 0, 11, 64, 4, 1, 2],
        [1, 0, -1, 11, 64, 4, 1, 1],
    ],
)
def test_a_lying_header_is_refused(words: list[int]) -> None:
    block = bytearray(256)
    struct.pack_into(f"={len(words)}q", block, 0, *words)
    with pytest.raises(ProtocolError):
        payload.decode(memoryview(block))


def test_a_scalar_has_rank_zero_and_one_element() -> None:
    places, nbytes = payload.plan([(0, "INT64", 8, ())])
    block = memoryview(bytearray(nbytes))
    payload.encode(block, places)
    assert payload.decode(block)[0].shape == ()
