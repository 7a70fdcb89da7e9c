"""The histogram against exact quantiles."""

from __future__ import annotations

import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from overcommit.bench.histogram import (
    SUB_BUCKETS,
    VALUE_MAX,
    Histogram,
    bucket_of,
    highest_of,
)

TIMES = st.lists(st.integers(0, VALUE_MAX), min_size=1, max_size=200)


def exact_quantile(values: list[int], share: float) -> int:
    rank = math.ceil(Fraction(str(share)) * len(values))
    return sorted(values)[max(1, rank) - 1]


def filled(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


@given(st.integers(0, VALUE_MAX))
def test_a_bucket_holds_its_value_and_is_narrow(value: int) -> None:
    bucket = bucket_of(value)
    assert value <= highest_of(bucket) <= value + value / SUB_BUCKETS
    assert bucket == 0 or highest_of(bucket - 1) < value


@given(TIMES, st.sampled_from([0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0]))
def test_a_quantile_is_never_below_the_exact_one_and_at_most_one_bucket_above(
    values: list[int], share: float
) -> None:
    exact = exact_quantile(values, share)
    assert exact <= filled(values).quantile(share) <= exact + exact / SUB_BUCKETS


@given(TIMES, TIMES)
def test_merging_is_the_same_as_recording_everything(first: list[int], second: list[int]) -> None:
    merged = filled(first)
    merged.merge(filled(second))
    assert merged.to_wire() == filled(first + second).to_wire()


@given(TIMES)
def test_the_wire_keeps_everything(values: list[int]) -> None:
    histogram = filled(values)
    again = Histogram.from_wire(histogram.to_wire())
    assert again.to_wire() == histogram.to_wire()
    assert (again.count, again.mean) == (len(values), sum(values) / len(values))
    assert (again.lowest, again.highest) == (min(values), max(values))


def test_a_share_that_was_made_by_dividing_is_taken_as_it_was_meant() -> None:
    assert 7 / 25 * 25 > 7
    assert filled(list(range(25))).quantile(7 / 25) == 6


def test_an_empty_histogram_says_zero() -> None:
    assert Histogram().quantile(0.5) == 0
    assert Histogram().mean == 0.0


def test_times_out_of_range_are_counted_at_its_ends() -> None:
    histogram = filled([-5, VALUE_MAX + 1])
    assert (histogram.lowest, histogram.highest, histogram.count) == (0, VALUE_MAX, 2)


@given(TIMES)
def test_recording_many_at_once_is_recording_each(values: list[int]) -> None:
    one, many = filled(values), Histogram()
    many.record_many(values[:3])
    many.record_many(values[3:])
    assert many.to_wire() == one.to_wire()
    assert many.count == one.count


@given(TIMES)
def test_the_distribution_ends_at_one_and_agrees_with_quantiles(values: list[int]) -> None:
    histogram = filled(values)
    shares = histogram.share_below()
    assert shares[-1] == (histogram.highest, 1.0)
    assert all(histogram.quantile(share) <= time for time, share in shares)
