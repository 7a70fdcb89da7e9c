"""`gather`: ragged requests out of their ingress blocks into one padded batch, mask and lengths.

Versions
 1. NumPy: one copy a request, and its padding, no element written twice (`gather`, the CPU path).
 2. CUDA: one launch for the batch, a block of threads a row, elements read where the client's bytes are,
    in registered host memory (`gather_cuda`).  A row that lies at an odd address is read by bytes.  The
    kernel goes by a table of rows, each with its own target: so all inputs of a batch that have one
    datatype are one launch (workers: `runtime/engines/device_batch.py`).

A request is `rows` rows of `length` positions of `width` elements each, behind each other, at any address.
The batch is [sum of rows, longest, width], padded at the end of each row; the mask is 1 where a request
has a position; the lengths count positions.  Elements are converted on the way (`datatypes`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from overcommit.kernels import cuda, datatypes
from overcommit.kernels.datatypes import NUMPY_TYPES, convert, size_of
from overcommit.kernels.timing import Row, lines

Array = np.ndarray[Any, np.dtype[Any]]

THREADS: Final = 128
ENTRY_WORDS: Final = 8
Entry = tuple[int, ...]  # ENTRY_WORDS of the table


class Piece(NamedTuple):
    """What one request brings: C-contiguous bytes of rows x length x width elements."""

    data: Any
    rows: int
    length: int


class Batch(NamedTuple):
    """Arrays of NumPy or cupy: values [r, longest, width], mask int64 [r, longest], lengths int64 [r]."""

    values: Any
    mask: Any
    lengths: Any


def _shape(
    pieces: Sequence[Piece], source: str, width: int, longest: int | None
) -> tuple[int, int]:
    """Check what is asked for; return the rows of the batch and their length."""
    size = size_of(source) * width
    for number, piece in enumerate(pieces):
        nbytes = memoryview(piece.data).nbytes
        if piece.rows < 0 or piece.length < 0 or nbytes != piece.rows * piece.length * size:
            raise ValueError(
                f"request {number} has {nbytes} bytes; {piece.rows} rows of {piece.length} positions "
                f"are {piece.rows * piece.length * size}"
            )
    most = max((piece.length for piece in pieces), default=0)
    if longest is not None and longest < most:
        raise ValueError(f"a request of {most} positions does not fit rows of {longest}")
    return sum(piece.rows for piece in pieces), most if longest is None else longest


# --- reference ----------------------------------------------------------------------------------
def gather_reference(
    pieces: Sequence[Piece], source: str, width: int, longest: int, pad: float
) -> Array:
    """Return the values as float64, element by element."""
    rows = []
    for piece in pieces:
        raw = bytes(memoryview(piece.data).cast("B")) if memoryview(piece.data).nbytes else b""
        numbers = datatypes.to_float64(np.frombuffer(raw, NUMPY_TYPES[source]), source)
        for row in range(piece.rows):
            begin = row * piece.length * width
            mine = list(numbers[begin : begin + piece.length * width])
            rows.append(mine + [pad] * ((longest - piece.length) * width))
    return np.array(rows, np.float64).reshape(len(rows), longest, width)


# --- CPU ----------------------------------------------------------------------------------------
def gather(
    pieces: Sequence[Piece],
    source: str,
    target: str,
    width: int = 1,
    longest: int | None = None,
    pad: float = 0,
) -> Batch:
    """Make a batch; rows get `longest` positions, or as many as the longest request has.

    Raises ValueError for bytes that are not what rows and length say, a request that does not fit,
    and a conversion that does not exist.
    """
    rows, longest = _shape(pieces, source, width, longest)
    datatypes.expression(source, target)
    kind: Any = NUMPY_TYPES[target]
    padding = np.array([datatypes.bits_of(pad, target)], "<u8").view(kind)[0]
    values: Array = np.empty((rows, longest, width), kind)
    mask = np.zeros((rows, longest), np.int64)
    lengths = np.empty(rows, np.int64)
    at = 0
    for data, many, length in pieces:
        end = at + many
        if many and length and width:
            elements = np.frombuffer(data, NUMPY_TYPES[source])
            values[at:end, :length] = convert(elements, source, target).reshape(many, length, width)
        values[at:end, length:] = padding
        mask[at:end, :length] = 1
        lengths[at:end] = length
        at = end
    return Batch(values, mask, lengths)


# --- CUDA ---------------------------------------------------------------------------------------
SOURCE: Final = (
    datatypes.SOURCE
    + r"""
// A row is ENTRY words of the table: where it begins, its positions, those of the batch, elements a position,
// the padding's bits, and where its values, its mask and its length go; 0: nobody wants them.  Blocks with
// the same y share the row; a batch has more rows than y goes, so they are counted in steps.
KERNEL gather(const u64 *table, u64 rows) {
  u64 step = (u64)gridDim.x * THREADS, row, i;
  u64 first = (u64)blockIdx.x * THREADS + threadIdx.x;
  for (row = blockIdx.y; row < rows; row += gridDim.y) {
    const u64 *entry = table + row * ENTRY;
    const u8 *from = (const u8 *)entry[0];
    u64 length = entry[1], longest = entry[2], mine = length * entry[3], whole = longest * entry[3];
    u8 *values = (u8 *)entry[5];
    i64 *mask = (i64 *)entry[6], *lengths = (i64 *)entry[7];
    for (i = first; i < whole; i += step) {
      u64 x = entry[4];
      if (i < mine) {
        x = load(from + i * SOURCE_BYTES, SOURCE_BYTES);
        x = CONVERT(x);
      }
      store(values + i * TARGET_BYTES, TARGET_BYTES, x);
    }
    if (mask)
      for (i = first; i < longest; i += step) mask[i] = i < length;
    if (lengths && first == 0) *lengths = (i64)length;
  }
}
"""
)


def source_of(source: str, target: str) -> str:
    """Return the source for a pair of datatypes."""
    constants = {"THREADS": THREADS, "ENTRY": ENTRY_WORDS, **datatypes.constants(source, target)}
    return cuda.with_constants(SOURCE, constants)


def entries_of(
    pieces: Sequence[Piece],
    source: str,
    target: str,
    width: int,
    longest: int,
    pad_bits: int,
    addresses: tuple[int, int, int],
) -> list[Entry]:
    """Return the table of a batch whose values, mask and lengths lie at these addresses."""
    values, mask, lengths = addresses
    row_bytes = longest * width * size_of(target)
    entries: list[Entry] = []
    for piece in pieces:
        begin = cuda.address_of(piece.data) if memoryview(piece.data).nbytes else 0
        step = piece.length * width * size_of(source)
        for row in range(piece.rows):
            at = len(entries)
            entries.append(
                (
                    *(begin + row * step, piece.length, longest, width, pad_bits),
                    *(values + at * row_bytes, mask + at * longest * 8, lengths + at * 8),
                )
            )
    return entries


def grid_of(entries: Sequence[Entry]) -> tuple[int, int]:
    """Return how many blocks a launch over these rows has, along a row and over the rows."""
    widest = max((entry[2] * max(1, entry[3]) for entry in entries), default=1)
    return cuda.grid_of(len(entries), widest, THREADS)


def launch(entries: Sequence[Entry], source: str, target: str) -> Any:
    """Gather these rows, as `cuda.launch_rows` does; return what it returns, None where there are none."""
    if not entries:
        return None
    kernel = cuda.function(source_of(source, target), "gather")
    return cuda.launch_rows(kernel, entries, grid_of(entries), THREADS)


def gather_cuda(
    pieces: Sequence[Piece],
    source: str,
    target: str,
    width: int = 1,
    longest: int | None = None,
    pad: float = 0,
) -> Batch:
    """Make a batch on the device: one launch on cupy's current stream, which is waited for.

    Every piece lies in memory that is registered with CUDA.  Raises as `gather`.
    """
    cupy = cuda.cupy()
    rows, longest = _shape(pieces, source, width, longest)
    bits = datatypes.bits_of(pad, target)
    datatypes.expression(source, target)
    values = cupy.empty((rows, longest, width), NUMPY_TYPES[target])
    mask = cupy.empty((rows, longest), np.int64)
    lengths = cupy.empty(rows, np.int64)
    if rows:
        addresses = (values.data.ptr, mask.data.ptr, lengths.data.ptr)
        table = launch(
            entries_of(pieces, source, target, width, longest, bits, addresses), source, target
        )
        cupy.cuda.get_current_stream().synchronize()
        del table
    return Batch(values, mask, lengths)


# --- check and timing ---------------------------------------------------------------------------
def _requests(count: int, source: str, width: int, length_max: int) -> list[Piece]:
    random = np.random.default_rng(count)
    pieces = []
    for length in random.integers(0, length_max + 1, count):
        size = int(length) * width * size_of(source)
        pieces.append(Piece(random.integers(0, 256, size, np.uint8).data, 1, int(length)))
    return pieces


def check() -> None:
    """Compare all paths: conversions of random bits, which have every kind of NaN among them."""
    for source, target in [*datatypes.CONVERSIONS, ("INT64", "INT64"), ("FP32", "FP32")]:
        pieces = _requests(9, source, 3, 40)
        batch = gather(pieces, source, target, 3, 50)
        for row, piece in enumerate(pieces):
            mine = np.frombuffer(piece.data, NUMPY_TYPES[source]).reshape(piece.length, 3)
            assert (
                batch.values[row, : piece.length].tobytes()
                == convert(mine, source, target).tobytes()
            )
            assert not batch.values[row, piece.length :].view(np.uint8).any()
            assert batch.mask[row].sum() == batch.lengths[row] == piece.length
        if cuda.has_gpu():
            there = gather_cuda(_pinned(pieces), source, target, 3, 50)
            for here, device in zip(batch, there, strict=True):
                assert cuda.cupy().asnumpy(device).tobytes() == here.tobytes(), (source, target)


def _pinned(pieces: Sequence[Piece]) -> list[Piece]:
    """Copy pieces into memory that kernels can read."""
    copies = []
    for piece in pieces:
        raw = np.frombuffer(piece.data, np.uint8)
        array = np.frombuffer(
            cuda.cupy().cuda.alloc_pinned_memory(max(1, raw.nbytes)), np.uint8, raw.nbytes
        )
        array[:] = raw
        copies.append(Piece(array, piece.rows, piece.length))
    return copies


def timing() -> list[Row]:
    """What to measure: token ids of 64 requests, and rows of FP32 to FP16."""
    rows = []
    for source, target, width, length in (("INT64", "INT32", 1, 128), ("FP32", "FP16", 384, 32)):
        numbers = (
            np.random.default_rng(1).standard_normal(length * width).astype(NUMPY_TYPES[source])
        )
        pieces = [
            Piece(numbers[: piece.length * width].copy(), 1, piece.length)
            for piece in _requests(64, source, width, length)
        ]
        nbytes = sum(memoryview(piece.data).nbytes for piece in pieces)

        def here(
            p: list[Piece] = pieces, s: str = source, t: str = target, w: int = width
        ) -> Batch:
            return gather(p, s, t, w)

        name = f"64 requests of up to {length} x {width}, {source} to {target}"
        rows.append(Row(f"CPU, {name}"[:44], nbytes, here))
        if cuda.has_gpu():
            pinned = _pinned(pieces)
            wait = cuda.cupy().cuda.Device().synchronize

            def there(
                p: list[Piece] = pinned, s: str = source, t: str = target, w: int = width
            ) -> Batch:
                return gather_cuda(p, s, t, w)

            rows.append(Row(f"CUDA, {name}"[:44], nbytes, there, wait))
    return rows


if __name__ == "__main__":
    check()
    sys.stdout.writelines(f"{line}\n" for line in lines(timing()))
