"""The pinned versions of residency, and when those that could not be loaded are tried again.

Invariants
 1. A version that is pinned no more, or removed, is not tried again.

Called by residency; pure.
"""

from __future__ import annotations

from overcommit.runtime.config import LOAD_BACKOFF_S
from overcommit.runtime.residents import Version


class Pins:
    """See the module."""

    def __init__(self) -> None:
        self._versions: dict[int, Version] = {}
        self._due: dict[int, int] = {}  # refused: when to try again

    def settle(self, version: Version) -> None:
        """The version's terms are known."""
        if version.pinned:
            self._versions[version.slot] = version
        else:
            self.discard(version.slot)

    def discard(self, slot: int) -> None:
        """The version is removed."""
        self._versions.pop(slot, None)
        self._due.pop(slot, None)

    def on_refused(self, version: Version, retry_after_s: float | None, now_ns: int) -> None:
        """It is tried again by itself, if it is pinned."""
        if version.pinned:
            delay_s = LOAD_BACKOFF_S[-1] if retry_after_s is None else retry_after_s
            self._due[version.slot] = now_ns + int(delay_s * 1e9)

    def take_due(self, now_ns: int) -> list[int]:
        """Return the slots to try now."""
        due = [slot for slot, at_ns in self._due.items() if now_ns >= at_ns]
        for slot in due:
            del self._due[slot]
        return due

    def times(self) -> list[int]:
        """Return when each of those that were refused is due."""
        return list(self._due.values())

    def others_on_device(self, version: Version) -> list[Version]:
        """Return those that hold memory which this version can never get."""
        return [v for v in self._versions.values() if v is not version and v.device]
