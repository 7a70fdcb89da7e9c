"""`digest`: 64 bits that tell whether a stretch of memory holds what it should.

Versions
 1. NumPy: ten passes over pieces that fit the cache (`digest_numpy`); the reference's vector form.
 2. C: one pass (`digest`, the CPU path).
 3. CUDA: a thread takes every n-th word, a block adds up in shared memory, one atomic add a block.

The definition.  The memory's little-endian 64-bit words, the last filled up with zeros, are numbered
from where the memory lies in the whole.  The digest is the sum modulo 2^64 of

    mix(word XOR (number + 1) * GOLDEN)          for a whole word
    mix(word XOR (number + 1) * GOLDEN XOR left * TAIL)   for the last one, of `left` < 8 bytes

    mix(x) = y XOR (y >> 29),   y = (x XOR (x >> 32)) * MIX

So the digests of pieces add up to the digest of the whole, in any order and from anywhere, on the CPU,
on the device, or some here and some there, if each piece but the last is whole words.

What it finds.  `mix` is one to one: a change within one word is always found, since exactly one term
changes.  Changes in several words, exchanged words, shifted or repeated memory are missed if the changes
of the terms cancel out, one time in 2^64 if they are as good as random.  It is no defence against
somebody who wants two contents with one digest: such are easily made.  For that the packer's names of
content (BLAKE2) are there.
"""

from __future__ import annotations

import sys
import zlib
from typing import Any, Final

import numpy as np

from overcommit.kernels import _digest, cuda
from overcommit.kernels.timing import Row, lines

WORD_BYTES: Final = 8
GOLDEN: Final = 0x9E3779B97F4A7C15
TAIL: Final = 0xC2B2AE3D27D4EB4F
MIX: Final = 0xD6E8FEB86659FD93
_MASK: Final = (1 << 64) - 1
_PIECE_WORDS: Final = 1 << 14
THREADS: Final = 256
BLOCKS_MAX: Final = 1024


# --- reference ----------------------------------------------------------------------------------
def digest_reference(data: Any, at: int = 0) -> int:
    """Compute the digest as the module defines it, word by word in Python's integers."""
    _check_place(at)
    raw = memoryview(data).tobytes()
    total = 0
    for start in range(0, len(raw), WORD_BYTES):
        piece = raw[start : start + WORD_BYTES]
        x = int.from_bytes(piece, "little")
        x ^= (at // WORD_BYTES + start // WORD_BYTES + 1) * GOLDEN & _MASK
        if len(piece) < WORD_BYTES:
            x ^= len(piece) * TAIL & _MASK
        y = (x ^ x >> 32) * MIX & _MASK
        total += y ^ y >> 29
    return total & _MASK


# --- CPU ----------------------------------------------------------------------------------------
def digest(data: Any, at: int = 0) -> int:
    """Return the digest of a C-contiguous buffer that lies `at` bytes from the start of the whole.

    Raises ValueError if `at` is no multiple of 8, BufferError if the buffer is not contiguous.
    """
    _check_place(at)
    return _digest.digest(data, at // WORD_BYTES)


def digest_numpy(data: Any, at: int = 0) -> int:
    """Do the same without the extension."""
    _check_place(at)
    raw = np.frombuffer(data, np.uint8)
    whole = raw.nbytes // WORD_BYTES * WORD_BYTES
    words = raw[:whole].view("<u8")
    total = 0
    for start in range(0, len(words), _PIECE_WORDS):
        piece = words[start : start + _PIECE_WORDS]
        first = at // WORD_BYTES + start + 1
        x = np.arange(first, first + len(piece), dtype=np.uint64)
        x *= np.uint64(GOLDEN)
        x ^= piece
        x ^= x >> np.uint64(32)
        x *= np.uint64(MIX)
        x ^= x >> np.uint64(29)
        total += int(np.add.reduce(x))
    if whole < raw.nbytes:
        total += digest_reference(raw[whole:].tobytes(), at + whole)
    return total & _MASK


def _check_place(at: int) -> None:
    if at < 0 or at % WORD_BYTES:
        raise ValueError(f"a piece begins at a multiple of {WORD_BYTES} bytes, not at {at}")


# --- CUDA ---------------------------------------------------------------------------------------
SOURCE: Final = cuda.with_constants(
    r"""
DEVICE u64 term(u64 word, u64 number) {
  u64 x = word ^ (number + 1) * GOLDEN;
  x = (x ^ x >> 32) * MIX;
  return x ^ x >> 29;
}

// `data` is aligned to 8 bytes.
KERNEL digest(const u8 *data, u64 nbytes, u64 first, u64 *out) {
  SHARED u64 sums[THREADS];
  const u64 *words = (const u64 *)data;
  u64 count = nbytes / 8, step = (u64)gridDim.x * THREADS, sum = 0, i;
  u32 left = (u32)(nbytes % 8), half;
  for (i = (u64)blockIdx.x * THREADS + threadIdx.x; i < count; i += step)
    sum += term(words[i], first + i);
  if (left && blockIdx.x == 0 && threadIdx.x == 0) {
    u64 word = 0;
    for (i = 0; i < left; i++) word |= (u64)data[count * 8 + i] << (8 * i);
    sum += term(word ^ left * TAIL, first + count);
  }
  sums[threadIdx.x] = sum;
  BARRIER();
  for (half = THREADS / 2; half; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    BARRIER();
  }
  if (threadIdx.x == 0) ATOMIC_ADD(out, sums[0]);
}
""",
    {
        "GOLDEN": f"{GOLDEN}ull",
        "MIX": f"{MIX}ull",
        "TAIL": f"{TAIL}ull",
        "THREADS": THREADS,
    },
)


def digest_cuda(data: Any, at: int = 0, out: Any = None) -> Any:
    """Add the digest of a contiguous cupy array to `out`, a cupy uint64 array of one, and return it.

    Runs on cupy's current stream and does not wait.  Raises ValueError for a place or an address that
    is no multiple of 8.
    """
    _check_place(at)
    if not data.flags.c_contiguous or data.data.ptr % WORD_BYTES:
        raise ValueError(
            "a digest on the device needs contiguous memory that is aligned to 8 bytes"
        )
    out = cuda.cupy().zeros(1, np.uint64) if out is None else out
    if data.nbytes:
        words = -(-data.nbytes // WORD_BYTES)
        blocks = min(BLOCKS_MAX, -(-words // THREADS))
        arguments = (data, np.uint64(data.nbytes), np.uint64(at // WORD_BYTES), out)
        cuda.function(SOURCE, "digest")((blocks,), (THREADS,), arguments)
    return out


def digest_at(address: int, nbytes: int, at: int = 0) -> int:
    """Return the digest of memory that the device reads, by its address; waits for it.

    Runs on cupy's current stream.  Raises as `digest_cuda`.
    """
    cupy = cuda.cupy()
    memory = cupy.cuda.UnownedMemory(address, nbytes, None)
    data = cupy.ndarray((nbytes,), np.uint8, cupy.cuda.MemoryPointer(memory, 0))
    return int(digest_cuda(data, at)[0])


# --- check and timing ---------------------------------------------------------------------------
def check() -> None:
    """Compare all paths on sizes around every boundary."""
    random = np.random.default_rng(1)
    for nbytes in (0, 1, 7, 8, 9, 63, 64, 65, THREADS * 8, _PIECE_WORDS * 8 + 3):
        data = random.integers(0, 256, nbytes + 1, np.uint8)
        for start in (0, 1):
            piece = data[start : start + nbytes]
            expected = digest_reference(piece.tobytes(), 16)
            assert digest(piece, 16) == digest_numpy(piece, 16) == expected, nbytes
        if cuda.has_gpu():
            on_device = cuda.cupy().asarray(data[:nbytes])
            assert int(digest_cuda(on_device, 16)[0]) == digest(data[:nbytes], 16), nbytes


def timing() -> list[Row]:
    """What to measure: 64 MiB, which no cache holds."""
    data = np.random.default_rng(1).integers(0, 256, 64 << 20, np.uint8)
    target = np.empty_like(data)
    rows = [
        Row("CPU, C", data.nbytes, lambda: digest(data)),
        Row("CPU, NumPy", data.nbytes, lambda: digest_numpy(data)),
        Row("zlib.crc32", data.nbytes, lambda: zlib.crc32(data.data)),
        Row("limit: sum of the words", data.nbytes, lambda: data.view(np.uint64).sum()),
        Row("limit: copy", data.nbytes, lambda: np.copyto(target, data)),
    ]
    if cuda.has_gpu():
        cupy = cuda.cupy()
        device, out = cupy.asarray(data), cupy.zeros(1, np.uint64)
        wait = cupy.cuda.Device().synchronize
        rows.append(Row("CUDA", data.nbytes, lambda: digest_cuda(device, 0, out), wait))
    return rows


if __name__ == "__main__":
    check()
    sys.stdout.writelines(f"{line}\n" for line in lines(timing()))
