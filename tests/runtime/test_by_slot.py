"""Things by slot, and what fetches them ahead."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from overcommit.runtime import _shm
from overcommit.runtime.by_slot import BySlot


def test_a_slot_has_what_was_put_last_and_others_have_nothing() -> None:
    items = BySlot[str]()
    assert items.find(0) is None
    items.put(3, "a")
    items.put(3, "b")
    assert [items.find(slot) for slot in range(5)] == [None, None, None, "b", None]
    assert items.take(3) == "b"
    assert items.take(3) is items.find(3) is items.take(99) is None


class Slotted:
    __slots__ = ("number", "other", "unset")

    def __init__(self, number: int) -> None:
        self.number, self.other = number, [number]


def test_objects_of_all_kinds_are_fetched_ahead_and_stay_as_they_are() -> None:
    things: list[Any] = [None, 7, 1 << 80, "text", b"", (), {}, object(), Slotted(3), Slotted, gc]
    rows = [(0, slot) for slot in (*range(len(things)), len(things), 1 << 40)]
    before = list(map(id, things))
    _shm.prefetch(rows, 1, (things, [], things[:2]))
    _shm.prefetch(rows * 200, 1, (things,))
    _shm.prefetch([], 1, (things,))
    _shm.prefetch(rows, 1, ())
    assert list(map(id, things)) == before
    assert things[8].other == [3]


@pytest.mark.parametrize(
    ("rows", "column", "lists", "error"),
    [
        ([(1,)], 1, ([],), TypeError),
        ([(1,)], -1, ([],), TypeError),
        ([1], 0, ([],), TypeError),
        ([("1",)], 0, ([],), TypeError),
        ([(-1,)], 0, ([],), ValueError),
        ([(1 << 70,)], 0, ([],), OverflowError),
        ([(0,)], 0, ({},), TypeError),
        ((), 0, ([],), TypeError),
        ([], 0, [], TypeError),
    ],
)
def test_what_is_no_row_or_list_is_refused(
    rows: Any, column: int, lists: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        _shm.prefetch(rows, column, lists)
