"""What keeps a version in memory, at one site: what its files and the settings say of its stay.

Invariants
 1. Versions whose terms are the same have one object.
 2. Nothing but requests keeps a version that leaves: it makes room for who comes.

Pure.  Called by the site's activations, and by administration, which shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from overcommit.runtime.config import ModelConfig, Settings
from overcommit.runtime.entries import Entry
from overcommit.runtime.residents import Terms


class Stays:
    """Terms of versions."""

    def __init__(self, settings: Settings, pins: Callable[[int], bool]) -> None:
        """`pins(slot)`: whether a version that its folder pins is pinned at this site."""
        self._settings = settings
        self._pins = pins
        self._known: dict[Terms, Terms] = {}

    def said(self, config: ModelConfig) -> Terms:
        """Return what a model's file says of its stay, and the settings where it says nothing."""
        return self._one(Terms.of(config, self._settings))

    def of(self, entry: Entry) -> Terms:
        """Return what holds for a version at this site, now."""
        terms = self.said(entry.config)
        if entry.retired:
            return self._one(replace(terms, pinned=False, min_resident_ns=0))
        if terms.pinned and not self._pins(entry.slot):
            return self._one(replace(terms, pinned=False))
        return terms

    def _one(self, terms: Terms) -> Terms:
        return self._known.setdefault(terms, terms)  # most versions have the same
