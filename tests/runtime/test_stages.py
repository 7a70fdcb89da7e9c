"""The word that a completion says of its batch."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from overcommit.runtime import _shm, stages
from overcommit.runtime.config import BATCH_SIZE_LIMIT
from overcommit.server._counts import Counts

MOST_NS = ((1 << 21) - 1) * stages.UNIT_NS


def read_by_a_front_end(word: int) -> tuple[int, int, int, int]:
    """Return rows, requests, input_ns, output_ns, as they are counted."""
    counts = Counts(1, 1)
    counts.batch(0, 0, 1, word)
    taken = counts.take()
    assert taken is not None
    _, numbers, ((rows, _, input_ns, _, output_ns),) = taken
    return rows, numbers[-1], input_ns, output_ns


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
    got = read_by_a_front_end(word)
    assert got[:2] == (rows, requests)
    for said, read in ((input_ns, got[2]), (output_ns, got[3])):
        assert abs(min(said, MOST_NS) - read) <= stages.UNIT_NS // 2
