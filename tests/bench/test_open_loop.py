"""Open loops: when requests start, and that a stall cannot hide."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import numpy as np
import pytest
from faultyserver import FaultyServer, run
from msgspec.structs import replace

from overcommit.bench.alarm import Alarm
from overcommit.bench.arrivals import Arrivals, Burst, Closed, Poisson, Schedule, Trace, Uniform
from overcommit.bench.echo import EchoPlan
from overcommit.bench.errors import BenchError
from overcommit.bench.loadgen import Plan
from overcommit.bench.popularity import ByTrace, make_draws
from overcommit.bench.tally import merge

SECOND = 1_000_000_000
STALL_S = 0.3


def starts(
    plan: Arrivals, until_s: float, seed: int = 1, part: int = 0, parts: int = 1
) -> np.ndarray:
    return np.array(Schedule(plan, seed, part, parts).take(int(until_s * 1e9))) / 1e9


# --- schedules ------------------------------------------------------------------------------------
def test_poisson_gaps_are_exponential_and_the_rate_is_the_plans() -> None:
    times = starts(Poisson(rate=1000), 20)
    gaps = np.diff(times)
    # Five standard deviations; the seed is fixed anyway.
    assert abs(len(times) - 20_000) < 5 * np.sqrt(20_000)
    assert abs(gaps.std() / gaps.mean() - 1) < 0.05
    assert abs(np.mean(gaps > 0.001) - np.exp(-1)) < 0.02
    assert (gaps >= 0).all()


def test_the_same_seed_gives_the_same_starts_and_another_one_does_not() -> None:
    one, two, other = (starts(Poisson(rate=500), 5, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one, two)
    assert not np.array_equal(one[:100], other[:100])


def test_uniform_starts_interleave_between_processes() -> None:
    parts = [starts(Uniform(rate=1000), 4, part=part, parts=3) for part in range(3)]
    together = np.sort(np.concatenate(parts))
    np.testing.assert_allclose(np.diff(together), 0.001, atol=1e-8)
    assert len(together) == 4001


def test_parts_of_a_poisson_load_have_its_rate_together() -> None:
    counts = [
        len(starts(Poisson(rate=900), 10, seed=part, part=part, parts=3)) for part in (0, 1, 2)
    ]
    assert all(abs(count - 3000) < 5 * np.sqrt(3000) for count in counts)


def test_a_burst_is_on_and_off_in_turn() -> None:
    times = starts(Burst(rate=1000, on_s=0.2, off_s=0.3, off_rate=100), 50)
    phase = times % 0.5
    on, off = np.sum(phase < 0.2), np.sum(phase >= 0.2)
    assert abs(on - 20_000) < 5 * np.sqrt(20_000)
    assert abs(off - 3000) < 5 * np.sqrt(3000)
    silent = starts(Burst(rate=1000, on_s=0.2, off_s=0.3), 10) % 0.5
    assert (silent <= 0.2 + 1e-6).all()


def test_a_trace_is_replayed_from_its_first_row_and_shared_out(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("10.0,a\n10.5,b\n11.0,a\n13.0,c\n")
    assert starts(Trace(path=str(path)), 100).tolist() == [0, 0.5, 1, 3]
    assert starts(Trace(path=str(path), speed=2), 1).tolist() == [0, 0.25, 0.5]
    assert starts(Trace(path=str(path)), 100, part=1, parts=2).tolist() == [0.5, 3]
    assert Schedule(Trace(path=str(path)), 0).take(100 * SECOND)[-1] == 3 * SECOND


def test_a_trace_may_have_timestamps_and_names(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,Model\n2023-11-16 18:15:46.6805900,x\n2023-11-16 18:15:47.1805900,y\n"
        "2023-11-16 18:15:48,x\n"
    )
    times = starts(Trace(path=str(path), column="TIMESTAMP"), 100)
    np.testing.assert_allclose(times, [0, 0.5, 1.31941], atol=1e-5)
    np.testing.assert_allclose(starts(Trace(path=str(path)), 100), times)
    draws = make_draws(ByTrace(path=str(path), column="Model"), 2, 1)
    assert [draws.draw() for _ in range(6)] == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("content", ["", "a,b\nx,y\n"])
def test_a_trace_without_times_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(content)
    with pytest.raises(BenchError, match="trace"):
        starts(Trace(path=str(path)), 1)
    with pytest.raises(BenchError, match="trace"):
        starts(Trace(path=str(path), column="seconds"), 1)
    with pytest.raises(BenchError, match="cannot be read"):
        starts(Trace(path=str(tmp_path / "none")), 1)


@pytest.mark.parametrize(
    "plan", [Poisson(rate=0), Uniform(rate=-1), Closed(), Burst(rate=1, on_s=0)]
)
def test_a_schedule_that_makes_no_sense_is_refused(plan: Arrivals) -> None:
    with pytest.raises(BenchError):
        Schedule(plan, 1)


def test_an_alarm_rings_at_its_time_and_not_before() -> None:
    async def main() -> list[int]:
        rung: list[int] = []
        event = asyncio.Event()
        alarm = Alarm(
            asyncio.get_running_loop(), lambda: (rung.append(time.monotonic_ns()), event.set())
        )  # type: ignore[func-returns-value]
        for delay_ns in (2_300_000, 100_000, -5):
            due_ns = time.monotonic_ns() + delay_ns
            alarm.set(due_ns)
            await asyncio.wait_for(event.wait(), 30)
            event.clear()
            assert rung[-1] >= due_ns
        alarm.close()
        return rung

    before = len(os.listdir("/proc/self/fd"))
    assert len(asyncio.run(main())) == 3
    assert len(os.listdir("/proc/self/fd")) <= before


# --- loads ----------------------------------------------------------------------------------------
def plan_of(arrivals: Arrivals, connections: int = 4, seconds: float = 1.0) -> Plan:
    plan = Plan(workload=EchoPlan(inputs=4), port=0, connections=connections, seconds=seconds)
    return replace(plan, arrivals=arrivals)


def test_an_open_loop_sends_what_is_due() -> None:
    tally = run(FaultyServer(plan_of(Poisson(rate=300))), 10**9)
    assert tally.intended == len(starts(Poisson(rate=300), tally.seconds))
    assert tally.intended == tally.sent + tally.unsent
    assert tally.right == tally.sent == tally.accounted
    assert tally.times().count == tally.service_times().count == tally.right


def test_a_trace_that_is_over_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("".join(f"{number / 100}\n" for number in range(25)))
    tally = run(FaultyServer(plan_of(Trace(path=str(path)), seconds=30.0)), 10**9)
    assert tally.right == tally.sent == tally.intended == 25


def test_a_stall_shows_in_the_times_of_an_open_loop_and_hides_in_a_closed_one() -> None:
    """One answer of hundreds is late; those that were due meanwhile are late as well."""

    def stalled(number: int) -> float:
        return STALL_S if number == 100 else 0.0

    open_ = run(FaultyServer(plan_of(Uniform(rate=500), seconds=2.0), delay_s=stalled), 10**9)
    closed = run(FaultyServer(plan_of(Closed()), delay_s=stalled), 3000)
    # A stall of 0.3 s in 2 s is some 15 % of the requests that were due, and 4 of those in flight.
    times = open_.times()
    assert times.quantile(0.95) > STALL_S * 0.3e9
    assert times.highest >= STALL_S * 1e9
    assert sum(share <= 0.995 for _, share in closed.times().share_below()) > 0
    assert closed.times().quantile(0.99) < STALL_S * 1e9
    assert open_.service_times().quantile(0.95) < times.quantile(0.95)
    assert open_.queue_peak > 50
    assert open_.late_ns > STALL_S * 0.5e9


def test_what_the_queue_cannot_hold_is_counted() -> None:
    plan = replace(plan_of(Uniform(rate=500), seconds=1.0), queue_max=10)
    tally = run(FaultyServer(plan, delay_s=lambda n: STALL_S if n == 20 else 0.0), 10**9)
    assert tally.queue_peak == 10
    assert tally.unsent > 50
    assert tally.intended == tally.sent + tally.unsent
    assert tally.sent == tally.accounted


def test_an_idle_connection_that_is_lost_is_not_sent_to() -> None:
    hung: list[int] = []

    def hang_up(number: int, answer: bytes) -> bytes:
        if number % 20:
            return answer
        hung.append(number)
        return answer.replace(b"\r\n", b"\r\nconnection: close\r\n", 1)

    tally = run(FaultyServer(plan_of(Uniform(rate=300)), hang_up), 10**9)
    assert hung
    assert tally.sent == tally.accounted == tally.right
    # The last to hang up may have done so too late to be connected to again.
    assert len(hung) <= tally.connects <= 4 + len(hung)


def test_open_loops_of_several_processes_add_up() -> None:
    plan = plan_of(Uniform(rate=300), seconds=0.5)
    parts = [replace(plan, part=part, parts=2) for part in range(2)]
    tallies = [asyncio.run(FaultyServer(plan).drive(10**9, part)) for part in parts]
    total = merge(tallies)
    assert total.intended == sum(tally.intended for tally in tallies)
    assert total.service_times().count == total.right
    assert total.queue_peak == max(tally.queue_peak for tally in tallies)
