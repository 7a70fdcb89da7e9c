"""Lines of the log of which thousands may come at once: the first ones are said, the others counted.

A disk that is full, or a release of all models, is one event to who reads the log, and thousands of versions
have their part in it.

Invariants
 1. At most LINES_MAX lines, and SAME_MAX of one text, are said in each PERIOD_NS, which begins with a
    line; how many more there were is said once, when it is over.
 2. What was said last of a key is not said again, however often it comes; another text of it is.
 3. No more than KEYS_MAX keys are remembered: who comes after those may be said again.

Pure.  Called by the version log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Final

from overcommit.runtime.config import VERSIONS_MAX

LINES_MAX: Final = 20
SAME_MAX: Final = 5
PERIOD_NS: Final = 10_000_000_000
KEYS_MAX: Final = VERSIONS_MAX


class Sparing:
    """See the module."""

    def __init__(self) -> None:
        self._said: dict[Hashable, int] = {}  # the text's hash, in the order of being said
        self._ends_ns = 0
        self._lines = 0
        self._more = 0
        self._same: Counter[int] = Counter()  # lines, by the text's hash

    def admits(self, key: Hashable, text: str, now_ns: int) -> bool:
        """Whether to say this; else it is counted, or was said already."""
        digest = hash(text)
        was_said = self._said.pop(key, None) == digest
        self._said[key] = digest
        if was_said:
            return False
        if len(self._said) > KEYS_MAX:
            del self._said[next(iter(self._said))]
        self._same[digest] += 1
        return self._count(now_ns, is_one_of_many=self._same[digest] > SAME_MAX)

    def admits_new(self, now_ns: int) -> bool:
        """Whether to say what was never said before; else it is counted."""
        return self._count(now_ns, is_one_of_many=False)

    def forget(self, key: Hashable) -> None:
        """What comes next of this key is new."""
        self._said.pop(key, None)

    def take_more(self, now_ns: int) -> int:
        """Return how many were counted in a period that is over, once."""
        if not self._lines or now_ns < self._ends_ns:
            return 0
        more, self._lines, self._more = self._more, 0, 0
        self._same.clear()
        return more

    def _count(self, now_ns: int, *, is_one_of_many: bool) -> bool:
        if not self._lines and not self._more:
            self._ends_ns = now_ns + PERIOD_NS
        is_said = not is_one_of_many and self._lines < LINES_MAX
        self._lines += is_said
        self._more += not is_said
        return is_said
