"""Eviction order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.errors import ConfigurationError
from overcommit.runtime.policy import Lru, Order, make_policy


def _lru(*slots: int) -> tuple[Lru, Order]:
    """These were used in this order, once each."""
    policy = Lru()
    order = Order(policy)
    for now_ns, slot in enumerate(slots):
        policy.on_add(slot, 4096, 0)
        policy.on_use(slot, 1, now_ns)
        order.add(slot)
    return policy, order


def test_the_least_recently_used_comes_first() -> None:
    policy, order = _lru(3, 1, 2)
    policy.on_use(3, 2, 100)
    assert list(order.victims()) == [1, 2, 3]


def test_what_was_never_used_comes_before_everything_else() -> None:
    policy, order = _lru(1)
    policy.on_use(1, 1, 50)
    policy.on_add(2, 4096, 0)
    order.add(2)
    assert list(order.victims()) == [2, 1]


def test_lower_priorities_come_first_whatever_their_age() -> None:
    policy, order = _lru(1, 2, 3)
    policy.on_add(1, 4096, 5)
    policy.on_add(3, 4096, -1)
    order.add(3)  # its rank has shrunk
    assert list(order.victims()) == [3, 2, 1]


def test_eviction_and_load_change_nothing_and_removal_forgets() -> None:
    policy, order = _lru(1, 2)
    policy.on_use(1, 2, 50)
    policy.on_evict(1, 0)
    policy.on_load(1, 1_000, "disk")
    assert list(order.victims()) == [2, 1]
    order.discard(1)
    policy.on_remove(1)
    assert list(order.victims()) == [2]
    policy.on_add(1, 4096, 0)
    order.add(1)
    assert list(order.victims()) == [1, 2]


def test_time_does_not_go_back_when_a_worker_with_a_younger_use_is_gone() -> None:
    policy, order = _lru(1, 2)
    policy.on_use(1, 9, 50)
    policy.on_use(1, 3, 10)
    assert list(order.victims()) == [2, 1]


def test_a_slot_that_turns_out_to_be_used_comes_again_in_its_new_place() -> None:
    policy, order = _lru(1, 2, 3)
    seen: list[int] = []
    for slot in order.victims():
        if slot == 1 and not seen:
            policy.on_use(1, 2, 50)
        seen.append(slot)
    assert seen == [1, 2, 3, 1]


def test_what_was_offered_and_kept_is_offered_again_the_next_time() -> None:
    _, order = _lru(1, 2, 3)
    for taken in range(4):
        slots = order.victims()
        assert [next(slots) for _ in range(taken)] == [1, 2, 3][:taken]
        slots.close()
    assert list(order.victims()) == [1, 2, 3]


def test_a_slot_that_is_discarded_while_it_is_offered_stays_away() -> None:
    _, order = _lru(1, 2, 3)
    for slot in order.victims():
        order.discard(slot)
        if slot == 2:
            break
    assert list(order.victims()) == [3]
    assert len(order) == 1


def test_a_slot_that_left_and_came_back_is_offered_once() -> None:
    _, order = _lru(1, 2)
    for _ in range(3):
        order.discard(1)
        order.add(1)
    assert list(order.victims()) == [1, 2]


def test_slots_that_come_and_go_leave_no_heap_behind() -> None:
    _, order = _lru(1)
    for _ in range(1_000):
        order.discard(1)
        order.add(1)
    assert len(order._heap) < 100


@given(
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99), st.booleans())),
    gone=st.sets(st.integers(0, 9)),
)
def test_the_lazy_order_is_the_order_of_a_sort_that_knows_everything(
    steps: list[tuple[int, int, bool]], gone: set[int]
) -> None:
    policy, order = _lru(*range(10))
    latest = dict(enumerate(range(10)))
    for slot, now_ns, is_told in steps:
        latest[slot] = max(latest[slot], now_ns)
        if is_told:
            policy.on_use(slot, 2, latest[slot])
    for slot in gone:
        order.discard(slot)
        del latest[slot]
    offered, told = [], set()
    for slot in order.victims():
        if slot not in told:
            told.add(slot)
            policy.on_use(slot, 3, latest[slot])
        else:
            offered.append(slot)
    assert [latest[slot] for slot in offered] == sorted(latest.values())


def test_a_policy_is_made_by_name() -> None:
    assert isinstance(make_policy("lru"), Lru)


def test_an_unknown_name_is_refused_with_the_names_that_are_known() -> None:
    with pytest.raises(ConfigurationError, match=r"'fifo'.*lru"):
        make_policy("fifo")
