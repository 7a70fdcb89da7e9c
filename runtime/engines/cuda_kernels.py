"""`Kernels` on an NVIDIA GPU: the CUDA sources of `kernels/` by cupy, on torch's streams.

cupy and torch use the primary context both.  Everything is compiled when this is made, so that no batch
waits for a compiler.  Not yet run on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

import torch

from overcommit.kernels import cuda, digest, gather, image, scatter
from overcommit.kernels.gather import Entry
from overcommit.runtime.config import Picture

log = logging.getLogger("overcommit.worker")

# Bits are moved by their number, whatever they mean; truth values are made of any byte.
MOVES: Final = (
    ("UINT8", "UINT8"),
    ("UINT16", "UINT16"),
    ("UINT32", "UINT32"),
    ("UINT64", "UINT64"),
)
TRUTHS: Final = ("UINT8", "BOOL")


class CudaKernels:
    """One GPU's; `place` is torch's name of it."""

    def __init__(self, place: str) -> None:
        self._cupy = cuda.cupy()
        self._device = torch.device(place)
        self._cupy.cuda.Device(self._device.index or 0).use()
        self._tables: dict[Picture, Any] = {}  # as many as there are kinds of pictures
        for pair in (*MOVES, TRUTHS):
            cuda.function(gather.source_of(*pair), "gather")
        for pair in MOVES:
            cuda.function(scatter.source_of(*pair), "scatter")
        cuda.function(digest.SOURCE, "digest")

    def _on_stream(self) -> Any:
        stream = torch.cuda.current_stream(self._device)
        return self._cupy.cuda.ExternalStream(stream.cuda_stream)

    def gather(self, source: str, target: str, entries: Sequence[Entry]) -> object:
        """Gather; see `Kernels`."""
        with self._on_stream():
            return gather.launch(entries, source, target)

    def scatter(self, source: str, target: str, entries: Sequence[Entry]) -> object:
        """Scatter; see `Kernels`."""
        with self._on_stream():
            return scatter.launch(entries, source, target)

    def normalise(self, pixels: torch.Tensor, picture: Picture) -> torch.Tensor:
        """Normalise; see `Kernels`."""
        with self._on_stream():
            table = self._tables.get(picture)
            if table is None:
                made = image.tables(picture.mean, picture.std, picture.datatype)
                table = self._tables[picture] = self._cupy.asarray(made)
            planes = image.normalise_cuda(
                *(self._cupy.asarray(pixels), picture.mean, picture.std, picture.datatype, table)
            )
            return torch.as_tensor(planes, device=self._device)

    def copy_in(self, target: int, source: int, nbytes: int) -> None:
        """Copy; see `Kernels`."""
        self._copy(target, source, nbytes, self._cupy.cuda.runtime.memcpyHostToDevice)

    def copy_out(self, target: int, source: int, nbytes: int) -> None:
        """Copy; see `Kernels`."""
        self._copy(target, source, nbytes, self._cupy.cuda.runtime.memcpyDeviceToHost)

    def _copy(self, target: int, source: int, nbytes: int, kind: int) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._cupy.cuda.runtime.memcpyAsync(target, source, nbytes, kind, stream)

    def digest(self, address: int, nbytes: int, at: int = 0) -> int:
        """Digest; see `Kernels`."""
        with self._on_stream():
            return digest.digest_at(address, nbytes, at)

    def is_there(self, tensor: torch.Tensor) -> bool:
        """Whether it is the GPU's."""
        return tensor.is_cuda


def try_open(place: str) -> CudaKernels | None:
    """Return the GPU's kernels; None, and a line in the log, where they cannot be had."""
    if not cuda.has_gpu():
        log.warning(
            "batches for the GPU are made by the CPU, for its kernels need cupy: install "
            "overcommit[cuda12] or [cuda13]"
        )
        return None
    try:
        return CudaKernels(place)
    except Exception as error:  # NVRTC's, the driver's, cupy's own
        log.warning("batches for the GPU are made by the CPU: %s", str(error)[:200])
        return None
