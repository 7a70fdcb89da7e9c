"""The C heap of a process that runs models: what one batch frees is there for the next.

A model's activations are allocated and freed anew in each batch.  Left to itself, glibc gives the
top of the heap back to the kernel after a batch and takes it again in the next: 25 MB in 6,500 page
faults for sixteen sentences through MiniLM, a tenth of the batch's time.  Whether it does depends on
what the process happened to free before, so it is decided here.

Invariants
 1. At most HEAP_KEPT_BYTES_MAX of freed memory stay at the top of the heap.
 2. A process without a batch for HEAP_IDLE_NS has given back what it can, once.

`keep` is called by a worker as it starts, `Heap` by its loop.  Where the C library is another than
glibc, both do nothing.
"""

from __future__ import annotations

import ctypes
from typing import Final

from overcommit.runtime.config import HEAP_BLOCK_BYTES_MAX, HEAP_IDLE_NS, HEAP_KEPT_BYTES_MAX

# From glibc's malloc.h.
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3

_libc: Final = ctypes.CDLL(None)


def keep() -> bool:
    """Let freed memory stay in this process; False when the C library cannot be told to."""
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is None:
        return False
    # The first alone would leave the second at 128 KiB: a mapping, and its faults, for each tensor.
    return bool(
        mallopt(M_TRIM_THRESHOLD, HEAP_KEPT_BYTES_MAX)
        and mallopt(M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES_MAX)
    )


def trim() -> None:
    """Give freed memory back to the kernel."""
    malloc_trim = getattr(_libc, "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


class Heap:
    """When an idle worker gives its freed memory back."""

    def __init__(self) -> None:
        self._batches = 0  # ever, as of the last look
        self._since_ns = 0  # no batch was seen since then
        self._is_trimmed = True  # nothing has run yet

    def trim_if_due(self, batches: int, now_ns: int) -> bool:
        """Trim, if no batch ran for HEAP_IDLE_NS; `batches` is how many ran, ever."""
        if batches != self._batches:
            self._batches, self._since_ns, self._is_trimmed = batches, now_ns, False
        if self._is_trimmed or now_ns - self._since_ns < HEAP_IDLE_NS:
            return False
        self._is_trimmed = True
        trim()
        return True
