"""`gather`: ragged requests out of their ingress blocks into one padded batch, mask and lengths.

Versions
 1. NumPy: one copy a request, and its padding, no element written twice (`gather`, the CPU path).
 2. CUDA: one launch for the batch, a block of threads a row, elements read where the client's bytes are,
    in registered host memory (`gather_cuda`).  A row that lies at an odd address is read by bytes.

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
// Row r begins at address places[2 * r] and has places[2 * r + 1] positions.  Blocks with the same y share
// the row; a batch has more rows than y goes, so they are counted in steps.
KERNEL gather(const u64 *places, u64 rows, u64 longest, u64 width, u64 pad, u8 *values, i64 *mask,
              i64 *lengths) {
  u64 whole = longest * width, step = (u64)gridDim.x * THREADS, row, i;
  u64 first = (u64)blockIdx.x * THREADS + threadIdx.x;
  for (row = blockIdx.y; row < rows; row += gridDim.y) {
    const u8 *from = (const u8 *)places[2 * row];
    u64 length = places[2 * row + 1], mine = length * width;
    for (i = first; i < whole; i += step) {
      u64 x = pad;
      if (i < mine) {
        x = load(from + i * SOURCE_BYTES, SOURCE_BYTES);
        x = CONVERT(x);
      }
      store(values + (row * whole + i) * TARGET_BYTES, TARGET_BYTES, x);
    }
    for (i = first; i < longest; i += step) mask[row * longest + i] = i < length;
    if (first == 0) lengths[row] = (i64)length;
  }
}
"""
)
_BLOCKS_Y_MAX: Final = 65_535
_BLOCKS_X_MAX: Final = 64


def source_of(source: str, target: str) -> str:
    """Return the source for a pair of datatypes."""
    return cuda.with_constants(SOURCE, {"THREADS": THREADS, **datatypes.constants(source, target)})


def places_of(pieces: Sequence[Piece], source: str, width: int) -> Array:
    """Return [rows, 2] of uint64: where each row of the batch begins, and how many positions it has."""
    places: list[tuple[int, int]] = []
    for piece in pieces:
        begin = cuda.address_of(piece.data) if memoryview(piece.data).nbytes else 0
        step = piece.length * width * size_of(source)
        places += [(begin + row * step, piece.length) for row in range(piece.rows)]
    return np.array(places, np.uint64).reshape(len(places), 2)


def gather_cuda(
    pieces: Sequence[Piece],
    source: str,
    target: str,
    width: int = 1,
    longest: int | None = None,
    pad: float = 0,
    places: Array | None = None,
) -> Batch:
    """Make a batch on the device: one launch on cupy's current stream, without waiting.

    Every piece lies in memory that is registered with CUDA and stays as it is until the launch is done;
    `places`, [rows, 2] of uint64 in such memory, is used for the rows' addresses, or pinned memory is
    taken for them.  Raises as `gather`.
    """
    cupy = cuda.cupy()
    rows, longest = _shape(pieces, source, width, longest)
    bits = datatypes.bits_of(pad, target)
    kernel = cuda.function(source_of(source, target), "gather")
    values = cupy.empty((rows, longest, width), NUMPY_TYPES[target])
    mask = cupy.empty((rows, longest), np.int64)
    lengths = cupy.empty(rows, np.int64)
    if rows:
        table = places_of(pieces, source, width)
        if places is None:
            moved = cupy.asarray(table)  # staged by the driver: may be freed when this returns
            pointer = moved.data.ptr
        else:
            places[:rows] = table
            pointer = cuda.address_of(places)
        blocks = max(1, min(_BLOCKS_X_MAX, -(-longest * width // THREADS)))
        arguments = [np.uint64(n) for n in (pointer, rows, longest, width, bits)]
        kernel((blocks, min(rows, _BLOCKS_Y_MAX)), (THREADS,), (*arguments, values, mask, lengths))
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
