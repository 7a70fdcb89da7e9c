"""Whom to prefetch, whom that may cost its place; the budget, the bets and the totals."""

from __future__ import annotations

from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from overcommit.runtime.prefetch import CHANCE_MIN, MARGIN, Candidate, Prefetcher
from overcommit.runtime.prefetch_books import PrefetchBooks
from overcommit.runtime.prefetch_limits import (
    PREFETCH_EXPIRY_S,
    PREFETCH_IDLE_S,
    PREFETCH_WINDOW_S,
    PREFETCH_WISHES_MAX,
)
from overcommit.runtime.views import Tier

DAY = 86_400.0
MB = 1_000_000


def daily(*slots: int, hour: int = 9, days: int = 10) -> Prefetcher:
    """A predictor that has seen these every day at this hour."""
    prefetcher = Prefetcher()
    for day in range(days):
        for minute in (2, 15, 40):
            for slot in slots:
                prefetcher.use(slot, day * DAY + hour * 3600 + minute * 60 + slot)
    return prefetcher


def candidate(slot: int, nbytes: int = MB, saves_s: float = 1.0) -> Candidate:
    return Candidate(slot, Tier.DEVICE, nbytes, saves_s)


NINE = 10 * DAY + 9 * 3600  # a Sunday


def test_who_is_due_is_wished_for_and_at_night_nobody() -> None:
    prefetcher = daily(1, 2)
    wishes = prefetcher.wishes([candidate(1), candidate(2), candidate(3)], NINE)
    assert {wish.candidate.slot for wish in wishes} == {1, 2}
    assert all(0 < wish.worth * wish.candidate.nbytes <= 1 for wish in wishes)
    assert prefetcher.wishes([candidate(1), candidate(2)], NINE - 6 * 3600) == []


def test_who_saves_more_for_its_bytes_comes_first_and_there_is_an_end() -> None:
    prefetcher = daily(*range(20))
    wishes = prefetcher.wishes([candidate(slot, MB * (slot + 1)) for slot in range(20)], NINE)
    assert [wish.candidate.slot for wish in wishes] == list(range(PREFETCH_WISHES_MAX))


def test_a_guess_is_no_wish() -> None:
    prefetcher = Prefetcher()
    for at_s in (0.0, 3600.0):
        prefetcher.use(1, at_s)
    assert prefetcher.wishes([candidate(1)], 7200.0) == []


def test_only_who_was_idle_and_is_worth_less_by_the_margin_is_displaced() -> None:
    prefetcher = daily(1, 2)
    (wish,) = prefetcher.wishes([candidate(1)], NINE)
    night = candidate(3)
    assert prefetcher.may_displace(wish, night, PREFETCH_IDLE_S, NINE)
    assert not prefetcher.may_displace(wish, night, PREFETCH_IDLE_S - 1, NINE)
    assert not prefetcher.may_displace(wish, candidate(2), 3600.0, NINE), "as good as itself"
    assert prefetcher.may_displace(wish, candidate(2, saves_s=0.9 / MARGIN), 3600.0, NINE)


@given(st.integers(0, 3), st.integers(0, 10 * 24))
def test_what_is_wished_for_has_a_chance(slot: int, hour: int) -> None:
    prefetcher = daily(0, 1, days=6)
    for wish in prefetcher.wishes([candidate(slot)], 6 * DAY + hour * 3600):
        assert prefetcher.chance(wish.candidate.slot, 6 * DAY + hour * 3600) >= CHANCE_MIN


def test_memory_is_bounded_and_the_longest_idle_model_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("overcommit.runtime.prefetch.PREFETCH_MODELS_MAX", 3)
    prefetcher = Prefetcher()
    for slot in (1, 2, 3):
        prefetcher.use(slot, float(slot))
    prefetcher.use(1, 100.0)
    prefetcher.use(4, 101.0)
    assert prefetcher.slots() == (3, 1, 4)


# --- the books ----------------------------------------------------------------------------------
def test_a_gain_is_counted_once_and_what_was_waited_for_is_none() -> None:
    books = PrefetchBooks(100.0, 0.5)
    books.start(1, Tier.DEVICE, 10, 2.0, 0.0)
    assert books.use(1, waited_s=0.5)
    assert not books.use(1)
    totals = books.totals
    assert (totals.used, totals.used_bytes, totals.saved_s) == (1, 10, 1.5)


def test_what_is_evicted_or_not_used_for_long_is_waste() -> None:
    books = PrefetchBooks(100.0, 0.5)
    books.start(1, Tier.DEVICE, 10, 1.0, 0.0)
    books.start(2, Tier.HOST, 20, 1.0, 1.0)
    books.lose(1)
    books.lose(1)
    assert books.expire(PREFETCH_EXPIRY_S + 0.5) == []
    assert books.expire(PREFETCH_EXPIRY_S + 1.5) == [2]
    totals = books.totals
    assert (totals.lost, totals.lost_bytes, totals.expired, totals.expired_bytes) == (1, 10, 1, 20)
    assert not books.use(2), "too late"


def win_on_paper(books: PrefetchBooks, times: int = 1) -> None:
    """Somebody else was wished for, and was asked for."""
    for _ in range(times):
        books.bet_on_paper(999, 1.0, [], 0.0)
        books.miss(999, 1.0)


def test_nobody_is_displaced_until_a_bet_on_paper_was_won() -> None:
    books = PrefetchBooks(1e9, 1.0)
    assert not books.may_displace
    books.bet_on_paper(1, 1.0, [(2, 1.0)], 0.0)
    assert not books.may_displace
    books.miss(1, 1.0)
    assert books.may_displace


def test_a_bet_on_paper_is_lost_when_who_would_have_left_is_used_where_it_is() -> None:
    books = PrefetchBooks(1e9, 1.0)
    win_on_paper(books)
    books.bet_on_paper(1, 1.0, [(2, 1.0)], 0.0)
    books.use(2)
    assert not books.may_displace
    assert books.totals.regretted == 0, "nobody had to wait"


def test_a_bet_on_paper_says_nothing_when_both_would_have_gone_anyway_or_time_is_up() -> None:
    books = PrefetchBooks(1e9, 1.0)
    win_on_paper(books)
    books.bet_on_paper(1, 1.0, [(2, 1.0)], 0.0)
    books.miss(2, 1.0)
    books.use(2)
    assert books.may_displace
    books.bet_on_paper(3, 1.0, [(4, 1.0)], 0.0)
    books.expire(PREFETCH_EXPIRY_S + 1)
    books.use(4)
    assert books.may_displace


def test_bets_that_are_lost_end_the_betting_and_wins_on_paper_begin_it_again() -> None:
    books = PrefetchBooks(1e9, 1.0)
    win_on_paper(books)
    for slot in range(6):
        books.start(slot, Tier.DEVICE, 10, 1.0, float(slot), displaced=[100 + slot])
        books.miss(100 + slot, 1.0)
    assert not books.may_displace
    assert books.totals.regretted == 6
    win_on_paper(books, 20)
    assert books.may_displace


def test_bets_that_are_won_go_on_and_a_miss_of_somebody_else_is_no_loss() -> None:
    books = PrefetchBooks(1e9, 1.0)
    for slot in range(50):
        books.start(slot, Tier.DEVICE, 10, 1.0, float(slot), displaced=[100 + slot])
        books.use(slot)
        books.miss(1000 + slot, 1.0)
        if slot % 4 == 1:
            books.miss(100 + slot, 1.0)
    assert books.may_displace
    assert books.totals.regretted == 13


class BooksMachine(RuleBasedStateMachine):
    """Budgets hold, totals only grow, and what is outstanding is what was begun and not ended."""

    @initialize(rate=st.sampled_from([1.0, 10.0, 100.0]), share=st.sampled_from([0.0, 0.3, 1.0]))
    def build(self, rate: float, share: float) -> None:
        self.rate, self.share = rate, share
        self.books = PrefetchBooks(rate, share)
        self.now_s = 0.0
        self.spent: list[tuple[float, int]] = []
        self.former = astuple(self.books.totals)

    @rule(
        slot=st.integers(0, 5),
        tier=st.sampled_from([Tier.HOST, Tier.DEVICE]),
        nbytes=st.integers(1, 3000),
        displaced=st.sets(st.integers(10, 15), max_size=2),
    )
    def start(self, slot: int, tier: Tier, nbytes: int, displaced: set[int]) -> None:
        if self.books.may_spend(tier, nbytes, 2000, self.now_s):
            self.books.start(slot, tier, nbytes, 1.0, self.now_s, displaced)
            self.spent.append((self.now_s, nbytes))

    @rule(step_s=st.sampled_from([0.1, 1.0, 30.0, 1000.0]))
    def wait(self, step_s: float) -> None:
        self.now_s += step_s
        self.books.expire(self.now_s)

    @rule(slot=st.integers(0, 15), what=st.sampled_from(["use", "lose", "end"]))
    def settle(self, slot: int, what: str) -> None:
        getattr(self.books, what)(slot)

    @rule(slot=st.integers(0, 15))
    def miss(self, slot: int) -> None:
        self.books.miss(slot, 1.0)

    @invariant()
    def the_budget_holds(self) -> None:
        if not hasattr(self, "spent"):
            return
        burst = self.rate * PREFETCH_WINDOW_S
        for first, (since_s, _) in enumerate(self.spent):
            bytes_since = sum(nbytes for _, nbytes in self.spent[first:])
            largest = max(nbytes for _, nbytes in self.spent[first:])
            allowed = burst + (self.now_s - since_s) * self.rate
            assert bytes_since <= max(allowed, 0) + largest + 1e-6

    @invariant()
    def the_share_of_a_tier_holds(self) -> None:
        if hasattr(self, "books"):
            for tier in (Tier.HOST, Tier.DEVICE):
                waiting = sum(
                    ahead.nbytes for ahead in self.books.outstanding.values() if ahead.tier is tier
                )
                assert waiting == self.books.waiting_bytes(tier) <= 2000 * self.share

    @invariant()
    def totals_never_shrink(self) -> None:
        if hasattr(self, "books"):
            totals = astuple(self.books.totals)
            assert all(new >= old for new, old in zip(totals, self.former, strict=True))
            self.former = totals


BooksMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_books_keep_their_promises = BooksMachine.TestCase
