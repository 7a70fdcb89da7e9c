"""The supervisor's side of `chunk_exchange`: who gets which chunks of a CUDA arena, and when.

    a child here:  ASKS FOR n --[give: the next ones are held]--> HAS BEEN SENT --[on_taken]--> ASKS FOR n
                   ASKS FOR n, and n is all that it takes: DONE

Invariants
 1. A child is sent chunks in the order of their numbers, each once, one message at a time.
 2. A mover is sent what was held when it started, and no more: what comes after it makes itself.
 3. A worker that asks for what is not made yet is sent it as soon as it is.

Called by `fleet`, from the supervisor's one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from overcommit.runtime.messages import Chunks, Message
from overcommit.runtime.vault import Vault

Post = Callable[[Message, tuple[int, ...]], None]


@dataclass(slots=True)
class _Taker:
    post: Post
    limit: int  # how many it takes in all
    has: int = 0
    asks: bool = True


class ChunkFeed:
    """Hands the vault's chunks to children, who are known by a number of the caller's choice."""

    def __init__(self, vault: Vault) -> None:
        self.vault = vault
        self._takers: dict[int, _Taker] = {}

    def add(self, key: int, post: Post, limit: int) -> None:
        """A child has had its Start and takes chunks up to `limit` now."""
        taker = self._takers[key] = _Taker(post, limit)
        self._give(taker)

    def forget(self, key: int) -> None:
        """The child is dead."""
        self._takers.pop(key, None)

    def on_taken(self, key: int, count: int) -> None:
        """A child says how many it has."""
        taker = self._takers.get(key)
        if taker is None:
            return
        taker.has, taker.asks = count, True
        self._give(taker)

    def on_made(self, first: int, fds: Sequence[int]) -> None:
        """The mover made chunks.  Raises ProtocolError for those that do not continue what is held."""
        self.vault.accept(first, fds)
        for taker in self._takers.values():
            self._give(taker)

    def shrink(self, count: int) -> None:
        """There are only so many chunks from now on: everybody is told, and gives back the others."""
        self.vault.shrink(count)
        for taker in self._takers.values():
            taker.limit = min(taker.limit, count)
            taker.has = min(taker.has, count)
            taker.post(Chunks(first=taker.has, count=count), ())

    def _give(self, taker: _Taker) -> None:
        fds = tuple(self.vault.after(taker.has))[: taker.limit - taker.has]
        if not taker.asks or not fds:
            return
        taker.asks = False
        names = tuple(f"chunk{taker.has + number}" for number in range(len(fds)))
        taker.post(Chunks(first=taker.has, fds=names), fds)
