"""What `kernels/` does on a device, as a batch needs it: the one place where device or CPU is chosen.

`cuda_kernels.py` is the GPU's; a backend without one (no cupy) has its batches made by the CPU.  Each
call begins something on the stream that its thread has entered, and does not wait.  What `gather` and
`scatter` return is kept until the stream has done it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from overcommit.kernels.gather import Entry
from overcommit.runtime.config import Picture


class Kernels(Protocol):
    """The operations on one device."""

    def gather(self, source: str, target: str, entries: Sequence[Entry]) -> object:
        """Gather rows in one launch; see `kernels.gather.launch`."""
        ...

    def scatter(self, source: str, target: str, entries: Sequence[Entry]) -> object:
        """Scatter rows in one launch; see `kernels.scatter.launch`."""
        ...

    def normalise(self, pixels: torch.Tensor, picture: Picture) -> torch.Tensor:
        """Make planes of uint8 [n, height, width, channels]; see `kernels.image`."""
        ...

    def copy_in(self, target: int, source: int, nbytes: int) -> None:
        """Copy from registered memory to the device."""

    def copy_out(self, target: int, source: int, nbytes: int) -> None:
        """Copy from the device to registered memory."""

    def digest(self, address: int, nbytes: int, at: int = 0) -> int:
        """Return the digest of device memory, `at` bytes into the whole; waits for it."""
        ...

    def is_there(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies where these kernels reach it."""
        ...
