"""What is foreseen of loads: measured costs, what is left, what is ahead."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overcommit.runtime.admission import Forecast, Need, least_ns
from overcommit.runtime.config import LOADS_IN_FLIGHT_MAX

MS: Final = 1_000_000
WORKS = st.lists(st.floats(0, 1e9), max_size=12)


def learned(fixed_ns: int = MS, ns_per_byte: int = 10) -> Forecast:
    """A forecast that has seen loads from both sources, one after the other."""
    forecast = Forecast()
    now_ns = job = 0
    for source, times in (("host", 1), ("disk", 3)):
        for nbytes in (1_000_000, 1_000_000, 3_000_000, 2_000_000, 3_000_000):
            job += 1
            forecast.on_started(job, job, source, nbytes, now_ns)  # type: ignore[arg-type]
            now_ns += times * (fixed_ns + ns_per_byte * nbytes)
            forecast.on_ended(job, True, now_ns)
    return forecast


def test_nothing_is_foreseen_before_two_loads_were_seen() -> None:
    forecast = Forecast()
    for job in (1, 2):
        assert forecast.wait_ns([("disk", 8)], [], 0) is None
        forecast.on_started(job, job, "disk", 8, 200 * job)
        assert forecast.loading_ns([job], 200 * job) is None
        forecast.on_ended(job, True, 200 * job + 100)
    assert forecast.wait_ns([("disk", 8)], [], 500) == pytest.approx(100)
    assert forecast.wait_ns([("host", 8)], [], 500) is None, "the other source is still unknown"


def test_the_cost_of_a_load_is_a_line_over_its_bytes_for_each_source() -> None:
    forecast = learned()
    assert forecast.cost_ns([("host", 5_000_000)]) == pytest.approx(51 * MS)
    assert forecast.cost_ns([("disk", 5_000_000)]) == pytest.approx(153 * MS)


def test_loads_side_by_side_teach_the_same_as_one_after_the_other() -> None:
    forecast = learned()
    before = forecast.cost_ns([("host", 2_000_000)])
    # Two at once: each takes twice as long as it would alone.
    for job in range(100, 120, 2):
        forecast.on_started(job, job, "host", 2_000_000, job * 100 * MS)
        forecast.on_started(job + 1, job + 1, "host", 2_000_000, job * 100 * MS)
        forecast.on_ended(job, True, job * 100 * MS + 42 * MS)
        forecast.on_ended(job + 1, True, job * 100 * MS + 42 * MS)
    assert forecast.cost_ns([("host", 2_000_000)]) == pytest.approx(before)


def test_a_load_that_failed_teaches_nothing() -> None:
    forecast = learned()
    before = forecast.cost_ns([("disk", 7)])
    forecast.on_started(99, 99, "disk", 7, 10**12)
    forecast.on_ended(99, False, 2 * 10**12)
    assert forecast.cost_ns([("disk", 7)]) == before


def test_what_is_left_of_a_load_shrinks_with_time_and_is_never_negative() -> None:
    forecast, start_ns = learned(), 10**12
    forecast.on_started(99, 99, "host", 1_000_000, start_ns)
    lefts = [forecast.loading_ns([99], start_ns + n * 3 * MS) for n in range(6)]
    assert lefts == [pytest.approx(max(0, 11 - 3 * n) * MS) for n in range(6)]


def test_a_wish_waits_for_the_bytes_in_flight_and_for_those_queued_before_it() -> None:
    forecast, start_ns = learned(fixed_ns=0), 10**12
    for job in range(LOADS_IN_FLIGHT_MAX):
        forecast.on_started(100 + job, 100 + job, "host", 1_000_000, start_ns)
    queued: list[list[Need]] = [[("host", 1_000_000)]] * 6
    now_ns = start_ns + 20 * MS  # of the four in flight, half is left: 4 x 5 ms
    wait_ns = forecast.wait_ns([("host", 1_000_000)], queued, now_ns)
    assert wait_ns == pytest.approx((4 * 5 + 6 * 10 + 10) * MS)


def test_a_small_load_beside_a_giant_does_not_wait_for_its_end() -> None:
    forecast, start_ns = learned(fixed_ns=0), 10**12
    forecast.on_started(100, 100, "host", 1_000_000_000, start_ns)
    wait_ns = forecast.wait_ns([("host", 1_000_000)], [], start_ns)
    assert wait_ns == pytest.approx(2 * 10 * MS), "they share the channel"


def test_the_time_with_a_load_in_flight_is_counted_once() -> None:
    forecast = Forecast()
    forecast.on_started(1, 1, "disk", 8, 100)
    forecast.on_started(2, 2, "host", 8, 150)
    assert forecast.busy_ns(200) == 100
    forecast.on_ended(1, True, 200)
    forecast.on_ended(2, True, 300)
    forecast.on_ended(3, True, 900)
    assert forecast.busy_ns(1000) == 200


def test_a_version_of_many_parts_waits_for_all_of_them() -> None:
    forecast, start_ns = learned(fixed_ns=0), 10**12
    parts: list[Need] = [("host", 1_000_000), ("host", 2_000_000), ("disk", 1_000_000)]
    assert forecast.cost_ns(parts) == pytest.approx((10 + 20 + 30) * MS)
    # The two sources work at the same time.
    assert forecast.wait_ns(parts, [], start_ns) == pytest.approx(30 * MS)
    for job, (source, nbytes) in enumerate(parts, 100):
        forecast.on_started(job, 7, source, nbytes, start_ns)
    assert forecast.loading_ns((100, 101, 102), start_ns) == pytest.approx(30 * MS)
    assert forecast.loading_ns((), start_ns) is None
    # Another's load takes as much of the channel as its widest one.
    forecast.on_started(200, 8, "host", 4_000_000, start_ns)
    assert forecast.loading_ns((100, 101, 102), start_ns) == pytest.approx(50 * MS)


@given(WORKS, st.floats(0, 1e9), st.floats(0, 1e9), st.integers(1, 6), st.data())
def test_the_least_wait_grows_with_the_queue_and_with_every_size(
    works: list[float], own: float, more: float, abreast: int, data: st.DataObject
) -> None:
    wait = least_ns(works, own, abreast)
    assert wait >= own
    assert wait <= sum(works) + own + 1
    assert least_ns([*works, more], own, abreast) >= wait - 1
    assert least_ns(works, own + more, abreast) >= wait - 1
    if works:
        index = data.draw(st.integers(0, len(works) - 1))
        grown = [work + more * (n == index) for n, work in enumerate(works)]
        assert least_ns(grown, own, abreast) >= wait - 1


def simulated(works: list[float], own: float, abreast: int) -> float:
    """When the last of them ends if they share a channel, first come, first served."""
    left = [[work, number] for number, work in enumerate([*works, own])]
    now = 0.0
    while True:
        running = left[:abreast]
        step = min(work for work, _ in running)
        now += step * len(running)
        for entry in running:
            entry[0] -= step
        if any(number == len(works) and work <= 0 for work, number in running):
            return now
        left = [entry for entry in left if entry[0] > 0]


@given(
    st.lists(st.integers(1, 100), max_size=9),
    st.integers(1, 100),
    st.integers(1, 5),
)
def test_no_load_is_done_before_its_least_wait(works: list[int], own: int, abreast: int) -> None:
    took = simulated([float(work) for work in works], float(own), abreast)
    assert least_ns(works, own, abreast) <= took + 1e-6
