"""The digest: one value on every path, pieces add up, any change of a word is found."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_rig import aligned_copy, needs_gcc, on_host

from overcommit.kernels import cuda, digest

SIZES = (0, 1, 7, 8, 9, 15, 31, 32, 33, 63, 64, 65, 4096, digest.THREADS * 8 + 5)


def data_of(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("nbytes", [*SIZES, (1 << 17) + 9])
def test_paths_agree_at_any_size_and_address(nbytes: int, start: int) -> None:
    piece = data_of(nbytes + start)[start:]
    expected = digest.digest_reference(piece.tobytes(), 24)
    assert digest.digest(piece, 24) == expected
    assert digest.digest_numpy(piece, 24) == expected


@needs_gcc
@pytest.mark.parametrize("is_backwards", [False, True])
@pytest.mark.parametrize("nbytes", SIZES)
def test_the_cuda_source_agrees_thread_by_thread(nbytes: int, is_backwards: bool) -> None:
    data, out = data_of(nbytes), np.array([5], np.uint64)
    kernel = on_host(digest.SOURCE, "digest")
    arguments = (aligned_copy(data), nbytes, 3, out)
    kernel((2, 1), digest.THREADS, *arguments, is_backwards=is_backwards)
    assert int(out[0]) == (5 + digest.digest(data, 24)) % (1 << 64)


@given(st.binary(max_size=200), st.lists(st.integers(0, 25), max_size=4))
def test_pieces_add_up_to_the_whole(data: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut * 8, len(data) // 8 * 8) for cut in cuts), len(data)]
    total = sum(
        digest.digest(data[start:end], start) for start, end in pairwise(places) if start < end
    )
    assert total % (1 << 64) == digest.digest(data)


@given(st.binary(min_size=1, max_size=100), st.integers(0), st.integers(1, 255))
def test_a_changed_byte_is_always_found(data: bytes, where: int, change: int) -> None:
    other = bytearray(data)
    other[where % len(data)] ^= change
    assert digest.digest(other) != digest.digest(data)


@given(st.binary(max_size=40))
def test_an_appended_zero_is_found(data: bytes) -> None:
    assert digest.digest(data + b"\0") != digest.digest(data)


def test_exchanged_words_are_found() -> None:
    a, b = b"12345678", b"abcdefgh"
    assert digest.digest(a + b) != digest.digest(b + a)


def test_known_values_stay() -> None:
    assert digest.digest(b"") == 0
    assert digest.digest(b"overcommit") == digest.digest_reference(b"overcommit") == KNOWN


KNOWN = 0xE19D3A3EE18FF269


@pytest.mark.parametrize("at", [-8, 4])
def test_a_place_within_a_word_is_refused(at: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        digest.digest(b"12345678", at)


def test_memory_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises((BufferError, ValueError)):
        digest.digest(np.zeros((8, 8), np.uint8)[:, ::2])


@pytest.mark.gpu
@pytest.mark.skipif(not cuda.has_gpu(), reason="no GPU, or no cupy")
@pytest.mark.parametrize("nbytes", [*SIZES, 10_000_001])
def test_the_gpu_agrees(nbytes: int) -> None:
    data = data_of(nbytes)
    found = digest.digest_cuda(cuda.cupy().asarray(data), 24)
    assert int(found[0]) == digest.digest(data, 24)
