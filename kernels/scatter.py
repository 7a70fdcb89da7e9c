"""`scatter`: the rows of a batch's result into the egress blocks, cut to their lengths.

Versions
 1. NumPy: one copy a request (`scatter`, the CPU path).
 2. CUDA: one launch for the batch, a block of threads a row, elements written where the answer's bytes
    belong, in registered host memory (`scatter_cuda`).  As in `gather` by a table, so that all outputs of
    a batch that have one datatype are one launch.

The inverse of `gather`: a result is [rows, longest, width]; request i takes the next `rows` rows, of each
the first `length` positions, and gets them behind each other, at any address.  Elements are converted on
the way (`datatypes`).  A result without a ragged axis is one with `longest` = `length` = 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from overcommit.kernels import cuda, datatypes
from overcommit.kernels.datatypes import NUMPY_TYPES, convert, size_of
from overcommit.kernels.gather import Entry, Piece
from overcommit.kernels.timing import Row, lines

Array = np.ndarray[Any, np.dtype[Any]]

THREADS: Final = 128
ENTRY_WORDS: Final = 3


def _check(values: Any, pieces: Sequence[Piece], source: str, target: str) -> None:
    datatypes.expression(source, target)
    if values.ndim != 3 or values.dtype != NUMPY_TYPES[source]:
        raise ValueError(
            f"a result must be {source} [rows, longest, width], not {values.dtype} {list(values.shape)}"
        )
    rows, longest, width = values.shape
    for number, piece in enumerate(pieces):
        view = memoryview(piece.data)
        needed = piece.rows * piece.length * width * size_of(target)
        if (
            view.readonly
            or piece.rows < 0
            or not 0 <= piece.length <= longest
            or view.nbytes != needed
        ):
            raise ValueError(
                f"request {number}: {piece.rows} rows of {piece.length} of {longest} positions need "
                f"{needed} writable bytes, there are {view.nbytes}"
            )
    if sum(piece.rows for piece in pieces) != rows:
        raise ValueError(f"a result of {rows} rows is not what these requests asked for")


# --- reference ----------------------------------------------------------------------------------
def scatter_reference(values: Array, pieces: Sequence[Piece], source: str) -> list[list[float]]:
    """Return each request's numbers as float64, element by element."""
    numbers = datatypes.to_float64(values, source)
    found: list[list[float]] = []
    at = 0
    for piece in pieces:
        mine = []
        for row in range(at, at + piece.rows):
            for position in range(piece.length):
                mine += [float(x) for x in numbers[row, position]]
        found.append(mine)
        at += piece.rows
    return found


# --- CPU ----------------------------------------------------------------------------------------
def scatter(values: Array, pieces: Sequence[Piece], source: str, target: str) -> None:
    """Write each request's part of `values`, contiguous or not, into its piece's bytes.

    Raises ValueError for a result of another type or shape, a piece that has not just the bytes that
    its part needs, and a conversion that does not exist; nothing was written then.
    """
    _check(values, pieces, source, target)
    kind: Any = NUMPY_TYPES[target]
    at = 0
    for data, many, length in pieces:
        mine = values[at : at + many, :length]
        if mine.size:
            np.frombuffer(data, kind).reshape(mine.shape)[...] = convert(mine, source, target)
        at += many


# --- CUDA ---------------------------------------------------------------------------------------
SOURCE: Final = (
    datatypes.SOURCE
    + r"""
// A row is ENTRY words of the table: where it begins, how many elements it has, and where they go.
KERNEL scatter(const u64 *table, u64 rows) {
  u64 step = (u64)gridDim.x * THREADS, row, i;
  for (row = blockIdx.y; row < rows; row += gridDim.y) {
    const u64 *entry = table + row * ENTRY;
    const u8 *from = (const u8 *)entry[0];
    u8 *to = (u8 *)entry[2];
    for (i = (u64)blockIdx.x * THREADS + threadIdx.x; i < entry[1]; i += step) {
      u64 x = load(from + i * SOURCE_BYTES, SOURCE_BYTES);
      store(to + i * TARGET_BYTES, TARGET_BYTES, CONVERT(x));
    }
  }
}
"""
)


def source_of(source: str, target: str) -> str:
    """Return the source for a pair of datatypes."""
    constants = {"THREADS": THREADS, "ENTRY": ENTRY_WORDS, **datatypes.constants(source, target)}
    return cuda.with_constants(SOURCE, constants)


def entries_of(
    address: int,
    longest: int,
    width: int,
    pieces: Sequence[Piece],
    source: str,
    target: str,
) -> list[Entry]:
    """Return the table for a result [rows, longest, width] that lies at this address."""
    row_bytes = longest * width * size_of(source)
    entries: list[Entry] = []
    for piece in pieces:
        begin = cuda.address_of(piece.data) if memoryview(piece.data).nbytes else 0
        count = piece.length * width
        step = count * size_of(target)
        entries += [
            (address + (len(entries) + row) * row_bytes, count, begin + row * step)
            for row in range(piece.rows)
        ]
    return entries


def grid_of(entries: Sequence[Entry]) -> tuple[int, int]:
    """Return how many blocks a launch over these rows has, along a row and over the rows."""
    widest = max((entry[1] for entry in entries), default=1)
    return cuda.grid_of(len(entries), widest, THREADS)


def launch(entries: Sequence[Entry], source: str, target: str) -> Any:
    """Scatter these rows, as `cuda.launch_rows` does; return what it returns, None where there are none."""
    if not entries:
        return None
    kernel = cuda.function(source_of(source, target), "scatter")
    return cuda.launch_rows(kernel, entries, grid_of(entries), THREADS)


def scatter_cuda(values: Any, pieces: Sequence[Piece], source: str, target: str) -> None:
    """Do it from a cupy array: one launch on cupy's current stream, which is waited for.

    Every piece lies in memory that is registered with CUDA.  Raises as `scatter`.
    """
    cupy = cuda.cupy()
    _check(values, pieces, source, target)
    values = cupy.ascontiguousarray(values)
    _, longest, width = values.shape
    if not values.size:
        return
    table = launch(
        entries_of(values.data.ptr, longest, width, pieces, source, target), source, target
    )
    cupy.cuda.get_current_stream().synchronize()
    del table


# --- check and timing ---------------------------------------------------------------------------
def _answers(count: int, target: str, width: int, longest: int) -> list[Piece]:
    lengths = np.random.default_rng(count).integers(0, longest + 1, count)
    size = width * size_of(target)
    return [Piece(bytearray(int(length) * size), 1, int(length)) for length in lengths]


def check() -> None:
    """Compare all paths: conversions of random bits, which have every kind of NaN among them."""
    random = np.random.default_rng(1)
    for source, target in [*datatypes.CONVERSIONS, ("FP32", "FP32"), ("INT64", "INT64")]:
        pieces = _answers(9, target, 3, 40)
        raw = random.integers(0, 256, 9 * 40 * 3 * size_of(source), np.uint8)
        values = raw.view(NUMPY_TYPES[source]).reshape(9, 40, 3)
        scatter(values, pieces, source, target)
        for row, piece in enumerate(pieces):
            expected = convert(values[row, : piece.length], source, target)
            assert bytes(piece.data) == expected.tobytes(), (source, target)
        if cuda.has_gpu():
            cupy = cuda.cupy()
            there = [_pinned(piece) for piece in pieces]
            scatter_cuda(cupy.asarray(values), there, source, target)
            cupy.cuda.Device().synchronize()
            for piece, copy in zip(pieces, there, strict=True):
                assert bytes(copy.data) == bytes(piece.data), (source, target)


def _pinned(piece: Piece) -> Piece:
    memory = cuda.cupy().cuda.alloc_pinned_memory(max(1, len(piece.data)))
    return Piece(np.frombuffer(memory, np.uint8, len(piece.data)), piece.rows, piece.length)


def timing() -> list[Row]:
    """What to measure: embeddings of 64 requests, as rows and as sequences."""
    rows = []
    for longest in (1, 32):
        pieces = _answers(64, "FP32", 384, longest)
        values = np.ones((64, longest, 384), np.float16)
        nbytes = sum(len(piece.data) for piece in pieces)

        def here(v: Array = values, p: list[Piece] = pieces) -> None:
            scatter(v, p, "FP16", "FP32")

        name = f"64 answers of up to {longest} x 384, FP16 to FP32"
        rows.append(Row(f"CPU, {name}"[:44], nbytes, here))
        if cuda.has_gpu():
            cupy = cuda.cupy()
            device, pinned = cupy.asarray(values), [_pinned(piece) for piece in pieces]

            def there(v: Any = device, p: list[Piece] = pinned) -> None:
                scatter_cuda(v, p, "FP16", "FP32")

            rows.append(Row(f"CUDA, {name}"[:44], nbytes, there, cupy.cuda.Device().synchronize))
    return rows


if __name__ == "__main__":
    check()
    sys.stdout.writelines(f"{line}\n" for line in lines(timing()))
