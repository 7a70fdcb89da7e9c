"""The memory that all processes share, owned by the supervisor as descriptors.

Invariants
 1. Every piece is a sealed memfd: it has no name, nothing to unlink, and no peer can shrink it
    under another.  It lives as long as a process holds it, and dies with the last one.
 2. The supervisor maps only the residency table; weights it never touches.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from overcommit.runtime import _shm
from overcommit.runtime.chunk_table import ChunkTable
from overcommit.runtime.config import VERSIONS_MAX
from overcommit.runtime.gpu import Shares
from overcommit.runtime.vault import Vault


def create_memfd(name: str, nbytes: int) -> int:
    """Make a memfd of this size, sealed against shrinking and growing."""
    fd = os.memfd_create(f"overcommit-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


class SharedMemory:
    """The arenas and the residency table of one server."""

    def __init__(
        self,
        device_bytes: int,
        host_bytes: int,
        cuda_device: int | None = None,
        shares: Shares = "vmm",
    ) -> None:
        """Make the memfds; with a `cuda_device` the memory of DEVICE comes from the mover.

        As chunks ("vmm"), or as a handle of one allocation, which is None while there is none ("ipc").
        """
        self.shares: Shares = shares
        self.handle: bytes | None = None
        self.is_gone = (
            False  # the allocation went with its mover, and not all of its users have ended
        )
        self.device_bytes = device_bytes
        self.host_bytes = host_bytes
        self.cuda_device = cuda_device
        is_cuda = cuda_device is not None
        self.device_fd = None if is_cuda else create_memfd("device", device_bytes)
        self.vault: Vault | None = None
        if is_cuda and shares == "vmm":
            self.vault = Vault(len(ChunkTable(device_bytes)))
        self.host_fd = create_memfd("host", host_bytes) if host_bytes else None
        nbytes = _shm.table_bytes(VERSIONS_MAX)
        self.residency_fd = create_memfd("residency", nbytes)
        self._map = mmap.mmap(self.residency_fd, nbytes)
        self.table = _shm.ResidencyTable(self._map, 0, VERSIONS_MAX, True)

    def close(self) -> None:
        """Let go; the memory itself goes when the last process has."""
        del self.table
        for fd in (self.device_fd, self.host_fd, self.residency_fd):
            if fd is not None:
                os.close(fd)
        if self.vault is not None:
            self.vault.close()
