"""Garbage: the young at once, the old in the end, and nothing between the times."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from overcommit.runtime.garbage import ALL_NS, BUSY_NS, IDLE_NS, RELEASED_MAX, Garbage


class Cycle:
    """Only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def garbage() -> Iterator[Garbage]:
    gc.disable()  # as in a worker's own process
    gc.collect()
    try:
        yield Garbage(0)
    finally:
        gc.enable()


def young() -> weakref.ref[Cycle]:
    """A cycle that died young."""
    return weakref.ref(Cycle())


def old() -> weakref.ref[Cycle]:
    """A cycle that was old when it died."""
    cycle = Cycle()
    gc.collect()
    reference = weakref.ref(cycle)
    del cycle
    return reference


def test_the_young_are_looked_at_between_batches(garbage: Garbage) -> None:
    ancient, fresh = old(), young()
    assert garbage.look_if_due(IDLE_NS, 0, is_idle=True)
    assert fresh() is None
    assert ancient() is not None


def test_nothing_is_looked_at_before_its_time(garbage: Garbage) -> None:
    assert garbage.look_if_due(BUSY_NS, 0, is_idle=False)
    fresh = young()
    assert not garbage.look_if_due(BUSY_NS + IDLE_NS - 1, 0, is_idle=True)
    assert not garbage.look_if_due(2 * BUSY_NS - 1, 0, is_idle=False)
    assert fresh() is not None
    assert garbage.look_if_due(BUSY_NS + IDLE_NS, 0, is_idle=True)
    assert fresh() is None


def test_everything_is_looked_at_when_many_models_were_released(garbage: Garbage) -> None:
    ancient, _fresh = old(), young()
    garbage.look_if_due(BUSY_NS, RELEASED_MAX - 1, is_idle=False)
    assert ancient() is not None
    _more = young()
    garbage.look_if_due(2 * BUSY_NS, RELEASED_MAX, is_idle=False)
    assert ancient() is None
    again, _more = old(), young()
    garbage.look_if_due(3 * BUSY_NS, RELEASED_MAX, is_idle=False)
    assert again() is not None, "those were counted"


def test_everything_is_looked_at_now_and_then_but_not_while_requests_wait(garbage: Garbage) -> None:
    ancient, _fresh = old(), young()
    garbage.look_if_due(ALL_NS, 0, is_idle=False)
    assert ancient() is not None
    _more = young()
    garbage.look_if_due(ALL_NS + IDLE_NS, 0, is_idle=True)
    assert ancient() is None
