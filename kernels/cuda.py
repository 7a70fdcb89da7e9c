"""CUDA sources: what they have in common, and how they are compiled.

A source is compiled when a function of it is first asked for, for the GPU at hand (cupy keeps the
result on disk as well), and kept for the life of the process.  Errors are cupy's own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

_BLOCKS_Y_MAX: Final = 65_535
_BLOCKS_X_MAX: Final = 64

# The subset that the sources keep to is C as well as C++, so that a test can compile them with gcc, its
# own KERNEL, SHARED, BARRIER, ATOMIC_ADD and conversions in the place of the first half.
PRELUDE: Final = r"""
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifdef __CUDACC__
#define KERNEL extern "C" __global__ void
#define DEVICE static __device__ __forceinline__
#define SHARED __shared__
#define BARRIER() __syncthreads()
#define ATOMIC_ADD(at, n) atomicAdd(at, n)
DEVICE u32 f16_of_f32_hardware(u32 x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(__uint_as_float(x)));
  return y;
}
DEVICE u32 f32_of_f16_hardware(u32 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((u16)x));
  return __float_as_uint(y);
}
DEVICE u32 f32_of_u8(u32 x) { return __float_as_uint((float)x); }
#endif
"""


@functools.cache
def has_gpu() -> bool:
    """Whether there is a GPU, and cupy to use it.  Creates no context."""
    if importlib.util.find_spec("cupy") is None:
        return False
    cupy = importlib.import_module("cupy")
    try:
        return bool(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


def with_constants(source: str, constants: Mapping[str, int | str]) -> str:
    """Put the prelude and a `#define` for each constant before a source."""
    lines = [f"#define {name} {value}" for name, value in constants.items()]
    return "\n".join([PRELUDE, *lines, source])


@functools.cache
def function(source: str, name: str) -> Any:
    """Compile a whole source, prelude and all, and return one of its kernels."""
    cupy = importlib.import_module("cupy")
    return cupy.RawModule(code=source, options=("-std=c++17",)).get_function(name)


def cupy() -> Any:
    """Import cupy, which only GPU paths may do."""
    return importlib.import_module("cupy")


def table_of(entries: Sequence[Sequence[int]]) -> Any:
    """Put the rows of a kernel's table into pinned memory, whose `ptr` kernels read.

    It goes back to a pool when it is let go of, so it is kept until the kernel is done.
    """
    words = np.array(entries, np.uint64)
    memory = cupy().cuda.alloc_pinned_memory(words.nbytes)
    np.frombuffer(memory, np.uint64, words.size)[:] = words.reshape(-1)
    return memory


def grid_of(rows: int, widest: int, threads: int) -> tuple[int, int]:
    """Return how many blocks a launch over a table has, along a row of `widest` items and over the rows."""
    across = max(1, min(_BLOCKS_X_MAX, -(-widest // threads)))
    return across, min(rows, _BLOCKS_Y_MAX)


def launch_rows(
    kernel: Any, entries: Sequence[Sequence[int]], grid: tuple[int, int], threads: int
) -> Any:
    """Launch a kernel that works by a table of rows on cupy's current stream, without waiting.

    Return what has to be kept until it is done: the table, in memory that the kernel reads.
    """
    table = table_of(entries)
    kernel(grid, (threads,), (np.uint64(table.ptr), np.uint64(len(entries))))
    return table


def address_of(data: Any) -> int:
    """Return where a buffer's bytes begin.

    Memory that was registered with CUDA, or allocated by it, has the same address for kernels; other
    memory must not be handed to one.
    """
    array = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    return int(array.__array_interface__["data"][0])
