"""The trace, the simulated cache and the bounds beside it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from overcommit.bench import catalogue_trace
from overcommit.bench.__main__ import app
from overcommit.bench.bounds import belady, next_uses, pfoo_l
from overcommit.bench.catalogue_trace import Request, make_trace
from overcommit.bench.simulate import Cache, cost_s, simulate
from overcommit.runtime.policy import POLICIES, Lru, make_policy

SMALL = st.lists(st.integers(0, 4), min_size=1, max_size=12)
SIZES = (1, 2, 3, 4, 5)


def trace_of(*models: int) -> list[Request]:
    return [Request(float(position), model) for position, model in enumerate(models)]


def best_s(trace: list[Request], capacity: int) -> float:
    """The least load time that any choice of what to keep can have."""
    states: dict[frozenset[int], float] = {frozenset(): 0.0}
    for request in trace:
        after: dict[frozenset[int], float] = {}
        for held, spent in states.items():
            paid = spent + (0.0 if request.model in held else cost_s(SIZES[request.model]))
            there = held | {request.model}
            for count in range(len(there) + 1):
                for kept in itertools.combinations(sorted(there), count):
                    if sum(SIZES[model] for model in kept) <= capacity:
                        state = frozenset(kept)
                        after[state] = min(after.get(state, paid), paid)
        states = after
    return min(states.values())


def test_the_trace_is_like_the_one_that_was_measured_and_seeded() -> None:
    trace = make_trace(1)
    for room, wanted in catalogue_trace.TABLE.items():
        assert catalogue_trace.lru_misses(trace, room) == pytest.approx(wanted, abs=0.03)
    for count, wanted in catalogue_trace.TOPS.items():
        assert catalogue_trace.top_share(trace, count) == pytest.approx(wanted, abs=0.03)
    assert trace == make_trace(1)
    assert trace != make_trace(2)


def test_the_simulated_lru_is_an_lru() -> None:
    trace = make_trace(3, 3000)
    for room in (1, 4, 16):
        outcome = simulate("lru", trace, [1] * catalogue_trace.MODELS, room)
        assert outcome.misses / len(trace) == catalogue_trace.lru_misses(trace, room)


def test_one_large_victim_spares_the_small_ones_before_it() -> None:
    # 0 and 1 are older than 3, but 3 alone is needed for 4: they must still be there.
    trace = trace_of(0, 1, 3, 4, 0, 1)
    assert simulate("lru", trace, SIZES, 8).misses == 4


def test_next_uses_are_positions() -> None:
    assert next_uses(trace_of(1, 2, 1, 1)) == [2, 4, 3, 4]


@given(models=SMALL, capacity=st.integers(5, 9))
def test_nothing_beats_the_best_and_the_bound_is_below_it(models: list[int], capacity: int) -> None:
    trace = trace_of(*models)
    best = best_s(trace, capacity)
    assert pfoo_l(trace, SIZES, capacity) <= best + 1e-9
    assert belady(trace, SIZES, capacity).load_s >= best - 1e-9
    for name in POLICIES:
        assert simulate(name, trace, SIZES, capacity).load_s >= best - 1e-9


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_cache_for_all_misses_each_model_once(name: str) -> None:
    trace = make_trace(1, 2000)
    outcome = simulate(name, trace, [1] * catalogue_trace.MODELS, catalogue_trace.MODELS)
    assert outcome.misses == len({request.model for request in trace})


# --- prefetching --------------------------------------------------------------------------------
class Timetable:
    """Brings these models in at these times."""

    def __init__(self, wishes: list[tuple[float, int]]) -> None:
        self.left = sorted(wishes)
        self.seen: list[tuple[int, float, bool]] = []
        self.spared: set[int] = set()
        self.loaded: list[tuple[int, list[int]]] = []

    def on_request(self, model: int, time_s: float, was_held: bool) -> None:
        self.seen.append((model, time_s, was_held))

    def next_s(self) -> float | None:
        return self.left[0][0] if self.left else None

    def wishes(self, time_s: float, cache: Cache) -> Iterable[int]:
        while self.left and self.left[0][0] <= time_s:
            yield self.left.pop(0)[1]

    def may_displace(self, model: int, victim: int, time_s: float, cache: Cache) -> bool:
        return victim not in self.spared

    def on_loaded(self, model: int, victims: Sequence[int], time_s: float) -> None:
        self.loaded.append((model, list(victims)))


def test_what_was_prefetched_in_time_costs_no_request_anything() -> None:
    trace = trace_of(0, 1, 2)
    ahead = Timetable([(0.5, 1), (1.5, 2)])
    outcome = simulate("lru", trace, SIZES, 15, ahead)
    assert (outcome.misses, outcome.load_s) == (1, cost_s(SIZES[0]))
    assert (outcome.prefetches, outcome.prefetches_used) == (2, 2)
    assert outcome.prefetch_s == cost_s(SIZES[1]) + cost_s(SIZES[2])
    assert ahead.seen == [(0, 0.0, False), (1, 1.0, True), (2, 2.0, True)]


def test_a_request_waits_for_the_rest_of_a_prefetch_that_came_late() -> None:
    ahead = Timetable([(0.99, 1)])
    outcome = simulate("lru", trace_of(0, 1), SIZES, 15, ahead)
    assert outcome.misses == 1
    assert outcome.load_s == pytest.approx(cost_s(SIZES[0]) + cost_s(SIZES[1]) - 0.01)


def test_prefetches_are_loaded_one_after_the_other_and_never_delay_more_than_a_load() -> None:
    ahead = Timetable([(1.0, 3), (1.0, 2), (1.0, 1)])
    outcome = simulate("lru", trace_of(0, 1), SIZES, 15, ahead)
    assert outcome.load_s == pytest.approx(cost_s(SIZES[0]) + cost_s(SIZES[1]))


def test_a_prefetch_that_is_evicted_before_its_use_is_wasted_and_what_is_held_is_not_loaded() -> (
    None
):
    trace = trace_of(0, 2, 1)
    ahead = Timetable([(0.5, 1), (0.6, 0), (0.7, 4)])
    outcome = simulate("lru", trace, SIZES, 3, ahead)
    assert (outcome.prefetches, outcome.prefetches_used) == (1, 0)
    assert outcome.misses == 3


def test_a_prefetch_displaces_only_whom_its_judge_lets_go() -> None:
    trace = trace_of(0, 1, 2)
    ahead = Timetable([(1.5, 2)])
    ahead.spared = {0, 1}
    assert simulate("lru", trace, SIZES, 3, ahead).prefetches == 0
    ahead = Timetable([(1.5, 2)])
    ahead.spared = {0}
    assert simulate("lru", trace, SIZES, 4, ahead).prefetches == 1
    assert ahead.loaded == [(2, [1])]


def test_asking_for_victims_evicts_nobody() -> None:
    cache = Cache(make_policy("lru"), SIZES, 5)
    cache.load(4, 0)
    assert cache.victims_for(0) == [4]
    assert 4 in cache
    assert cache.free == 0


# --- the set that leaves, beside the knapsack ---------------------------------------------------
def least_loss(losses: list[float], sizes: list[int], missing: int) -> float:
    """The least summed loss of a set that frees enough."""
    return min(
        sum(losses[i] for i in chosen)
        for count in range(len(sizes) + 1)
        for chosen in itertools.combinations(range(len(sizes)), count)
        if sum(sizes[i] for i in chosen) >= missing
    )


def chosen_loss(losses: list[float], sizes: list[int], missing: int) -> tuple[float, list[int]]:
    """What the cache chooses, if these are what losses a byte say."""

    class Given(Lru):
        def rank(self, slot: int) -> tuple[float, ...]:
            return losses[slot] / sizes[slot], slot

    cache = Cache(Given(), [*sizes, missing], sum(sizes))
    for model in range(len(sizes)):
        cache.load(model, 0)
    chosen = cache.victims_for(len(sizes))
    return sum(losses[model] for model in chosen), chosen


@given(
    items=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    share=st.floats(0.05, 1.0),
)
def test_the_set_that_leaves_is_enough_minimal_and_at_most_one_victim_over_the_knapsack(
    items: list[tuple[int, int]], share: float
) -> None:
    losses = [float(loss) for loss, _ in items]
    sizes = [size for _, size in items]
    missing = max(1, int(share * sum(sizes)))
    loss, chosen = chosen_loss(losses, sizes, missing)
    freed = sum(sizes[model] for model in chosen)
    assert freed >= missing
    assert all(freed - sizes[model] < missing for model in chosen)
    # By loss a byte all but the last one of a run are no more than any set needs.
    assert loss <= least_loss(losses, sizes, missing) + max(losses)


# --- the command line ---------------------------------------------------------------------------
def found(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["replay", *arguments, "--json", str(out)])
    assert result.exit_code == 0, result.output
    figures: dict[str, Any] = json.loads(out.read_text())["figures"]
    return figures


def test_a_trace_of_ones_own_with_its_own_bytes_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    rows = "".join(f"{n},m{n % 3},{10**9 * (1 + n % 3)}\n" for n in range(30))
    path.write_text("time_s,model,bytes\n" + rows)
    figures = found(tmp_path, str(path), "--policies", "gdsf,lru", "--caches", "50%,6GB")
    cells = [figures[f"load time / LRU's: mine, trace, cache {c}"] for c in ("50%", "6GB")]
    assert all(set(cell) == {"gdsf", "Belady", "PFOO-L"} for cell in cells)
    assert cells[1]["gdsf"]["value"] == 1.0, "everything fits"


def test_sizes_may_come_from_a_file(tmp_path: Path) -> None:
    trace, sizes = tmp_path / "t.csv", tmp_path / "s.csv"
    trace.write_text("time_s,model\n" + "".join(f"{n},{'ab'[n % 2]}\n" for n in range(10)))
    sizes.write_text("model,bytes\na,1000000\nb,2000000\n")
    found(tmp_path, str(trace), "--sizes", f"{sizes},equal", "--caches", "2MB")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--policies", "fifo"), "unknown eviction policy 'fifo'"),
        (("--policies", "cost_aware:long"), "no number of hours"),
        (("--sizes", "huge"), "'huge' is neither a file"),
        (("--sizes", "trace"), "has no bytes"),
        (("--caches", "x%"), "'x%' is no share"),
        (("--caches", "lots"), "'lots' is no share"),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_words(
    tmp_path: Path, arguments: tuple[str, ...], problem: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("time_s,model\n1,a\n2,b\n")
    result = CliRunner().invoke(app, ["replay", str(path), *arguments])
    assert result.exit_code == 2
    assert problem in " ".join(result.output.split())


def test_only_replay_takes_a_trace() -> None:
    assert CliRunner().invoke(app, ["chaos", "--caches", "6%"]).exit_code == 2


def test_half_lives_can_be_compared_and_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "t.csv"
    path.write_text("time_s,model\n" + "".join(f"{n * 9000},m{n * n % 7}\n" for n in range(60)))
    policies = "cost_aware:1,cost_aware:1000"
    figures = found(tmp_path, str(path), "--policies", policies, "--plot", str(tmp_path / "plots"))
    assert all(f in figures["all cells: t, median"] for f in policies.split(","))
    drawn = sorted(file.name for file in (tmp_path / "plots").iterdir())
    assert drawn == ["replay-misses-t.png", "replay-ratios.png"]
