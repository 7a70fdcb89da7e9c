"""Terms of a version's stay, by what its files say, where it is served, and whether it leaves."""

from __future__ import annotations

from overcommit.runtime.config import ModelConfig, Settings
from overcommit.runtime.entries import Entry, State
from overcommit.runtime.residents import Terms
from overcommit.runtime.stays import Stays

CONFIG = ModelConfig(pin=True, min_resident_s=3.0, priority=2)


def entry(slot: int, *, retired: bool = False) -> Entry:
    return Entry(slot, "m", "1", "/m", "a", CONFIG, State.READY, retired=retired)


def test_a_version_is_pinned_where_it_is_served_until_it_leaves() -> None:
    stays = Stays(Settings(), lambda slot: slot == 1)
    assert stays.of(entry(1)) == Terms(True, 2, 3_000_000_000, 0)
    assert stays.of(entry(2)) == Terms(False, 2, 3_000_000_000, 0)
    assert stays.of(entry(1, retired=True)) == Terms(False, 2, 0, 0)
    assert stays.said(CONFIG).pinned


def test_terms_that_are_the_same_are_one_object() -> None:
    stays = Stays(Settings(), lambda slot: False)
    assert stays.of(entry(1)) is stays.of(entry(2))
