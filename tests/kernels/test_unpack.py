"""Packed weights: every bit pattern comes back, on every path, and damage stays inside."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_rig import aligned, aligned_copy, needs_gcc, on_host

from overcommit.kernels import cuda, unpack
from overcommit.kernels.unpack import BLOCK_BYTES, pack, read_head, unpack_reference

Array = np.ndarray[Any, np.dtype[Any]]


def weights(datatype: str, count: int, seed: int = 1) -> Array:
    """Return bytes of numbers as in trained models."""
    drawn = np.random.default_rng(seed).standard_normal(count, np.float32) * np.float32(0.02)
    if datatype == "FP16":
        return drawn.astype(np.float16).view(np.uint8)
    if datatype == "BF16":
        return (drawn.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return drawn.view(np.uint8)


def nasty() -> dict[str, Array]:
    """Return what breaks decoders, by name."""
    random = np.random.default_rng(2)
    specials = np.array(
        [0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7F800001],
        np.uint32,
    )
    skewed = np.zeros(BLOCK_BYTES, np.uint8)
    # Frequencies like Fibonacci numbers make the longest codes that there are.
    exponents = np.repeat(np.arange(22), [int(1.618**i) for i in range(22)]).astype(np.uint16) << 7
    skewed[: 2 * len(exponents)] = exponents.view(np.uint8)[:BLOCK_BYTES]
    return {
        "empty": np.zeros(0, np.uint8),
        "one byte": np.ones(1, np.uint8),
        "one number": weights("FP32", 1),
        "three bytes more than a block": weights("FP32", BLOCK_BYTES // 4 + 1)[: BLOCK_BYTES + 3],
        "two bytes less than a block": weights("BF16", BLOCK_BYTES // 2 - 1),
        "two bytes more than a block": weights("BF16", BLOCK_BYTES // 2 + 1),
        "four bytes more than a group": weights("FP32", 33 * BLOCK_BYTES // 4 + 1),
        "fewer numbers than streams": weights("BF16", 1000)[:200],
        "special numbers": np.tile(specials, 5000).view(np.uint8),
        "each pattern of 16 bits": np.arange(1 << 16, dtype=np.uint16).view(np.uint8),
        "one value": np.full(50_000, 0x3F80, np.uint16).view(np.uint8),
        "zeros": np.zeros(2 * BLOCK_BYTES + 77, np.uint8),
        "noise": random.integers(0, 256, 2 * BLOCK_BYTES + 13, np.uint8),
        "long codes": skewed,
        "all kinds in a group": np.concatenate(
            [
                weights("FP32", BLOCK_BYTES // 4),
                weights("BF16", BLOCK_BYTES // 2),
                weights("FP16", BLOCK_BYTES // 2),
                random.integers(0, 256, BLOCK_BYTES, np.uint8),
                np.zeros(BLOCK_BYTES, np.uint8),
                weights("FP32", BLOCK_BYTES // 4 - 3),
            ]
        ),
    }


def decoded(packed: bytes, nbytes: int) -> Array:
    out = np.full(nbytes, 0xAA, np.uint8)
    unpack.unpack(packed, out)
    return out


def decoded_by_cuda_source(
    packed: bytes, first: int, count: int, nbytes: int, is_backwards: bool = False
) -> Array:
    out = aligned(nbytes)
    out[:] = 0xAA
    kernel = on_host(unpack.SOURCE, "unpack")
    kernel((count, 1), unpack.STREAMS, aligned_copy(packed), out, first, is_backwards=is_backwards)
    return out


@pytest.mark.parametrize("name", nasty())
def test_every_byte_comes_back(name: str) -> None:
    data = nasty()[name]
    packed = pack(data)
    assert np.array_equal(decoded(packed, data.nbytes), data)
    assert np.array_equal(unpack_reference(packed), data)


@needs_gcc
@pytest.mark.parametrize("is_backwards", [False, True])
@pytest.mark.parametrize("name", nasty())
def test_the_cuda_source_decodes_the_same_thread_by_thread(name: str, is_backwards: bool) -> None:
    data = nasty()[name][: 6 * BLOCK_BYTES]
    packed = pack(data)
    found = decoded_by_cuda_source(packed, 0, read_head(packed).blocks, data.nbytes, is_backwards)
    assert np.array_equal(found, data)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["FP32", "BF16", "FP16", "noise", "zeros"]),
            st.integers(0, 40_000),
            st.integers(0, 5),
        ),
        max_size=5,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_mixture_comes_back(parts: list[tuple[str, int, int]]) -> None:
    pieces = [np.zeros(0, np.uint8)]
    for kind, count, seed in parts:
        if kind == "noise":
            pieces.append(np.random.default_rng(seed).integers(0, 256, count, np.uint8))
        elif kind == "zeros":
            pieces.append(np.zeros(count, np.uint8))
        else:
            pieces.append(weights(kind, count, seed)[seed:])
    data = np.concatenate(pieces)
    packed = pack(data)
    assert len(packed) <= data.nbytes + 24 * read_head(packed).blocks + 64 + 3 * 288 + 32
    assert np.array_equal(decoded(packed, data.nbytes), data)
    assert np.array_equal(unpack_reference(packed), data)


@given(st.binary(max_size=300))
def test_any_bytes_come_back(data: bytes) -> None:
    assert decoded(pack(data), len(data)).tobytes() == data


def test_any_range_of_blocks_is_decoded_alone() -> None:
    data = weights("BF16", 3 * BLOCK_BYTES + 100)
    packed = pack(data)
    blocks = read_head(packed).blocks
    for first in range(blocks):
        for end in range(first, blocks + 1):
            expected = data[first * BLOCK_BYTES : end * BLOCK_BYTES]
            out = np.empty(expected.nbytes, np.uint8)
            unpack.unpack(packed, out, first, end - first)
            assert np.array_equal(out, expected)


@needs_gcc
def test_the_cuda_source_decodes_a_range_of_blocks() -> None:
    data = weights("FP32", BLOCK_BYTES)
    packed = pack(data)
    found = decoded_by_cuda_source(packed, 1, 2, 2 * BLOCK_BYTES)
    assert np.array_equal(found, data[BLOCK_BYTES : 3 * BLOCK_BYTES])


def test_ranges_are_decoded_in_several_threads() -> None:
    data = weights("FP32", 64 * BLOCK_BYTES)
    packed = pack(data)
    out = np.zeros_like(data)

    def one(first: int) -> None:
        piece = out[first * BLOCK_BYTES : (first + 8) * BLOCK_BYTES]
        unpack.unpack(packed, piece, first, 8)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(0, read_head(packed).blocks, 8)))
    assert np.array_equal(out, data)


def test_a_packed_buffer_may_lie_anywhere() -> None:
    data = weights("BF16", 50_000)
    packed = pack(data)
    moved = np.concatenate([np.zeros(3, np.uint8), np.frombuffer(packed, np.uint8)])[3:]
    out = np.zeros(data.nbytes + 1, np.uint8)[1:]
    unpack.unpack(moved, out)
    assert np.array_equal(out, data)


@pytest.mark.parametrize(
    ("datatype", "kind", "ratio"),
    [("BF16", "half", 1.3), ("FP32", "fp32", 1.15), ("FP16", "half", 1.1)],
)
def test_weights_shrink(datatype: str, kind: str, ratio: float) -> None:
    data = weights(datatype, 1 << 20)
    packed = pack(data)
    assert data.nbytes / len(packed) > ratio
    assert read_head(packed).kinds() == {kind: read_head(packed).blocks}


def test_what_cannot_be_packed_stays_raw() -> None:
    data = np.random.default_rng(1).integers(0, 256, 4 * BLOCK_BYTES, np.uint8)
    assert read_head(pack(data)).kinds() == {"raw": 4}


def test_a_buffer_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises((BufferError, ValueError)):
        pack(np.zeros((10, 10), np.uint8)[:, ::2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda packed: packed[:10], "too short"),
        (lambda packed: b"x" + packed[1:], "no packed buffer"),
        (lambda packed: packed[:-1], "only a part"),
    ],
)
def test_a_buffer_that_is_torn_is_refused(damage: Any, message: str) -> None:
    data = weights("BF16", 50_000)
    packed = damage(pack(data))
    with pytest.raises(ValueError, match=message):
        unpack.unpack(packed, np.empty_like(data), 0, 2)
    with pytest.raises(ValueError, match=message):
        read_head(packed)


@pytest.mark.parametrize(("first", "count"), [(0, 3), (-1, 1), (2, 1), (1, -1), (3, 0)])
def test_blocks_that_are_not_there_are_refused(first: int, count: int) -> None:
    packed = pack(weights("BF16", BLOCK_BYTES))
    with pytest.raises(ValueError, match="not among them"):
        unpack.unpack(packed, np.empty(BLOCK_BYTES, np.uint8), first, count)


def test_a_destination_of_another_length_is_refused() -> None:
    packed = pack(weights("BF16", 100))
    with pytest.raises(ValueError, match="200 bytes, the destination has 201"):
        unpack.unpack(packed, np.empty(201, np.uint8))


@given(st.lists(st.tuples(st.integers(64, 40_000), st.integers(1, 255)), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_damage_raises_or_gives_wrong_bytes_but_stays_inside(
    changes: list[tuple[int, int]],
) -> None:
    data = weights("BF16", 12_000)
    packed = bytearray(pack(data))
    for at, change in changes:
        packed[at % len(packed)] ^= change
    around = np.full(data.nbytes + 128, 0xAA, np.uint8)
    out = around[64:-64]
    with suppress(ValueError):
        unpack.unpack(packed, out, 0, 1)
    assert (around[:64] == 0xAA).all()
    assert (around[-64:] == 0xAA).all()


@pytest.mark.gpu
@pytest.mark.skipif(not cuda.has_gpu(), reason="no GPU, or no cupy")
@pytest.mark.parametrize("name", nasty())
def test_the_gpu_decodes_the_same(name: str) -> None:
    cupy = cuda.cupy()
    data = nasty()[name]
    out = cupy.full(data.nbytes, 0xAA, np.uint8)
    unpack.unpack_cuda(cupy.asarray(np.frombuffer(pack(data), np.uint8)), out)
    assert np.array_equal(cupy.asnumpy(out), data)
