"""Eviction by value: what each policy prefers, and what all of them owe to `Order`."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.config import HALF_LIFE_S
from overcommit.runtime.greedy_dual import (
    CLOCKS_KEPT,
    CostAware,
    Gdsf,
    GreedyDual,
    LfuDa,
    LoadCost,
)
from overcommit.runtime.policy import POLICIES, Order, Policy, make_policy

MB, GB = 10**6, 10**9
SECOND = 10**9


def used(policy: Policy, counts: dict[int, int], nbytes: dict[int, int] | None = None) -> Order:
    """Versions that were loaded and used so often, one after the other."""
    order = Order(policy)
    for number, (slot, uses) in enumerate(counts.items()):
        policy.on_add(slot, (nbytes or {}).get(slot, GB), 0)
        policy.on_load(slot, SECOND, "disk")
        policy.on_use(slot, uses, (number + 1) * SECOND)
        order.add(slot)
    return order


# --- what they prefer ---------------------------------------------------------------------------
@pytest.mark.parametrize("make", [LfuDa, Gdsf, CostAware])
def test_of_equal_size_the_least_used_leaves_first(make: type[GreedyDual]) -> None:
    order = used(make(), {1: 50, 2: 3, 3: 7})
    assert list(order.victims()) == [2, 3, 1]


def test_gdsf_lets_large_ones_go_and_lfu_da_does_not_look_at_size() -> None:
    counts, sizes = {1: 10, 2: 6}, {1: 8 * GB, 2: GB}
    assert next(used(Gdsf(), counts, sizes).victims()) == 1
    assert next(used(LfuDa(), counts, sizes).victims()) == 2


def test_cost_aware_keeps_a_large_one_whose_load_costs_its_bytes() -> None:
    # A load that is nothing but bytes: cost / size is the same for both, so use decides.
    policy = CostAware()
    for slot, nbytes in ((1, 8 * GB), (2, GB)):
        policy.on_add(slot, nbytes, 0)
    for _ in range(3000):
        policy.on_load(1, 8 * SECOND, "disk")
        policy.on_load(2, SECOND, "disk")
    order = used(policy, {1: 10, 2: 6}, {1: 8 * GB, 2: GB})
    assert next(order.victims()) == 2


def test_what_is_not_used_again_is_overtaken_however_often_it_was_used() -> None:
    policy = LfuDa()
    order = used(policy, {1: 100})
    for slot in range(2, 400):
        policy.on_add(slot, GB, 0)
        policy.on_load(slot, SECOND, "disk")
        policy.on_use(slot, 1, slot * SECOND)
        order.add(slot)
        victim = next(iter([*order.victims()]))
        policy.on_evict(victim, slot * SECOND)
        order.discard(victim)
        if victim == 1:
            break
    assert victim == 1
    assert 50 < slot < 150, "the clock has to come as far as its uses"


def test_frequency_survives_eviction_and_fades_with_its_half_life() -> None:
    policy = CostAware()
    used(policy, {1: 64, 2: 1})
    policy.on_evict(1, 0)
    later = 2 * SECOND + int(3 * HALF_LIFE_S * 1e9)
    policy.on_use(1, 64, later)
    assert policy._known[1].frequency == pytest.approx(64 / 8, rel=0.01)
    policy.on_remove(1)
    policy.on_add(1, GB, 0)
    assert policy._known[1].frequency == 0.0


def test_the_request_that_asked_for_a_load_counts_once() -> None:
    policy = LfuDa()
    policy.on_add(1, GB, 0)
    policy.on_load(1, SECOND, "disk")
    policy.on_use(1, 0, SECOND)
    assert policy._known[1].frequency == 1
    policy.on_use(1, 1, 2 * SECOND)
    assert policy._known[1].frequency == 1
    policy.on_use(1, 5, 3 * SECOND)
    assert policy._known[1].frequency == 5


def test_the_cost_is_the_line_through_what_was_measured() -> None:
    cost = LoadCost(0.03, 5e9)
    for _ in range(4000):
        cost.add(GB, 0.2)
        cost.add(3 * GB, 0.4)
    assert cost.of(0) == pytest.approx(0.1, rel=0.05)
    assert cost.of(2 * GB) == pytest.approx(0.3, rel=0.05)


def test_loads_of_one_size_give_one_cost() -> None:
    cost = LoadCost(0.03, 5e9)
    for number in range(20_000):
        cost.add(8 * MB, 0.001 * (1 + number % 3))
    assert cost.of(8 * MB) == pytest.approx(0.002, rel=0.1)
    assert math.isfinite(cost.of(100 * GB))


def test_a_use_counts_by_the_clock_of_its_own_time_not_of_the_hearing() -> None:
    policy = LfuDa()
    used(policy, {1: 1, 2: 9, 3: 1})
    policy.on_evict(2, 100 * SECOND)
    policy.on_use(3, 2, 50 * SECOND)  # before the eviction, heard of after it
    policy.on_use(1, 2, 150 * SECOND)
    assert policy.rank(3)[1] == 2
    assert policy.rank(1)[1] == 9 + 2


def test_clocks_are_kept_up_to_a_limit_and_older_uses_count_by_the_oldest() -> None:
    policy = LfuDa()
    used(policy, {1: 1})
    for number in range(3 * CLOCKS_KEPT):
        policy.on_add(2, GB, 0)
        policy.on_use(2, number + 1, number * SECOND)
        policy.on_evict(2, number * SECOND)
        policy.on_remove(2)
    assert len(policy._clocks) <= 2 * CLOCKS_KEPT
    assert policy._clocks == sorted(policy._clocks)
    policy.on_use(1, 2, SECOND)
    assert policy.rank(1)[1] >= 2


def test_what_has_a_copy_in_host_costs_a_copy_and_without_it_the_disk() -> None:
    policy = CostAware()
    for _ in range(100):
        for slot in (1, 2):
            policy.on_add(slot, GB, 0)
        policy.on_load(1, 5 * SECOND, "disk")
        policy.on_load(2, SECOND // 10, "host")
    policy.on_copy(1, True)
    policy.on_copy(2, True)
    order = used(policy, {1: 2, 2: 3})
    assert list(order.victims()) == [1, 2]
    policy.on_copy(1, False)
    assert list(order.victims()) == [2, 1], "2 is used more, but 1 would have to be read"


def test_a_shorter_half_life_forgets_sooner() -> None:
    short, long = make_policy("cost_aware", 3600.0), make_policy("cost_aware", 86_400.0)
    for policy in (short, long):
        order = used(policy, {1: 100, 2: 1})
        policy.on_evict(1, 3 * SECOND)
        policy.on_use(2, 6, 12 * 3600 * SECOND)
        policy.on_use(1, 101, 12 * 3600 * SECOND)
        assert next(order.victims()) == (1 if policy is short else 2)


# --- what they owe ------------------------------------------------------------------------------
CALLS = st.lists(
    st.tuples(
        st.sampled_from(["add", "use", "load", "evict", "remove"]),
        st.integers(0, 5),
        st.integers(0, 40),
    ),
    max_size=80,
)


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(calls=CALLS)
def test_a_rank_changes_only_by_its_own_calls_and_only_grows(
    name: str, calls: list[tuple[str, int, int]]
) -> None:
    policy = make_policy(name)
    known: set[int] = set()
    for now, (call, slot, number) in enumerate(calls):
        if call != "add" and slot not in known:
            continue
        before = {each: policy.rank(each) for each in known}
        if call == "add":
            policy.on_add(slot, 4096 * (number + 1), 0)
            known.add(slot)
        elif call == "use":
            policy.on_use(slot, number, now * SECOND)
        elif call == "load":
            policy.on_load(slot, number * 1_000_000, "disk")
        elif call == "evict":
            policy.on_evict(slot, now * SECOND)
        else:
            policy.on_remove(slot)
            known.discard(slot)
        for each, rank in before.items():
            if each != slot:
                assert policy.rank(each) == rank
            elif each in known:
                assert policy.rank(each)[:2] >= rank[:2]
        assert all(math.isfinite(part) for each in known for part in policy.rank(each))
    memory = getattr(policy, "_known")  # noqa: B009
    assert set(memory) == known, "what was removed is forgotten"
