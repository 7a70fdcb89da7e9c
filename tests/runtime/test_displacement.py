"""What a giant may push out, and when."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from residency_world import MS, SECOND, World

from overcommit.runtime.config import Settings
from overcommit.runtime.displacement import HELD_NS, MANY, PATIENCE_S, SHARE, Demand, patience_s
from overcommit.runtime.pressure import Pressure
from overcommit.runtime.pump import WISHES_TRIED_MAX
from overcommit.runtime.residents import State

GIANT: Final = 99


def demand_of(rates: dict[int, float]) -> Demand:
    demand = Demand()
    demand.look(dict.fromkeys(rates, 0), SECOND)
    demand.look({slot: int(rate * 10) for slot, rate in rates.items()}, 11 * SECOND)
    return demand


def test_a_rate_is_what_was_run_a_second() -> None:
    demand = demand_of({1: 5.0, 2: 0.0})
    assert (demand.rate(1), demand.rate(2), demand.rate(3)) == (5.0, 0.0, 0.0)


def test_a_rate_fades_and_of_what_is_not_looked_at_is_forgotten() -> None:
    demand = demand_of({1: 8.0, 2: 8.0})
    demand.look({1: 80}, 12 * SECOND)
    assert demand.rate(1) == 4.0
    assert demand.rate(2) == 0.0


class Looks:
    """What a look at the pressure needs of a site: who is on DEVICE, and how often each was used."""

    def __init__(self) -> None:
        self.there: list[int] = []
        self.uses: dict[int, int] = {}
        self.device = SimpleNamespace(capacity_bytes=1 << 30)
        self.forecast = SimpleNamespace(busy_ns=lambda now_ns: 0)
        self.timings = SimpleNamespace(activations=[])
        self.weigh_displacement = self.set_stay = lambda _: None

    def device_slots(self) -> list[int]:
        return self.there

    def unique_bytes(self, slot: int) -> int:
        return 1

    def usage(self, slot: int) -> SimpleNamespace:
        return SimpleNamespace(uses=self.uses.get(slot, 0), waiting=0)


def test_who_is_never_there_when_it_is_looked_is_asked_for_all_the_same() -> None:
    """A giant and the small ones that it pushes out, in turn, as long as a look takes to come."""
    site = cast(Any, Looks())
    pressure = Pressure(Settings(), site, site, site, lambda: None)
    site.there = [1, GIANT]
    for second in range(1, 20):
        site.uses = {1: second, GIANT: second}
        pressure.tick(second * SECOND)
        site.there = [1]
    assert pressure._demand.rate(GIANT) == pytest.approx(pressure._demand.rate(1)) == 1.0
    for second in range(20, 40):
        pressure.tick(second * SECOND)  # nobody asks any more
    assert pressure._demand.known() == []


def test_a_counter_that_falls_is_no_negative_rate() -> None:
    demand = demand_of({1: 8.0})
    demand.look({1: 0}, 12 * SECOND)
    assert demand.rate(1) == 4.0


def test_a_giant_waits_that_would_push_out_what_is_asked_for_more() -> None:
    hot = dict.fromkeys(range(10), 20.0)
    cost = {**dict.fromkeys(range(10), 0.001), GIANT: 0.02}
    wait_s = patience_s(GIANT, list(hot), demand_of({**hot, GIANT: 1.0}), cost.__getitem__)
    assert wait_s == pytest.approx(SHARE * (0.02 + 10 * 0.001))


def test_nobody_waits_for_ever() -> None:
    cost = {**dict.fromkeys(range(10), 100.0), GIANT: 100.0}
    wait_s = patience_s(GIANT, range(10), demand_of(dict.fromkeys(range(10), 99.0)), cost.get)  # type: ignore[arg-type]
    assert wait_s == PATIENCE_S


def test_a_giant_that_is_worth_as_much_need_not_wait() -> None:
    hot = dict.fromkeys(range(10), 1.0)
    cost = {**dict.fromkeys(range(10), 0.01), GIANT: 0.2}
    assert patience_s(GIANT, list(hot), demand_of({**hot, GIANT: 5.0}), cost.__getitem__) == 0


@given(st.integers(0, MANY - 1), st.floats(0, 1e6))
def test_who_pushes_out_a_few_never_waits(count: int, rate: float) -> None:
    rates = dict.fromkeys(range(count), rate)
    assert patience_s(GIANT, list(rates), demand_of(rates), lambda slot: 1.0) == 0


# --- in residency -------------------------------------------------------------------------------
def hot_world(giants: Sequence[int] = (GIANT,)) -> World:
    """Eight hot models that fill DEVICE; giants that need all of it were there before them."""
    world = World(8)
    demand = Demand()
    world.residency.weigh_displacement(demand)
    for giant in giants:
        world.add(giant, 8)
        world.want(giant)
        world.now_ns += 10 * MS
        world.finish()
        world.now_ns += 10 * MS
    for slot in range(8):
        world.add(slot)
        world.want(slot)
        world.now_ns += 10 * MS
        world.finish()
    world.port.evicted.clear()
    for _ in range(3):
        world.now_ns += SECOND
        for slot in range(8):
            for _ in range(20):
                world.use(slot)
        demand.look(dict(world.port.uses), world.now_ns)
    return world


def test_a_cold_giant_does_not_push_out_the_hot_ones_at_once_and_gets_its_turn() -> None:
    world = hot_world()
    came_ns = world.residency._versions[GIANT].published_ns
    world.want(GIANT)
    assert world.port.evicted == []
    assert not world.port.is_hungry, "nobody rings for a wish that is held up"
    while world.state(GIANT) is State.DISK:
        next_ns = world.residency.next_tick_ns()
        assert next_ns is not None
        world.tick(max(1, next_ns - world.now_ns))
    cost_ns = world.residency.forecast.cost_ns([("disk", 8 * 2 << 20)])
    assert cost_ns is not None
    assert SHARE * cost_ns < world.now_ns - came_ns <= PATIENCE_S * SECOND
    assert sorted(world.port.evicted) == list(range(8))


def test_a_giant_that_was_not_here_lately_comes_at_once() -> None:
    world = hot_world()
    world.now_ns += int(PATIENCE_S) * SECOND
    world.want(GIANT)
    assert world.state(GIANT) is State.LOADING
    other = hot_world()
    other.add(98, 8)
    other.want(98)
    assert other.state(98) is State.LOADING


def test_who_needs_less_than_half_of_the_device_comes_at_once_and_again() -> None:
    world = hot_world()
    world.add(97, 3)
    for _ in range(3):
        world.want(97)
        assert world.state(97) is State.LOADING
        world.now_ns += 10 * MS
        world.finish()
        for slot in range(8):
            world.want(slot)
            world.now_ns += 10 * MS
            world.finish()


def test_others_are_not_held_up_with_it() -> None:
    world = hot_world()
    world.want(GIANT)
    world.add(50)
    world.want(50)
    assert world.state(50) is State.LOADING
    assert len(world.port.evicted) == 1


@pytest.mark.parametrize("giants", [1, WISHES_TRIED_MAX, 3 * WISHES_TRIED_MAX, 100])
def test_others_are_not_held_up_however_many_are(giants: int) -> None:
    world = hot_world(range(100, 100 + giants))
    for giant in range(100, 100 + giants):
        world.want(giant)
    world.add(50)
    world.want(50)
    assert world.state(50) is State.LOADING
    assert len(world.port.evicted) == 1


def test_those_that_are_held_up_are_looked_at_a_few_at_an_event_and_each_in_its_turn() -> None:
    giants = range(100, 140)
    world = hot_world(giants)
    for giant in giants:
        world.want(giant)
    world.now_ns += HELD_NS
    tried: set[int] = set()
    for _ in range(len(giants) // WISHES_TRIED_MAX):
        world.tick(1)
        wishes = [world.residency._wishes.get(giant) for giant in giants]
        held = {wish.version.slot for wish in wishes if wish and wish.not_before_ns > world.now_ns}
        assert len(held - tried) == WISHES_TRIED_MAX
        assert held >= tried
        tried = held
    assert tried == set(giants)


def test_requests_for_it_are_told_when_its_turn_comes() -> None:
    world = hot_world()
    world.want(GIANT)
    expected = world.residency.expect(GIANT, world.now_ns + 10 * MS, world.now_ns)
    wish = world.residency._wishes.get(GIANT)
    assert expected is not None
    assert wish is not None
    assert expected[0] > wish.held_until_ns > world.now_ns


def test_it_comes_earlier_when_the_hot_ones_have_cooled() -> None:
    world = hot_world()
    demand = Demand()
    world.want(GIANT)
    world.residency.weigh_displacement(demand)  # nobody was asked for anything lately
    world.tick(200 * MS)
    assert world.state(GIANT) is State.LOADING
