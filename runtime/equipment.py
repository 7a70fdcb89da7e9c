"""What the supervisor makes for the children in its seats: what each one owns, and a link for two of them.

Owns nothing: who asks has the descriptors from then on.

Invariants
 1. All that was asked for is there, or nothing: what cannot be made raises OSError and leaves no descriptor.
 2. A link is made for two incarnations, handed to both, and nothing of it is kept.

Called by the fleet.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from overcommit.runtime import _shm
from overcommit.runtime.bells import make_bell
from overcommit.runtime.config import VERSIONS_MAX, Settings
from overcommit.runtime.memory import create_memfd
from overcommit.runtime.messages import Kind, LinkUp

if TYPE_CHECKING:
    from overcommit.runtime.children import Child

_PAGE_BYTES: Final = _shm.STATUS_BYTES + _shm.lease_page_bytes(VERSIONS_MAX)


def make_fds(kind: Kind, settings: Settings) -> dict[str, int]:
    """Make the descriptors that an incarnation owns, under the names that Start has for them."""
    makers: dict[str, Callable[[], int]] = {}
    if kind == "worker":
        makers = {"doorbell": make_bell, "page": lambda: create_memfd("page", _PAGE_BYTES)}
    elif kind == "front_end":
        arena = settings.payload_bytes
        makers = {
            "doorbell": make_bell,
            "ingress": lambda: create_memfd("ingress", arena),
            "egress": lambda: create_memfd("egress", arena),
        }
    with contextlib.ExitStack() as undo:
        fds: dict[str, int] = {}
        for name, make in makers.items():
            fds[name] = make()
            undo.callback(os.close, fds[name])
        undo.pop_all()
        return fds


def map_page(worker: Child) -> None:
    """Look at a worker's page: its status and its leases."""
    worker.page = mmap.mmap(worker.fds["page"], _PAGE_BYTES, prot=mmap.PROT_READ)
    worker.status = _shm.StatusPage(worker.page, 0, False)
    worker.leases = _shm.LeasePage(worker.page, _shm.STATUS_BYTES, VERSIONS_MAX, False)


def link(front: Child, worker: Child, settings: Settings) -> None:
    """Make a fresh link for these two, and hand it to both."""
    slots = settings.ring_slots
    half = _shm.ring_bytes(slots)
    fd = create_memfd("link", 2 * half)
    try:
        with mmap.mmap(fd, 2 * half) as rings:
            _shm.create_ring(rings, 0, slots, 1, front.epoch, worker.epoch)
            _shm.create_ring(rings, half, slots, 2, worker.epoch, front.epoch)
        for child, peer, extra in (
            (worker, front, ("ingress", "egress")),
            (front, worker, ("page",)),
        ):
            owner = front if child is worker else worker
            message = LinkUp(
                seat=peer.seat.index,
                epoch=peer.epoch,
                site=peer.seat.site,
                slot_count=slots,
                completion_offset=half,
                payload_bytes=settings.payload_bytes,
                fds=("link", "peer_doorbell", *extra),
            )
            fds = (fd, peer.fds["doorbell"], *(owner.fds[name] for name in extra))
            child.post(message, fds)
    finally:
        os.close(fd)
