"""Copies by address: long ones go past the cache, pieces come side by side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overcommit.runtime import _shm
from overcommit.runtime.config import MIB

SIZE = 3 * MIB


@settings(max_examples=40, deadline=None)
@given(
    nbytes=st.one_of(st.integers(0, 300), st.integers(MIB - 200, MIB + 400)),
    to=st.integers(0, 70),
    start=st.integers(0, 70),
)
def test_a_copy_is_exact_wherever_it_starts(nbytes: int, to: int, start: int) -> None:
    source = np.random.default_rng(nbytes).integers(0, 256, SIZE, dtype=np.uint8)
    target = np.full(SIZE, 7, np.uint8)
    _shm.copy(target.ctypes.data + to, source.ctypes.data + start, nbytes)
    np.testing.assert_array_equal(target[to : to + nbytes], source[start : start + nbytes])
    assert (target[:to] == 7).all()
    assert (target[to + nbytes :] == 7).all()


@given(nbytes=st.integers(0, 40), gap=st.integers(0, 30), count=st.integers(0, 6))
def test_pieces_come_side_by_side(nbytes: int, gap: int, count: int) -> None:
    pieces = [np.full(40, number + 1, np.uint8) for number in range(count)]
    stride = nbytes + gap
    target = bytearray(stride * count + 5)
    _shm.copy_pieces(target, stride, nbytes, [piece.ctypes.data for piece in pieces])
    expected = b"".join(bytes([n + 1]) * nbytes + bytes(gap) for n in range(count)) + bytes(5)
    assert target == expected


@pytest.mark.parametrize(
    ("stride", "nbytes", "count"), [(64, 65, 1), (64, -1, 1), (64, 64, 3), (-64, 0, 1)]
)
def test_pieces_that_do_not_fit_are_refused(stride: int, nbytes: int, count: int) -> None:
    piece = np.zeros(64, np.uint8)
    target = bytearray(2 * 64)
    with pytest.raises(ValueError, match="do not fit"):
        _shm.copy_pieces(target, stride, nbytes, [piece.ctypes.data] * count)
    assert target == bytes(2 * 64)
