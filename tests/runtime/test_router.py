"""Routing: the same worker for the same version, until its queue there is long."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.router import Router, short_queue


@pytest.fixture
def router() -> Router:
    router = Router()
    for worker in (10, 11, 12, 13):
        router.add(worker)
    return router


def home(router: Router, slot: int) -> int:
    worker = router.choose(slot, 1_000_000)
    assert worker is not None
    return worker


def test_there_is_no_worker_when_none_is_linked() -> None:
    assert Router().choose(1, 4) is None


def test_a_version_keeps_its_worker_while_its_queue_there_is_short(router: Router) -> None:
    first = home(router, 7)
    for _ in range(4):
        assert router.choose(7, 4) == first
        router.on_submit(first, 7)
    assert router.choose(7, 4) != first


def test_what_does_not_fit_at_home_goes_to_the_least_loaded(router: Router) -> None:
    first = home(router, 7)
    others = [worker for worker in router.workers if worker != first]
    for _ in range(9):
        router.on_submit(first, 7)
    router.on_submit(others[0], 1)
    router.on_submit(others[2], 2)
    assert router.choose(7, 4) == others[1]


def test_the_home_wins_a_tie_when_every_queue_is_long(router: Router) -> None:
    first = home(router, 7)
    for worker in router.workers:
        for _ in range(5):
            router.on_submit(worker, 7)
    assert router.choose(7, 4) == first


def test_a_version_comes_home_when_its_queue_has_become_short(router: Router) -> None:
    first = home(router, 7)
    for _ in range(4):
        router.on_submit(first, 7)
    assert router.choose(7, 4) != first
    router.on_done(first, 7)
    assert router.choose(7, 4) == first


def test_a_worker_to_avoid_is_not_picked(router: Router) -> None:
    first = home(router, 7)
    second = router.choose(7, 4, avoid=(first,))
    assert second not in (None, first)
    assert router.choose(7, 4, avoid=router.workers) is None


def test_only_the_versions_of_a_worker_that_goes_get_a_new_home(router: Router) -> None:
    before = {slot: home(router, slot) for slot in range(500)}
    router.remove(12)
    for slot, worker in before.items():
        assert (home(router, slot) == worker) == (worker != 12)


def test_versions_spread_over_the_workers(router: Router) -> None:
    shares = Counter(home(router, slot) for slot in range(4000))
    assert all(800 < share < 1200 for share in shares.values())


def test_what_was_outstanding_at_a_removed_worker_is_forgotten(router: Router) -> None:
    router.on_submit(11, 5)
    router.remove(11)
    router.on_done(11, 5)
    assert router.outstanding(11) == 0
    router.add(11)
    assert router.outstanding(11, 5) == 0


def test_who_is_alone_gets_everything_until_another_comes_or_another_site_does() -> None:
    router = Router()
    assert router.only is None
    router.add(3)
    assert router.only == 3 == router.choose(9, 2)
    router.add(4)
    assert router.only is None
    router.remove(3)
    assert router.only == 4
    router.spread({9: (1,)})
    assert router.only is None, "slot 9 waits for a worker of its site"
    assert router.choose(9, 2) is None


def test_a_short_queue_is_two_batches_and_two_requests_where_nothing_batches() -> None:
    assert short_queue(32) == 64
    assert short_queue(0) == 2


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=200))
def test_counts_are_the_submits_less_the_dones(steps: list[tuple[int, bool]]) -> None:
    router = Router()
    for worker in range(3):
        router.add(worker)
    model: Counter[tuple[int, int]] = Counter()
    for slot, is_submit in steps:
        chosen = router.choose(slot, 2)
        assert chosen is not None
        if is_submit:
            router.on_submit(chosen, slot)
            model[chosen, slot] += 1
        elif busy := next((key for key in model if model[key]), None):
            router.on_done(*busy)
            model[busy] -= 1
        for one in range(3):
            assert router.outstanding(one) == sum(n for (w, _), n in model.items() if w == one)
            assert router.outstanding(one, slot) == model[one, slot]


# --- several devices ----------------------------------------------------------------------------
def spread(sites: dict[int, int], homes: dict[int, tuple[int, ...]]) -> Router:
    """A router with workers on sites, and versions that are served there."""
    router = Router()
    for worker, site in sites.items():
        router.add(worker, site)
    router.spread(homes)
    return router


def test_a_version_stays_with_the_workers_of_its_site_however_long_the_queue() -> None:
    router = spread({10: 0, 11: 0, 20: 1, 21: 1}, {slot: (slot % 2,) for slot in range(50)})
    for slot in range(50):
        seen = set()
        for _ in range(20):
            worker = router.choose(slot, 2)
            assert worker is not None
            router.on_submit(worker, slot)
            seen.add(worker)
        assert seen == ({10, 11} if slot % 2 == 0 else {20, 21})


def test_a_second_site_gets_what_the_first_has_no_time_for() -> None:
    router = spread({10: 0, 20: 1}, {7: (1, 0)})
    assert home(router, 7) == 20
    for _ in range(2):
        router.on_submit(20, 7)
    assert router.choose(7, 2) == 10
    router.spread({7: (1,)})
    assert router.choose(7, 2) == 20, "the copy is gone, the queue is as long as it is"


def test_where_its_sites_have_no_worker_a_version_has_none() -> None:
    router = spread({10: 0}, {7: (1,), 8: (1, 0)})
    assert router.choose(7, 2) is None
    assert router.choose(8, 2) == 10, "at the next one, as long as the first has none"
    router.add(20, 1)
    assert router.choose(7, 2) == 20
    assert router.choose(8, 2) == 20
    router.spread({7: (0,)})
    assert router.choose(7, 2) == 10


def test_a_versions_home_site_is_the_first_it_was_told() -> None:
    router = spread({10: 0, 20: 1}, {7: (1, 0)})
    assert (router.home_site(7), router.home_site(8)) == (1, 0)


# --- occupied workers ---------------------------------------------------------------------------
def test_an_occupied_worker_gets_nothing_but_what_is_for_the_version_it_is_in(
    router: Router,
) -> None:
    before = {slot: home(router, slot) for slot in range(500)}
    slot = next(slot for slot, worker in before.items() if worker == 12)
    router.occupy({12: slot})
    for each, worker in before.items():
        assert (home(router, each) == worker) == (worker != 12 or each == slot)
    router.occupy({})
    assert {each: home(router, each) for each in range(500)} == before


def test_the_version_of_a_long_batch_spills_to_nobody(router: Router) -> None:
    """It may hang: with every request that spilled, one more worker would."""
    first = home(router, 7)
    other = next(worker for worker in router.workers if worker != first)
    router.occupy({other: 7})
    for _ in range(5):
        assert router.choose(7, 1) == other
        router.on_submit(other, 7)
    assert router.choose(7, 1, avoid=(other,)) is None
    router.occupy({other: 7, first: 7})
    assert set(router.among(7)) == {first, other}


def test_where_all_are_occupied_it_is_as_if_none_was(router: Router) -> None:
    before = {slot: home(router, slot) for slot in range(50)}
    router.occupy(dict.fromkeys(router.workers, 99))
    assert {slot: home(router, slot) for slot in range(50)} == before


def test_one_that_is_in_no_batch_is_avoided_for_all_versions(router: Router) -> None:
    router.occupy({10: None})
    assert 10 not in {home(router, slot) for slot in range(500)}
    router.remove(10)
    router.add(10 | 1 << 30)
    assert 10 | 1 << 30 in {home(router, slot) for slot in range(500)}


def test_versions_stay_at_their_sites_while_those_are_occupied() -> None:
    router = Router()
    router.add(10, site=0)
    router.add(20, site=1)
    router.spread({1: (0,), 2: (0, 1)})
    router.occupy({10: 9})
    assert home(router, 1) == 10, "nobody else of its site is there"
    assert home(router, 2) == 20


def test_the_only_worker_stays_the_one_for_everything() -> None:
    router = Router()
    router.add(10)
    router.occupy({10: 3})
    assert router.only == router.choose(5, 1) == 10
