"""The ledger: who has series of its own, and that no increment is lost or counted twice."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from overcommit.runtime.front_end_messages import ModelCounters
from overcommit.runtime.ledger import FIELDS, Ledger


def more(slot: int, success: int = 1, failure: int = 0) -> ModelCounters:
    return ModelCounters(slot=slot, success=success, failure=failure, queue_ns=7 * success)


def test_a_version_that_was_never_asked_for_takes_no_room() -> None:
    ledger = Ledger(10)
    assert ledger.requests(3) == 0
    assert ledger.get(3) == (0,) * len(FIELDS)
    assert len(ledger) == 0


def test_increments_of_all_front_ends_are_summed() -> None:
    ledger = Ledger(10)
    ledger.add([more(1, 2, 3), more(2)])
    ledger.add([more(1, 5)])
    assert ledger.requests(1) == 10
    assert dict(zip(FIELDS, ledger.get(1), strict=True))["queue_ns"] == 49
    assert ledger.shown() == [1, 2]


def test_only_the_most_asked_are_shown_and_the_rest_is_one_row() -> None:
    ledger = Ledger(2)
    ledger.add([more(1, 5), more(2, 1), more(3, 2)])
    assert ledger.rest()[0] == 2
    assert ledger.shown() == [1, 3]
    ledger.add([more(2, 1), more(3, 4)])
    assert ledger.rest()[0] == 3
    assert ledger.get(3)[0] == 6


def test_with_room_for_none_everything_is_the_rest() -> None:
    ledger = Ledger(0)
    ledger.add([more(1, 5), more(2, 1)])
    assert ledger.shown() == []
    assert ledger.rest()[0] == 6


def test_a_slot_that_was_given_to_another_version_starts_at_nothing() -> None:
    ledger = Ledger(1)
    ledger.add([more(1, 5), more(2)])
    ledger.forget(1)
    ledger.add([more(1)])
    assert ledger.requests(1) == 1
    assert ledger.rest()[0] == 1  # a place was free: it is shown


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.booleans()), max_size=60))
def test_no_series_shrinks_and_every_increment_is_in_exactly_one(
    steps: list[tuple[int, int, bool]],
) -> None:
    ledger = Ledger(2)
    rises = 0  # of every series, each measured while it was shown
    total = 0
    for slot, count, scrape in steps:
        before = {s: ledger.get(s)[0] for s in ledger._shown | {slot}}
        shown, rest = set(ledger._shown), ledger.rest()[0]
        ledger.add([more(slot, count)])
        total += count
        assert ledger.rest()[0] >= rest
        rises += ledger.rest()[0] - rest
        if slot in shown or slot in ledger._shown:
            rises += ledger.get(slot)[0] - before[slot]
        if scrape:
            assert len(ledger.shown()) <= 2
    assert rises == total


def test_what_batches_usually_take_is_the_mean_over_requests_that_were_answered() -> None:
    ledger = Ledger(10)
    assert ledger.usual_ns(1) == 0
    ledger.add([more(1, 0, 3)])
    assert ledger.usual_ns(1) == 0, "what failed tells nothing"
    ledger.add([ModelCounters(slot=1, success=4, compute_ns=100)])
    assert ledger.usual_ns(1) == 25
