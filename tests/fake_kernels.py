"""`Kernels` of the fake device: by the CPU's conversions, or by the CUDA sources, compiled for the CPU.

Host memory that no kernel reaches must not be named.  Reads happen at once, and so do writes to the device;
what goes to host memory is written when the stream comes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from overcommit.kernels import datatypes, digest, gather, image, scatter
from overcommit.kernels.datatypes import NUMPY_TYPES, size_of
from overcommit.kernels.gather import Entry
from overcommit.runtime import _shm
from overcommit.runtime.config import Picture

if TYPE_CHECKING:
    from fake_backend import FakeBackend

    Compile = Callable[[str, str], Callable[..., None]]


class FakeKernels:
    """Counts launches and copies.  `compiled`: what makes a CUDA source run here."""

    def __init__(
        self,
        backend: FakeBackend,
        reaches: Callable[[int, int], bool],
        compiled: Compile | None = None,
    ) -> None:
        self._backend = backend
        self._reaches = reaches
        self._compiled = compiled
        self.launches: list[tuple[str, str, str, int]] = []  # operation, datatypes, rows
        self.copies: list[tuple[str, int]] = []  # in or out, bytes

    def _host(self, address: int, nbytes: int) -> None:
        assert self._reaches(address, nbytes), "a kernel does not reach that host memory"

    def gather(self, source: str, target: str, entries: Sequence[Entry]) -> object:
        self.launches.append(("gather", source, target, len(entries)))
        for at, length, _, width, *_ in entries:
            if length * width:
                self._host(at, length * width * size_of(source))
        if self._compiled is not None:
            kernel = self._compiled(gather.source_of(source, target), "gather")
            table = np.array(entries, np.uint64)
            kernel(gather.grid_of(entries), gather.THREADS, table, len(entries))
            return table
        for at, length, longest, width, pad, values, mask, lengths in entries:
            assert mask == lengths == 0, "no model asks for them"
            kind = np.dtype(NUMPY_TYPES[target])
            row = np.empty(longest * width, kind)
            row[:] = np.array([pad], "<u8").view(kind)[0]
            row[: length * width] = datatypes.convert(
                _read(at, length * width, source), source, target
            )
            _shm.view(values, row.nbytes, True)[:] = row.view(np.uint8).data
        return entries

    def scatter(self, source: str, target: str, entries: Sequence[Entry]) -> object:
        self.launches.append(("scatter", source, target, len(entries)))
        for _, count, to in entries:
            self._host(to, count * size_of(target))

        def write() -> None:
            if self._compiled is not None:
                kernel = self._compiled(scatter.source_of(source, target), "scatter")
                grid = scatter.grid_of(entries)
                kernel(grid, scatter.THREADS, np.array(entries, np.uint64), len(entries))
                return
            for at, count, to in entries:
                row = datatypes.convert(_read(at, count, source), source, target)
                _shm.view(to, row.nbytes, True)[:] = row.view(np.uint8).data

        self._backend.enqueue(write)
        return entries

    def normalise(self, pixels: torch.Tensor, picture: Picture) -> torch.Tensor:
        self.launches.append(("normalise", "UINT8", picture.datatype, len(pixels)))
        planes = image.normalise(pixels.numpy(), picture.mean, picture.std, picture.datatype)
        return torch.from_numpy(planes)

    def copy_in(self, target: int, source: int, nbytes: int) -> None:
        self.copies.append(("in", nbytes))
        self._host(source, nbytes)
        _shm.copy(target, source, nbytes)

    def copy_out(self, target: int, source: int, nbytes: int) -> None:
        self.copies.append(("out", nbytes))
        self._host(target, nbytes)
        self._backend.enqueue(lambda: _shm.copy(target, source, nbytes))

    def digest(self, address: int, nbytes: int, at: int = 0) -> int:
        self.launches.append(("digest", "UINT64", "UINT64", 1))
        return digest.digest(_shm.view(address, nbytes, False), at)

    def is_there(self, tensor: torch.Tensor) -> bool:
        return True


def _read(address: int, count: int, datatype: str) -> np.ndarray[Any, np.dtype[Any]]:
    if not count:
        return np.empty(0, NUMPY_TYPES[datatype])
    return np.frombuffer(
        _shm.view(address, count * size_of(datatype), False), NUMPY_TYPES[datatype]
    )
