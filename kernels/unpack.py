"""`unpack`: weights packed without loss, decoded while they are copied.

The exponents of trained weights take few values: 8 bits that hold 2.6.  So exponents are entropy-coded,
and sign and mantissa, which are noise, stay as they are: BF16 shrinks to two thirds, FP32 to five sixths.
Bytes, not numbers, are packed: every bit pattern comes back, and no datatype has to be told.

Versions
 1. NumPy: all streams of a block side by side, a symbol of each at a time (`unpack_reference`).
 2. C: four streams at a time, up to four symbols a look-up (`unpack`, the CPU path; `pack` is C too).
 3. CUDA: a thread block decodes a block, a thread a stream, a symbol at a time; then all of them join
    the planes and write the result in order (`unpack_cuda`).
 Tried and dropped: a kind for FP16 whose symbol was the high byte, sign and all (0.4 % smaller at best).

The format, little-endian.  Raw bytes are cut into blocks of 64 KiB, which are decoded each on its own:

    header 64 B   magic u64, raw bytes u64, total u64, blocks u32, tables u32, digest u64 (of the raw
                  bytes, for who packs to fill in; no decoder reads it), 0
    index         for each block: offset u32 (in 16 bytes, from the start), table u16, kind u8, 0
    tables        288 B each: counts[16] u16 of codes by length; symbols[256] in the order of codes
    blocks        each at a multiple of 16
    guard         16 bytes, so that a reader may take 8 bytes wherever a stream is

    kind RAW      the bytes
    kind ZEROS    nothing
    kind HALF     n rests (u8: bit 15, bits 6 to 0), streams; a symbol is bits 14 to 7
    kind FP32     n low halves (u16), n rests (u8: bit 31, bits 22 to 16), streams; a symbol is bits
                  30 to 23, the exponent

    streams       offset u16 of each of the 128, from behind the offsets; then bits, the lowest first.
                  Stream k holds the symbols [k * s, (k + 1) * s) of n, s = ceil(n / 128)

In BF16 the symbol of HALF is the exponent, in FP16 the exponent and three bits of the mantissa, which
cost what they are long.  Planes are padded to 2 bytes.  Codes are canonical Huffman codes of up to 11
bits, their first bit lowest.  A table serves the 32 blocks around, as far as they are of its kind.  The
kind is what makes a block smallest; one that would save less than 2 % stays raw.

Invariants
 1. `unpack(pack(x)) == x` for all bytes, on both paths, also for any range of blocks.
 2. Packed bytes are never more than raw bytes, the index and 16 bytes a block together.
 3. A damaged buffer raises or gives wrong bytes, it never makes a reader go outside.  Whether the bytes are
    right is for `digest` to say.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from overcommit.kernels import _unpack, cuda
from overcommit.kernels._unpack import (
    BLOCK_BYTES,
    CODE_BITS_MAX,
    FP32,
    GUARD_BYTES,
    HALF,
    RAW,
    STREAMS,
    ZEROS,
)
from overcommit.kernels.timing import Row, lines

Array = np.ndarray[Any, np.dtype[Any]]

MAGIC: Final = 0x314B434150434F00
HEADER: Final = np.dtype(
    [
        ("magic", "<u8"),
        ("nbytes", "<u8"),
        ("total", "<u8"),
        ("blocks", "<u4"),
        ("tables", "<u4"),
        ("digest", "<u8"),
        ("reserved", "<u8", 3),
    ]
)
ENTRY: Final = np.dtype([("offset", "<u4"), ("table", "<u2"), ("kind", "u1"), ("reserved", "u1")])
TABLE: Final = np.dtype([("counts", "<u2", 16), ("symbols", "u1", 256)])
KIND_NAMES: Final = {RAW: "raw", HALF: "half", FP32: "fp32", ZEROS: "zeros"}


@dataclass(slots=True, frozen=True)
class Packed:
    """What a packed buffer's head says."""

    nbytes: int  # raw
    total: int
    index: Array  # of ENTRY
    tables: Array  # of TABLE

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.index)

    def kinds(self) -> dict[str, int]:
        """Return how many blocks there are of each kind."""
        found = np.bincount(self.index["kind"], minlength=len(KIND_NAMES))
        return {name: int(found[kind]) for kind, name in KIND_NAMES.items() if found[kind]}


def read_head(packed: Any) -> Packed:
    """Parse header, index and tables; raise ValueError for what is not packed."""
    raw = np.frombuffer(packed, np.uint8)
    if raw.nbytes < HEADER.itemsize:
        raise ValueError("this is no packed buffer: it is too short")
    header = raw[: HEADER.itemsize].view(HEADER)[0]
    blocks, tables = int(header["blocks"]), int(header["tables"])
    nbytes, total = int(header["nbytes"]), int(header["total"])
    tables_at = HEADER.itemsize + blocks * ENTRY.itemsize
    end = tables_at + tables * TABLE.itemsize
    if (
        int(header["magic"]) != MAGIC
        or blocks != -(-nbytes // BLOCK_BYTES)
        or not end + GUARD_BYTES <= total <= raw.nbytes
    ):
        raise ValueError("this is no packed buffer, or only a part of one")
    return Packed(
        nbytes, total, raw[HEADER.itemsize : tables_at].view(ENTRY), raw[tables_at:end].view(TABLE)
    )


# --- CPU ----------------------------------------------------------------------------------------
def pack(data: Any) -> bytes:
    """Pack a C-contiguous buffer.  Raises ValueError for more than 64 GiB.  Releases the GIL."""
    return _unpack.encode(data)


def unpack(packed: Any, out: Any, first: int = 0, count: int | None = None) -> None:
    """Decode `count` blocks (or all) from block `first` into `out`, a writable buffer of their length.

    Ranges of one buffer may be decoded in several threads.  Raises ValueError for a buffer that is not
    packed or damaged, a range that is not there, or an `out` of another length.
    """
    if count is None:
        count = read_head(packed).blocks - first
    _unpack.decode(packed, out, first, count)


# --- reference ----------------------------------------------------------------------------------
def unpack_reference(packed: Any) -> Array:
    """Decode everything with NumPy, from the format alone; return bytes."""
    head = read_head(packed)
    raw = np.frombuffer(packed, np.uint8)
    out = np.zeros(head.nbytes, np.uint8)
    for number, entry in enumerate(head.index):
        target = out[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
        block = raw[int(entry["offset"]) * _unpack.ALIGN :]
        kind = int(entry["kind"])
        if kind == RAW:
            target[:] = block[: target.nbytes]
        elif kind != ZEROS:
            _block_reference(kind, block, head.tables[int(entry["table"])], target)
    return out


def _block_reference(kind: int, block: Array, table: Any, target: Array) -> None:
    width = 4 if kind == FP32 else 2
    n = target.nbytes // width
    planes = -(-n * (width - 1) // 2) * 2
    symbols = _symbols_reference(block[planes:], table, n).astype(np.uint32)
    if kind == FP32:
        low = block[: 2 * n].view("<u2").astype(np.uint32)
        rest = block[2 * n : 3 * n].astype(np.uint32)
        bits = (rest & 0x80) << 24 | symbols << 23 | (rest & 0x7F) << 16 | low
        target[:] = bits.view(np.uint8)
        return
    rest = block[:n].astype(np.uint32)
    bits = (rest & 0x80) << 8 | symbols << 7 | rest & 0x7F
    target[:] = bits.astype("<u2").view(np.uint8)


def _symbols_reference(coded: Array, table: Any, n: int) -> Array:
    symbol_of = np.zeros(1 << CODE_BITS_MAX, np.uint8)
    length_of = np.zeros(1 << CODE_BITS_MAX, np.int64)
    code = rank = 0
    for length in range(1, CODE_BITS_MAX + 1):
        for _ in range(int(table["counts"][length])):
            first = int(f"{code:0{length}b}"[::-1], 2)
            symbol_of[first :: 1 << length] = table["symbols"][rank]
            length_of[first :: 1 << length] = length
            code, rank = code + 1, rank + 1
        code <<= 1
    segment = -(-n // STREAMS)
    at = coded[: 2 * STREAMS].view("<u2").astype(np.int64) * 8
    bits = coded[2 * STREAMS :]
    last = len(bits) - 4  # streams that have ended read on in vain
    symbols = np.zeros((STREAMS, segment), np.uint8)
    for step in range(segment):
        place = np.minimum(at >> 3, last)
        window = sum(bits[place + byte].astype(np.int64) << 8 * byte for byte in range(4))
        found = (window >> (at & 7)) & ((1 << CODE_BITS_MAX) - 1)
        symbols[:, step] = symbol_of[found]
        at += length_of[found]
    return symbols.reshape(-1)[:n]


# --- CUDA ---------------------------------------------------------------------------------------
# Shared memory: 33 KiB of symbols, 4 KiB of look-ups.  Segments lie 4 bytes further apart than they are
# long, so that threads that are at the same step write to different banks.
SOURCE: Final = cuda.with_constants(
    r"""
#define LOOKUPS (1 << CODE_BITS_MAX)
#define SEGMENT_MAX (BLOCK_BYTES / 2 / STREAMS)
#define SKEW (SEGMENT_MAX + 4)

// Of canonical codes, seen from their first bit: which length and which symbol a look-up begins with.
DEVICE void fill(const u8 *table, u16 *lookups) {
  const u16 *counts = (const u16 *)table;
  u32 k;
  for (k = threadIdx.x; k < LOOKUPS; k += STREAMS) {
    u32 code = 0, rank = 0, found = 0, value = 0;
    int length;
    for (length = 1; length <= CODE_BITS_MAX; length++) {
      u32 count = counts[length];
      value = value << 1 | (k >> (length - 1) & 1u);
      if (value - code < count) {
        u32 at = rank + value - code;
        found = at < 256u ? (u32)table[32 + at] << 8 | (u32)length : 0;
        break;
      }
      code = (code + count) << 1;
      rank += count;
    }
    lookups[k] = (u16)found;
  }
}

// One block of STREAMS threads for each packed block.  `packed` is aligned to 16 bytes, `out` to 4, and
// is where block `first` goes; both may be anywhere that the device reads and writes.
KERNEL unpack(const u8 *packed, u8 *out, u32 first) {
  SHARED u16 lookups[LOOKUPS];
  SHARED u8 symbols[STREAMS * SKEW];
  u64 nbytes = ((const u64 *)packed)[1], total = ((const u64 *)packed)[2];
  u32 blocks = ((const u32 *)packed)[6], tables = ((const u32 *)packed)[7];
  u32 number = first + blockIdx.x, thread = threadIdx.x;
  const u8 *entry = packed + 64 + (u64)number * 8;
  u32 table = *(const u16 *)(entry + 4), kind = entry[6];
  u64 offset = (u64) * (const u32 *)entry * ALIGN;
  u64 left = nbytes - (u64)number * BLOCK_BYTES;
  u32 size = left < BLOCK_BYTES ? (u32)left : BLOCK_BYTES;
  u32 width = kind == FP32 ? 4 : 2, n = size / width, i;
  u32 segment = (n + STREAMS - 1) / STREAMS, planes = (n * (width - 1) + 1) / 2 * 2;
  const u8 *in = packed + offset;
  out += (u64)blockIdx.x * BLOCK_BYTES;
  if (kind == RAW || kind == ZEROS) {
    u32 words = size / 4;
    if (kind == RAW && offset + size > total) return;
    for (i = thread; i < words; i += STREAMS)
      ((u32 *)out)[i] = kind == RAW ? ((const u32 *)in)[i] : 0;
    for (i = words * 4 + thread; i < size; i += STREAMS) out[i] = kind == RAW ? in[i] : 0;
    return;
  }
  if (kind > FP32 || table >= tables || offset + planes + 2 * STREAMS + 8 > total) return;
  fill(packed + 64 + (u64)blocks * 8 + (u64)table * 288, lookups);
  BARRIER();
  {
    // Bits are counted from the start of the whole, whose words are aligned.
    const u32 *words = (const u32 *)packed;
    u64 at = (offset + planes + 2 * STREAMS + ((const u16 *)(in + planes))[thread]) * 8;
    u64 last = total / 4 - 2;
    u32 start = thread * segment, count = 0;
    if (start < n) count = n - start < segment ? n - start : segment;
    for (i = 0; i < count; i++) {
      u64 word = at >> 5;
      u32 found;
      if (word > last) break;
      found = (u32)((words[word] | (u64)words[word + 1] << 32) >> (at & 31)) & (LOOKUPS - 1);
      found = lookups[found];
      symbols[thread * SKEW + i] = (u8)(found >> 8);
      at += found & 255u;
    }
  }
  BARRIER();
  for (i = thread; i < n; i += STREAMS) {
    u32 stream = i / segment, symbol = symbols[stream * SKEW + i - stream * segment], rest;
    if (kind == FP32) {
      rest = in[2 * n + i];
      ((u32 *)out)[i] = (rest & 0x80u) << 24 | symbol << 23 | (rest & 0x7fu) << 16 |
                        ((const u16 *)in)[i];
    } else {
      rest = in[i];
      ((u16 *)out)[i] = (u16)((rest & 0x80u) << 8 | symbol << 7 | (rest & 0x7fu));
    }
  }
}
""",
    {
        "BLOCK_BYTES": f"{BLOCK_BYTES}u",
        "STREAMS": f"{STREAMS}u",
        "CODE_BITS_MAX": CODE_BITS_MAX,
        "ALIGN": f"{_unpack.ALIGN}u",
        "RAW": RAW,
        "HALF": HALF,
        "FP32": FP32,
        "ZEROS": ZEROS,
    },
)


def unpack_cuda(packed: Any, out: Any, first: int = 0, count: int | None = None) -> None:
    """Decode blocks into `out`, a contiguous cupy array of their length.

    `packed` is a cupy array of bytes with a packed buffer: its head, and at least these blocks in their
    places.  Runs on cupy's current stream and does not wait.  A damaged block leaves its part of `out`
    wrong.
    """
    if packed.data.ptr % _unpack.ALIGN or out.data.ptr % 4:
        raise ValueError("packed bytes must be aligned to 16 bytes, their destination to 4")
    if count is None:
        count = -(-out.nbytes // BLOCK_BYTES)
    if count:
        cuda.function(SOURCE, "unpack")((count,), (STREAMS,), (packed, out, np.uint32(first)))


# --- check and timing ---------------------------------------------------------------------------
def samples() -> Iterator[tuple[str, Array]]:
    """Yield weights as they are drawn when training begins, and what can hardly be packed."""
    random = np.random.default_rng(1)
    drawn = random.standard_normal(8 << 20, np.float32) * np.float32(0.02)
    yield "random FP32", drawn.view(np.uint8)
    yield "random BF16", (drawn.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    yield "random FP16", drawn.astype(np.float16).view(np.uint8)
    yield "noise", random.integers(0, 256, 16 << 20, np.uint8)
    yield (
        "every pattern of 16 bits",
        np.tile(np.arange(1 << 16, dtype=np.uint16), 64).view(np.uint8),
    )


def files(paths: list[str]) -> Iterator[tuple[str, Array]]:
    """Yield the tensors of FP32 in files (safetensors, or torch's), as they are and cast."""
    import torch
    from safetensors.torch import load_file

    for path in paths:
        is_safe = path.endswith(".safetensors")
        tensors = load_file(path) if is_safe else torch.load(path, weights_only=True)
        flat = torch.cat([t.reshape(-1) for t in tensors.values() if t.dtype == torch.float32])
        name = Path(path).name[:24]
        yield f"{name} FP32", flat.numpy().view(np.uint8)
        for kind in (torch.bfloat16, torch.float16):
            cast = flat.to(kind).view(torch.int16).numpy().view(np.uint8)
            yield f"{name} {'BF16' if kind == torch.bfloat16 else 'FP16'}", cast


def check() -> None:
    """Compare all paths bit for bit."""
    for name, data in samples():
        data = data[: 3 * BLOCK_BYTES + 5]
        packed = pack(data)
        out = np.empty_like(data)
        unpack(packed, out)
        assert np.array_equal(out, data), name
        assert np.array_equal(unpack_reference(packed), data), name
        if cuda.has_gpu():
            cupy = cuda.cupy()
            decoded = cupy.empty(data.nbytes, np.uint8)
            unpack_cuda(cupy.asarray(np.frombuffer(packed, np.uint8)), decoded)
            assert np.array_equal(cupy.asnumpy(decoded), data), name


def timing(data: Array, packed: bytes) -> list[Row]:
    """What to measure of one sample, per raw byte."""
    out = np.empty_like(data)
    rows = [
        Row("  pack, C", data.nbytes, lambda: pack(data)),
        Row("  unpack, C, one core", data.nbytes, lambda: unpack(packed, out)),
        Row("  limit: copy", data.nbytes, lambda: np.copyto(out, data)),
    ]
    if cuda.has_gpu():
        cupy = cuda.cupy()
        device, target = cupy.asarray(np.frombuffer(packed, np.uint8)), cupy.asarray(out)
        wait = cupy.cuda.Device().synchronize
        rows.append(Row("  unpack, CUDA", data.nbytes, lambda: unpack_cuda(device, target), wait))
    return rows


def main(paths: list[str]) -> None:
    """Check, then measure random weights and the files named."""
    check()
    for source in (samples(), files(paths) if paths else iter(())):
        for name, data in source:
            packed = pack(data)
            out = np.empty_like(data)
            unpack(packed, out)
            assert np.array_equal(out, data), name
            ratio = data.nbytes / len(packed)
            print(f"{name}: {data.nbytes:,} bytes, {ratio:.3f} x, {read_head(packed).kinds()}")
            for line in lines(timing(data, packed)):
                print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
