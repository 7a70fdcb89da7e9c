"""The word that a completion says of its batch."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from overcommit.runtime import _shm, stages
from overcommit.runtime.config import BATCH_SIZE_LIMIT

MOST_NS = ((1 << 21) - 1) * stages.UNIT_NS


@given(
    st.integers(1, BATCH_SIZE_LIMIT),
    st.integers(1, _shm.STATUS_BATCH_MAX),
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 40),
)
def test_what_is_said_is_read_back_to_the_unit(
    rows: int, requests: int, input_ns: int, output_ns: int
) -> None:
    word = stages.pack(rows, requests, input_ns, output_ns)
    assert 0 < word < 1 << 64
    got = stages.unpack(word)
    assert got[:2] == (rows, requests)
    for said, read in ((input_ns, got[2]), (output_ns, got[3])):
        assert abs(min(said, MOST_NS) - read) <= stages.UNIT_NS // 2
