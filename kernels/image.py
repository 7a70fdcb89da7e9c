"""`image`: pictures, uint8 rows of pixels (NHWC), to normalised planes (NCHW) in FP32 or FP16.

Versions
 1. NumPy: a table of 256 results for each channel, looked up plane by plane (`normalise`, the CPU path).
 2. CUDA: the tables in shared memory, a thread a pixel (`normalise_cuda`).

The result is (pixel / 255 - mean[channel]) / std[channel].  A pixel has 256 values, so all results are
worked out once, in float64, and rounded once: within half a unit in the last place, and the same bits on
both paths.  Resizing is not done here: what it should be differs from model to model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from overcommit.kernels import cuda
from overcommit.kernels.datatypes import NUMPY_TYPES
from overcommit.kernels.timing import Row, lines

Array = np.ndarray[Any, np.dtype[Any]]

CHANNELS_MAX: Final = 4
THREADS: Final = 256
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)


# --- reference ----------------------------------------------------------------------------------
def normalise_reference(pixels: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Do it in float64."""
    numbers = pixels.astype(np.float64) / 255.0
    return np.moveaxis((numbers - np.asarray(mean)) / np.asarray(std), -1, 1)


# --- CPU ----------------------------------------------------------------------------------------
def tables(mean: Sequence[float], std: Sequence[float], datatype: str) -> Array:
    """Return the [channels, 256] results, in the datatype.

    Raises ValueError for a number of channels that is not 1 to 4, a `std` of zero, or a datatype other
    than FP32 and FP16.
    """
    if not 1 <= len(mean) == len(std) <= CHANNELS_MAX:
        raise ValueError(f"mean and std need a number for each of 1 to {CHANNELS_MAX} channels")
    if not all(std):
        raise ValueError("a std of zero cannot be divided by")
    if datatype not in ("FP32", "FP16"):
        raise ValueError(f"pictures become FP32 or FP16, not {datatype}")
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1).repeat(len(mean), axis=3)
    exact = normalise_reference(levels, mean, std).reshape(len(mean), 256)
    with np.errstate(over="ignore", under="ignore"):
        return np.ascontiguousarray(exact.astype(NUMPY_TYPES[datatype]))


def normalise(
    pixels: Array,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    datatype: str = "FP32",
) -> Array:
    """Return [n, channels, height, width] of uint8 [n, height, width, channels], contiguous or not.

    Raises ValueError as `tables`, and for pixels of another type or shape.
    """
    table = tables(mean, std, datatype)
    _check_pixels(pixels, len(table))
    n, height, width, channels = pixels.shape
    planes: Array = np.empty((n, channels, height, width), table.dtype)
    for picture in range(n):
        for channel in range(channels):
            # "clip" because the default mode checks every index, and writes to a copy first.
            table[channel].take(
                pixels[picture, :, :, channel], out=planes[picture, channel], mode="clip"
            )
    return planes


def _check_pixels(pixels: Any, channels: int) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != channels:
        raise ValueError(
            f"pixels must be uint8 [n, height, width, {channels}], not {pixels.dtype} "
            f"{list(pixels.shape)}"
        )


# --- CUDA ---------------------------------------------------------------------------------------
SOURCE: Final = r"""
#if TARGET_BYTES == 2
typedef u16 Element;
#else
typedef u32 Element;
#endif

// Block y is picture y.
KERNEL normalise(const u8 *pixels, const Element *tables, Element *planes, u64 area) {
  SHARED Element lookups[CHANNELS * 256];
  u64 step = (u64)gridDim.x * THREADS, i;
  const u8 *in = pixels + blockIdx.y * area * CHANNELS;
  Element *out = planes + blockIdx.y * area * CHANNELS;
  u32 k;
  for (k = threadIdx.x; k < CHANNELS * 256; k += THREADS) lookups[k] = tables[k];
  BARRIER();
  for (i = (u64)blockIdx.x * THREADS + threadIdx.x; i < area; i += step)
    for (k = 0; k < CHANNELS; k++) out[k * area + i] = lookups[k * 256 + in[i * CHANNELS + k]];
}
"""
_PIXELS_A_THREAD: Final = 8


def source(channels: int, datatype: str) -> str:
    """Return the source for a number of channels and a datatype."""
    size = np.dtype(NUMPY_TYPES[datatype]).itemsize
    constants = {"CHANNELS": channels, "TARGET_BYTES": size, "THREADS": THREADS}
    return cuda.with_constants(SOURCE, constants)


def normalise_cuda(
    pixels: Any,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    datatype: str = "FP32",
    table: Any = None,
) -> Any:
    """Do it to a cupy array on cupy's current stream, without waiting.  Raises as `normalise`.

    `table`: what `tables` gives, where it is on the device already.
    """
    cupy = cuda.cupy()
    if table is None:
        table = cupy.asarray(tables(mean, std, datatype))
    _check_pixels(pixels, len(table))
    pixels = cupy.ascontiguousarray(pixels)
    n, height, width, channels = pixels.shape
    planes = cupy.empty((n, channels, height, width), table.dtype)
    area = height * width
    if planes.size:
        grid = (-(-area // (THREADS * _PIXELS_A_THREAD)), n)
        kernel = cuda.function(source(channels, datatype), "normalise")
        kernel(grid, (THREADS,), (pixels, table, planes, np.uint64(area)))
    return planes


# --- check and timing ---------------------------------------------------------------------------
def check() -> None:
    """Compare all paths with the reference: half a unit in the last place."""
    random = np.random.default_rng(1)
    for shape in ((0, 4, 4, 3), (1, 1, 1, 3), (2, 17, 13, 3), (1, 224, 224, 3)):
        pixels = random.integers(0, 256, shape, np.uint8)
        expected = normalise_reference(pixels, IMAGENET_MEAN, IMAGENET_STD)
        for datatype in ("FP32", "FP16"):
            planes = normalise(pixels, datatype=datatype)
            assert np.array_equal(planes, expected.astype(planes.dtype)), (shape, datatype)
            if cuda.has_gpu():
                cupy = cuda.cupy()
                there = cupy.asnumpy(normalise_cuda(cupy.asarray(pixels), datatype=datatype))
                assert np.array_equal(there, planes), (shape, datatype)


def timing() -> list[Row]:
    """What to measure: 16 pictures of 224 x 224, per byte of pixels."""
    pixels = np.random.default_rng(1).integers(0, 256, (16, 224, 224, 3), np.uint8)
    mean, std = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)

    def plain() -> Array:
        return np.ascontiguousarray(
            np.moveaxis((pixels.astype(np.float32) / np.float32(255) - mean) / std, -1, 1)
        )

    rows = [
        Row("CPU, FP32", pixels.nbytes, lambda: normalise(pixels)),
        Row("CPU, FP16", pixels.nbytes, lambda: normalise(pixels, datatype="FP16")),
        Row("NumPy as one writes it, FP32", pixels.nbytes, plain),
    ]
    if cuda.has_gpu():
        cupy = cuda.cupy()
        device = cupy.asarray(pixels)
        wait = cupy.cuda.Device().synchronize
        rows.append(Row("CUDA, FP32", pixels.nbytes, lambda: normalise_cuda(device), wait))
    return rows


if __name__ == "__main__":
    check()
    sys.stdout.writelines(f"{line}\n" for line in lines(timing()))
