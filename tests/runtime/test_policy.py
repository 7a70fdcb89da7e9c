"""Eviction order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.errors import ConfigurationError
from overcommit.runtime.policy import Lru, make_policy


def _lru(*slots: int) -> Lru:
    policy = Lru()
    for now_ns, slot in enumerate(slots):
        policy.on_add(slot, 4096, 0)
        policy.on_use(slot, 1, now_ns)
    return policy


def test_the_least_recently_used_comes_first() -> None:
    policy = _lru(3, 1, 2)
    policy.on_use(3, 2, 100)
    assert list(policy.victims([1, 2, 3], 200)) == [1, 2, 3]


def test_what_was_never_used_comes_before_everything_else() -> None:
    policy = _lru(1)
    policy.on_use(1, 1, 50)
    policy.on_add(2, 4096, 0)
    assert list(policy.victims([1, 2], 60)) == [2, 1]


def test_lower_priorities_come_first_whatever_their_age() -> None:
    policy = _lru(1, 2, 3)
    policy.on_add(1, 4096, 5)
    policy.on_add(3, 4096, -1)
    assert list(policy.victims([1, 2, 3], 9)) == [3, 2, 1]


def test_only_candidates_are_offered() -> None:
    assert list(_lru(1, 2, 3).victims([3, 1], 9)) == [1, 3]


def test_a_candidate_that_turns_out_to_be_used_comes_again_in_its_new_place() -> None:
    policy = _lru(1, 2, 3)
    seen = []
    for slot in policy.victims([1, 2, 3], 9):
        if slot == 1 and not seen:
            policy.on_use(1, 2, 50)
        seen.append(slot)
    assert seen == [1, 2, 3, 1]


def test_eviction_and_load_change_nothing_and_removal_forgets() -> None:
    policy = _lru(1, 2)
    policy.on_use(1, 2, 50)
    policy.on_evict(1)
    policy.on_load(1, 1_000)
    assert list(policy.victims([1, 2], 60)) == [2, 1]
    policy.on_remove(1)
    policy.on_add(1, 4096, 0)
    assert list(policy.victims([1, 2], 60)) == [1, 2]


def test_time_does_not_go_back_when_a_worker_with_a_younger_use_is_gone() -> None:
    policy = _lru(1, 2)
    policy.on_use(1, 9, 50)
    policy.on_use(1, 3, 10)
    assert list(policy.victims([1, 2], 60)) == [2, 1]


@given(uses=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99))))
def test_the_lazy_order_is_the_order_of_a_sort_that_knows_everything(
    uses: list[tuple[int, int]],
) -> None:
    policy = _lru(*range(10))
    latest = dict(enumerate(range(10)))
    for slot, now_ns in uses:
        latest[slot] = max(latest[slot], now_ns)
    order, told = [], set()
    for slot in policy.victims(range(10), 100):
        if slot not in told and latest[slot] != slot:
            told.add(slot)
            policy.on_use(slot, 2, latest[slot])
        else:
            order.append(slot)
    assert [latest[slot] for slot in order] == sorted(latest.values())


def test_a_policy_is_made_by_name() -> None:
    assert isinstance(make_policy("lru"), Lru)


def test_an_unknown_name_is_refused_with_the_names_that_are_known() -> None:
    with pytest.raises(ConfigurationError, match=r"'fifo'.*lru"):
        make_policy("fifo")
