"""The supervisor's side of `chunk_exchange`: who gets which chunks of a CUDA arena, and when.

    a child here:  ASKS FOR n --[give: the next ones are held]--> HAS BEEN SENT --[on_taken]--> ASKS FOR n
                   ASKS FOR n, and n is all that it takes: DONE
                   any --[shrink: it is told]--> HAS BEEN SENT
                   DONE --[grow]--> ASKS FOR n, and those are being made
    all of them:   SETTLED (all DONE, one is a mover) --[grow: the mover is asked]--> GROWING
                   GROWING --[on_made, on_made by the mover's successor]--> all has been sent

Invariants
 1. A child is sent chunks in the order of their numbers, each once, one message at a time.
 2. A mover is sent what was held when it started, and no more: what comes after it makes itself.
 3. A worker that asks for what is not made yet is sent it as soon as it is.
 4. DEVICE grows only while all are settled, and by what fits into one message.  So once the chunks are
    held, each worker that was there has been sent all of them, before whatever it is sent next; and one
    that started since takes them before it is ready.

Called by `fleet`, from the supervisor's one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from overcommit.runtime.config import CONTROL_FDS_MAX
from overcommit.runtime.messages import Chunks, MakeChunks, Message
from overcommit.runtime.vault import Vault

log = logging.getLogger("overcommit")

Post = Callable[[Message, tuple[int, ...]], None]


@dataclass(slots=True)
class _Taker:
    post: Post
    limit: int  # how many it takes in all
    is_mover: bool
    has: int = 0  # as it said last
    unanswered: int = 0  # messages


class ChunkFeed:
    """Hands the vault's chunks to children, who are known by a number of the caller's choice."""

    def __init__(self, vault: Vault) -> None:
        self.vault = vault
        self._is_said = False  # that all chunks are made
        self._takers: dict[int, _Taker] = {}

    def add(self, key: int, post: Post, limit: int, *, is_mover: bool = False) -> None:
        """A child has had its Start and takes chunks up to `limit` now."""
        taker = self._takers[key] = _Taker(post, limit, is_mover)
        self._give(taker)

    def forget(self, key: int) -> None:
        """The child is dead."""
        self._takers.pop(key, None)

    def on_taken(self, key: int, count: int) -> None:
        """A child says how many it has."""
        taker = self._takers.get(key)
        if taker is None:
            return
        taker.unanswered -= 1
        if not taker.unanswered:  # else it has not heard of something yet
            taker.has = count
            self._give(taker)

    def on_made(self, first: int, fds: Sequence[int]) -> None:
        """The mover made chunks.  Raises ProtocolError for those that do not continue what is held."""
        self.vault.accept(first, fds)
        for taker in self._takers.values():
            self._give(taker)

    def say_made(self) -> None:
        """Log it when all chunks are there for the first time."""
        if self.vault.is_full and not self._is_said:
            self._is_said = True
            log.info("DEVICE is made: %d chunks of GPU memory", self.vault.count)

    def shrink(self, count: int) -> None:
        """There are only so many chunks from now on: everybody is told, and gives back the others."""
        self.vault.resize(count)
        for taker in self._takers.values():
            taker.limit = min(taker.limit, count)
            taker.has = min(taker.has, count)
            taker.unanswered += 1
            taker.post(Chunks(first=taker.has, count=count), ())

    @property
    def is_settled(self) -> bool:
        """Whether a mover is there, and everybody has all chunks that there are to be."""
        return (
            self.vault.is_full
            and any(taker.is_mover for taker in self._takers.values())
            and all(
                not taker.unanswered and taker.has >= taker.limit for taker in self._takers.values()
            )
        )

    def grow(self, count: int) -> None:
        """There are to be so many chunks: the mover makes them, or its successor does."""
        assert self.is_settled
        assert 0 < count - self.vault.count <= CONTROL_FDS_MAX
        self.vault.resize(count)
        for taker in self._takers.values():
            if taker.is_mover:
                taker.post(MakeChunks(count=count), ())
            else:
                taker.limit = count

    def _give(self, taker: _Taker) -> None:
        fds = tuple(self.vault.after(taker.has))[: max(0, taker.limit - taker.has)]
        if taker.unanswered or not fds:
            return
        taker.unanswered += 1
        names = tuple(f"chunk{taker.has + number}" for number in range(len(fds)))
        taker.post(Chunks(first=taker.has, count=self.vault.count, fds=names), fds)
