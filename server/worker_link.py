"""A front end's side of the link with one worker incarnation.

Called by the dispatch.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

from overcommit.runtime import _shm
from overcommit.runtime.messages import LinkUp


def link_key(seat: int, epoch: int) -> int:
    """Name a worker incarnation."""
    return seat << 16 | epoch


def incarnation_of(key: int) -> tuple[int, int]:
    """Return the seat and the epoch of who has this name."""
    return key >> 16, key & 0xFFFF


@dataclass(slots=True, frozen=True)
class RunningBatch:
    """What a worker's page says of the batch that it is in; a fact when it is dead."""

    ids: frozenset[int]
    is_cut: bool  # the page cannot list all that it may hold

    def may_have(self, request_id: int) -> bool:
        """Whether this request may be in it."""
        return self.is_cut or request_id in self.ids


@dataclass(slots=True, eq=False)
class WorkerLink:
    """The rings, and how many requests are lent there.  Owns the worker's doorbell."""

    key: int
    submissions: _shm.SubmissionRing
    completions: _shm.CompletionRing
    bell: int
    status: _shm.StatusPage
    lent_max: int
    crowded: int  # from here on a version may have too many there
    lent: int = 0
    is_broken: bool = False  # it lied once; nothing goes there any more

    @classmethod
    def take(cls, message: LinkUp, fds: dict[str, int], epoch: int) -> WorkerLink:
        """Map what the message brings; takes over its descriptors.  `epoch` is our own."""
        half = message.completion_offset
        memory = mmap.mmap(fds["link"], 2 * half)
        page = mmap.mmap(fds["page"], _shm.STATUS_BYTES, prot=mmap.PROT_READ)
        os.close(fds["link"])
        os.close(fds["page"])
        return cls(
            key=link_key(message.seat, message.epoch),
            submissions=_shm.SubmissionRing(memory, 0, True, epoch, message.epoch),
            completions=_shm.CompletionRing(memory, half, False, message.epoch, epoch),
            bell=fds["peer_doorbell"],
            status=_shm.StatusPage(page, 0, False),
            # Half: cancels need places too, and every answer needs one on the way back.
            lent_max=message.slot_count // 2,
            crowded=message.slot_count // 4,  # up to here none has more than there are places free
        )

    def batch(self) -> RunningBatch:
        """Read the worker's page."""
        _, started_ns, _, _, ids = self.status.read()
        is_cut = bool(started_ns) and len(ids) >= _shm.STATUS_BATCH_MAX
        return RunningBatch(frozenset(ids if started_ns else ()), is_cut)

    def cancel(self, request_id: int, slot: int) -> None:
        """Tell the worker that nobody waits for this request, if there is room to say so.

        Else its answer is computed for nobody.
        """
        self.submissions.push(request_id, 0, 0, 0, 0, 0, _shm.CANCEL, slot, 0)
