"""What a worker hands to a device, and what it gets back: a batch as its blocks, and the work begun on it.

    Blocks --Starter--> Work --is_done--> finish --> the bytes that each answer needs

Invariants
 1. Blocks whose addresses are there are registered with the device: it reads the ingress, and writes the
    egress, by itself.  Both stay as they are until the work is done.
 2. Work that was begun is finished exactly once, by the thread that began it.

Pure.  Called by the worker's flights, and by the engines that start batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from overcommit.runtime.signature import Form, Signature


@dataclass(slots=True, frozen=True)
class Blocks:
    """The blocks of a batch's requests, in the order of the requests."""

    signature: Signature
    forms: Sequence[Form]
    ingress: Sequence[memoryview]
    egress: Sequence[memoryview]
    # Where they begin; empty: some of it is not registered with the device.
    ingress_at: Sequence[int] = ()
    egress_at: Sequence[int] = ()


class Work(Protocol):
    """A batch that the device works on."""

    def is_done(self) -> bool:
        """Ask, without waiting.  Raises DeviceLost."""
        ...

    def finish(self) -> list[int]:
        """Wait for it; return the egress bytes of each request.  Raises ModelError, DeviceLost.

        More than a block has: nothing was written there.
        """
        ...


class Starter(Protocol):
    """A bound model that a device runs."""

    def __call__(self, blocks: Blocks) -> Work:
        """Begin a batch.  Raises ModelError, BadRequest, DeviceLost; nothing is under way then."""
        ...
