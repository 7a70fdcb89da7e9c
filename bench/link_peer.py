"""The far side of the link that `micro` measures: takes submissions, pushes completions.

    python -m overcommit.bench.link_peer LINK MY_BELL PEER_BELL LIFE

The arguments are inherited descriptors; ends when LIFE is closed.  With LINK -1 it only answers a
doorbell with a doorbell: what waking another process and being woken costs, the limit of the former.
"""

from __future__ import annotations

import mmap
import os
import sys
from typing import Final

from overcommit.runtime import _shm

RING_SLOTS: Final = 64
NEAR_EPOCH: Final = 7
FAR_EPOCH: Final = 9
NO_LINK: Final = -1


def answer_rings(link: int, mine: int, peer: int, life: int) -> None:
    """Complete every submission."""
    half = _shm.ring_bytes(RING_SLOTS)
    memory = mmap.mmap(link, 2 * half)
    take = _shm.SubmissionRing(memory, 0, False, NEAR_EPOCH, FAR_EPOCH)
    give = _shm.CompletionRing(memory, half, True, FAR_EPOCH, NEAR_EPOCH)
    while True:
        for item in take.pop(RING_SLOTS):
            give.push(item[0], 0, 0, 0, 0, _shm.OK, 1, 0)
            if give.must_wake():
                os.eventfd_write(peer, 1)
        if _shm.arm([take]):
            if _shm.wait(mine, life, -1) & _shm.CONTROL:
                return
            _shm.disarm([take])


def answer_bells(mine: int, peer: int, life: int) -> None:
    """Ring back."""
    while not _shm.wait(mine, life, -1) & _shm.CONTROL:
        os.eventfd_write(peer, 1)


def main() -> None:
    """Be the far side."""
    link, mine, peer, life = map(int, sys.argv[1:])
    if link == NO_LINK:
        answer_bells(mine, peer, life)
    else:
        answer_rings(link, mine, peer, life)


if __name__ == "__main__":
    main()
