"""Keys by level: which key is on the lowest level that suffices.  Used by the allocator; pure."""

from __future__ import annotations


class Ranking:
    """Keys with a level from 0 to `level_max` each; finds the lowest level that suffices.

    With 20,000 small models, sorting the slabs at each allocation took over a millisecond.
    """

    def __init__(self, level_max: int) -> None:
        self._keys: list[dict[int, None]] = [{} for _ in range(level_max + 1)]
        self._level: dict[int, int] = {}

    def set(self, key: int, level: int) -> None:
        """Give a key its level."""
        self.discard(key)
        self._level[key] = level
        self._keys[level][key] = None

    def discard(self, key: int) -> None:
        """Forget a key, if it is known."""
        if key in self._level:
            del self._keys[self._level.pop(key)][key]

    def find(self, level_min: int) -> int | None:
        """A key of the lowest level that is not below `level_min`; None when there is none."""
        for keys in self._keys[level_min:]:
            if keys:
                return next(iter(keys))
        return None

    def highest(self) -> int:
        """The highest level of a key; 0 when there is none."""
        levels = range(len(self._keys) - 1, 0, -1)
        return next((level for level in levels if self._keys[level]), 0)

    def level(self, key: int) -> int:
        """Return the level of a key that is here."""
        return self._level[key]

    def __len__(self) -> int:
        return len(self._level)
