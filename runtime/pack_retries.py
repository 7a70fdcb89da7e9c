"""Versions whose packing failed for a reason that may pass, and when each is packed again.

Invariants
 1. A version waits longer after each failure in a row, up to the last of PACK_RETRY_S.
 2. A version is due once for each failure that was noted.

Pure.  Called by the catalogue.
"""

from __future__ import annotations

from overcommit.runtime.pack_limits import PACK_RETRY_S

Key = tuple[str, str]  # name and version


class PackRetries:
    """See the module."""

    def __init__(self) -> None:
        self._failures: dict[Key, int] = {}  # in a row
        self._due_ns: dict[Key, int] = {}

    def put_off(self, key: Key, now_ns: int) -> float:
        """It failed: have it packed again in so many seconds, which are returned."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        wait_s = PACK_RETRY_S[min(failures, len(PACK_RETRY_S) - 1)]
        self._due_ns[key] = now_ns + int(wait_s * 1e9)
        return wait_s

    def forget(self, key: Key) -> None:
        """It was packed, or cannot be, or is gone."""
        self._failures.pop(key, None)
        self._due_ns.pop(key, None)

    def take_due(self, now_ns: int) -> list[Key]:
        """Return those whose time has come."""
        due = [key for key, due_ns in self._due_ns.items() if now_ns >= due_ns]
        for key in due:
            del self._due_ns[key]
        return due
