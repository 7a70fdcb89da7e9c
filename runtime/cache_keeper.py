"""When the cache folder is looked after, and the thread that does it.

    idle --CACHE_RENEW_S are over, CACHE_FIRST_S after the start--> renewing and removing --> idle
    idle --a disk is full--> renewing, removing all that was not needed for CACHE_FULL_KEEP_S --> idle

Invariants
 1. One thread at a time, which gets a list of what is needed and shares nothing else.
 2. With `keep_days` 0 nothing is ever removed; what is needed is renewed all the same, for others.
 3. A full disk has the folder looked after at most once in CACHE_FULL_PERIOD_S.

Called by the catalogue, from the supervisor's one thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from overcommit.runtime import image_cache
from overcommit.runtime.entries import Entry
from overcommit.runtime.image_cache import Needed
from overcommit.runtime.pack_limits import (
    CACHE_CLOSE_S,
    CACHE_FIRST_S,
    CACHE_FULL_KEEP_S,
    CACHE_FULL_PERIOD_S,
    CACHE_RENEW_S,
    DAY_S,
)

log = logging.getLogger("overcommit.cache")


class CacheKeeper:
    """See the module.  `entries` says what is known now."""

    def __init__(
        self, cache_dir: str, keep_days: float, entries: Callable[[], Iterable[Entry]]
    ) -> None:
        self._cache_dir = cache_dir
        self._keep_s = keep_days * DAY_S
        self._entries = entries
        self._thread: threading.Thread | None = None
        self._due_ns: int | None = None
        self._full_ns = 0  # not before this for a full disk
        self._is_full = False

    def step(self, now_ns: int) -> None:
        """Begin if it is time to."""
        if self._due_ns is None:
            self._due_ns = now_ns + int(CACHE_FIRST_S * 1e9)
        if not self._is_full and now_ns < self._due_ns:
            return
        if self._thread is not None and self._thread.is_alive():
            return
        keep_s = min(self._keep_s, CACHE_FULL_KEEP_S) if self._is_full else self._keep_s
        self._is_full = False
        self._due_ns = now_ns + int(CACHE_RENEW_S * 1e9)
        needed = [
            Needed(entry.image_path, entry.program_key, entry.parts)
            for entry in self._entries()
            if entry.image_path
        ]
        self._thread = threading.Thread(
            target=self._look_after, args=(needed, keep_s), name="cache", daemon=True
        )
        self._thread.start()

    def make_room(self, now_ns: int) -> None:
        """An image could not be written: the disk is full."""
        if self._keep_s and now_ns >= self._full_ns:
            self._full_ns = now_ns + int(CACHE_FULL_PERIOD_S * 1e9)
            self._is_full = True

    def close(self) -> None:
        """Wait for the thread; not for long, it may remove large files, and the next one goes on."""
        if self._thread is not None:
            self._thread.join(CACHE_CLOSE_S)

    # --- in the thread --------------------------------------------------------------------------
    def _look_after(self, needed: list[Needed], keep_s: float) -> None:
        try:
            used = image_cache.renew(self._cache_dir, needed)
            if not keep_s:
                return
            removed = image_cache.prune(self._cache_dir, used, time.time(), keep_s)
        except Exception:  # the boundary of the thread: nothing is lost but room
            log.exception("the cache folder %s cannot be looked after", self._cache_dir)
            return
        if removed:
            days = f"{keep_s / DAY_S:.3g} days"
            age = days if keep_s >= DAY_S else f"{keep_s / 3600:.3g} hours"
            log.info(
                "cache folder %s: removed %s, which nothing has needed for %s",
                *(self._cache_dir, removed, age),
            )
        if removed.failed:
            log.warning("cache folder %s: %s", self._cache_dir, removed.failed)
