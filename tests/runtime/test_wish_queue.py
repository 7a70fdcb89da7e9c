"""The order of wishes, and what is said to those that wait."""

from __future__ import annotations

from collections import Counter
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from residency_world import CHUNK, MS, SECOND, World

from overcommit.runtime.admission import Forecast
from overcommit.runtime.config import LOADS_IN_FLIGHT_MAX, MIB, NEVER_NS
from overcommit.runtime.pace import Pace
from overcommit.runtime.parts import PartInfo
from overcommit.runtime.residents import Action, Refuse, State, Terms, Version, Wish, Withdraw
from overcommit.runtime.wish_queue import FAIR_WAIT_NS, RESERVED_NS, WishQueue

NOW: Final = 100 * SECOND


def queue_of(*slots: int, sizes: dict[int, int] | None = None) -> WishQueue:
    queue = WishQueue(Forecast(), lambda version: [])
    for slot in slots:
        put(queue, slot, (sizes or {}).get(slot, 8 * MIB))
    return queue


def put(queue: WishQueue, slot: int, nbytes: int = 8 * MIB, asked_ns: int = NOW) -> None:
    queue.add(Wish(Version(slot, f"m{slot}", nbytes, Terms(), 0, ()), asked_ns))


def start(queue: WishQueue, slot: int) -> None:
    wish = queue.get(slot)
    assert wish is not None
    queue.start(slot, wish.version.nbytes)


def turns(queue: WishQueue, now_ns: int = NOW) -> list[int]:
    return [wish.version.slot for wish in queue.in_turn(now_ns)]


# --- order --------------------------------------------------------------------------------------
def test_wishes_that_were_never_served_come_in_order_of_arrival() -> None:
    assert turns(queue_of(3, 1, 2)) == [3, 1, 2]


def test_who_was_loaded_comes_after_those_that_were_not() -> None:
    queue = queue_of(1, 2, 3)
    start(queue, 1)
    put(queue, 1)
    assert turns(queue) == [2, 3, 1]


def test_a_giant_waits_for_as_many_loads_of_others_as_it_weighs() -> None:
    queue = queue_of(1, 2, 9, sizes={9: 80 * MIB})
    served = []
    for _ in range(66):
        slot = turns(queue)[0]
        start(queue, slot)
        served.append(slot)
        put(queue, slot, 80 * MIB if slot == 9 else 8 * MIB)
    counts = Counter(served)
    assert counts[1] == counts[2]
    assert counts[1] == pytest.approx(10 * counts[9], abs=10)


def test_one_that_waits_very_long_goes_first_whatever_it_weighs() -> None:
    queue = queue_of(9, sizes={9: 1000 * MIB})
    start(queue, 9)
    put(queue, 9, 1000 * MIB)
    put(queue, 1)
    assert turns(queue) == [1, 9]
    assert turns(queue, NOW + FAIR_WAIT_NS) == [9, 1]


def test_charges_are_forgotten_when_nothing_waits_and_nothing_loads() -> None:
    world = World(4)
    world.add(1, 4)
    world.add(2, 1)
    world.load(1, 2, 1, 2)
    assert not world.residency._wishes._charged


def test_a_removed_version_leaves_its_slot_no_charge() -> None:
    queue = queue_of(1, 2)
    start(queue, 1)
    queue.forget(1)
    put(queue, 1)
    put(queue, 3)
    assert turns(queue) == [2, 1, 3]


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["add", "start", "drop"]))))
def test_the_order_holds_every_wish_once(steps: list[tuple[int, str]]) -> None:
    queue, model = queue_of(), set[int]()
    for slot, what in steps:
        if what == "add" and slot not in model:
            put(queue, slot, (slot + 1) * MIB)
            model.add(slot)
        elif what == "start" and model:
            first = turns(queue)[0]
            start(queue, first)
            model.discard(first)
        elif what == "drop":
            assert (queue.drop(slot) is not None) == (slot in model)
            model.discard(slot)
        assert sorted(turns(queue)) == sorted(model)
        assert sorted(turns(queue, NOW + 2 * FAIR_WAIT_NS)) == sorted(model)
        assert len(queue) == len(model)


@given(st.lists(st.integers(1, 64), min_size=2, max_size=6))
def test_models_that_are_always_wanted_get_equal_parts(sizes: list[int]) -> None:
    queue = queue_of()
    for slot, size in enumerate(sizes):
        put(queue, slot, size * MIB)
    loaded = Counter[int]()
    for _ in range(400):
        slot = turns(queue)[0]
        start(queue, slot)
        loaded[slot] += sizes[slot]
        put(queue, slot, sizes[slot] * MIB)
    # The classic bound: apart by no more than one load of each of two.
    assert max(loaded.values()) - min(loaded.values()) <= 2 * max(sizes)


# --- waits --------------------------------------------------------------------------------------
def busy_world(device_chunks: int = 2, models: int = 40) -> World:
    """A world that knows its loads to take 10 ms, with all places of the mover taken."""
    world = World(device_chunks)
    for slot in range(models):
        world.add(slot)
    for slot in range(4):
        world.want(slot)
        world.now_ns += 10 * MS
        world.finish()
    return world


def least(world: World, slot: int, earliest_ns: int, now_ns: int) -> int | None:
    """When it is there at the earliest."""
    expected = world.residency.expect(slot, earliest_ns, now_ns)
    return None if expected is None else expected[0]


def test_what_takes_longer_than_foreseen_is_told_so_the_next_time() -> None:
    world = busy_world(device_chunks=8)
    for slot in range(10, 30):
        world.residency.forecast.channels["disk"].pace = paced(10 * MS)
        world.want(slot)
        assert world.residency.expect(slot, world.now_ns, world.now_ns) is not None
        world.now_ns += 20 * MS  # twice as long as the least
        world.finish()
    world.residency.forecast.channels["disk"].pace = paced(10 * MS)
    world.want(31)
    expected = world.residency.expect(31, world.now_ns, world.now_ns)
    assert expected is not None
    least_ns, likely_ns = (at_ns - world.now_ns for at_ns in expected)
    assert least_ns == pytest.approx(10 * MS, rel=0.01)
    assert likely_ns == pytest.approx(2 * least_ns, rel=0.15)


def paced(cost_ns: int) -> Pace:
    pace = Pace()
    for _ in range(2):
        pace.note(CHUNK, cost_ns)
    return pace


def test_who_was_promised_leaves_after_others() -> None:
    world = busy_world(device_chunks=2, models=10)
    world.load(4)
    world.want(5)
    assert world.residency.expect(5, world.now_ns, world.now_ns) is not None
    world.finish()
    world.use(4)  # the policy would evict 5
    world.want(6)
    assert world.port.evicted[-1] == 4


def test_a_version_is_expected_after_what_is_in_flight_and_queued() -> None:
    world = busy_world(device_chunks=LOADS_IN_FLIGHT_MAX)
    for slot in range(10, 20):
        world.want(slot)
    assert len(world.loads) == LOADS_IN_FLIGHT_MAX
    ready_ns = least(world, 19, world.now_ns, world.now_ns)
    assert ready_ns is not None
    assert ready_ns - world.now_ns == pytest.approx(10 * 10 * MS, rel=0.01)
    assert least(world, 19, ready_ns, world.now_ns) is None, "there is time enough"


def test_a_load_in_flight_is_expected_when_its_rest_is_there() -> None:
    world = busy_world()
    world.want(10)
    world.now_ns += 4 * MS
    ready_ns = least(world, 10, world.now_ns, world.now_ns)
    assert ready_ns is not None
    assert ready_ns - world.now_ns == pytest.approx(6 * MS, rel=0.01)


def test_a_part_that_many_wishes_lack_is_waited_for_once() -> None:
    world = busy_world(device_chunks=24)
    trunk = PartInfo("trunk", 20 * CHUNK)
    world.add(99, 24)
    world.load(99)
    for slot in range(100, 150):
        world.add(slot, 1, parts=[trunk])
    world.port.leases[99] = 1  # no room for any of them
    for slot in range(100, 150):
        world.want(slot)
    waits = [world.residency._wishes.wait_ns(v, world.now_ns) for v in waiting(world)]
    first, last = waits[0], waits[-1]
    assert first is not None
    assert last is not None
    forecast = world.residency.forecast
    head_ns, trunk_ns = (forecast.cost_ns([("disk", n * CHUNK)]) for n in (1, 20))
    assert head_ns is not None
    assert trunk_ns is not None
    assert first[0] == pytest.approx(trunk_ns + head_ns)
    # 50 heads and one trunk, not 50 trunks; of the last few, the trunk's wish may run beside.
    assert last[0] == pytest.approx(trunk_ns + 50 * head_ns, rel=0.05)


def waiting(world: World) -> list[Version]:
    return [wish.version for wish in world.residency._wishes.in_turn(world.now_ns)]


def test_nothing_is_said_while_no_load_was_measured() -> None:
    world = World(1)
    world.add(1)
    world.want(1)
    assert world.residency.expect(1, 0, world.now_ns) is None
    assert world.residency.expect(99, 0, world.now_ns) is None


def bare_want(world: World, slot: int, latest_ns: int = NEVER_NS) -> list[Action]:
    """Want without looking at the whole world each time."""
    world.port.asking.add(slot)
    return world.residency.want(slot, 0, world.now_ns, latest_ns)


def test_wishes_that_can_wait_are_queued_however_many_there_are() -> None:
    world = busy_world(models=1000)
    assert not [a for slot in range(10, 1000) for a in bare_want(world, slot) if type(a) is Refuse]


def test_a_wish_is_refused_when_all_its_requests_are_late_and_very_much_is_before_it() -> None:
    world = busy_world(models=1000)
    answers: list[Action] = []
    for slot in range(10, 1000):
        answers = bare_want(world, slot, world.now_ns + 20 * MS)
        if answers and isinstance(answers[0], Refuse):
            break
    (refusal,) = answers
    assert isinstance(refusal, Refuse)
    ahead = len(world.residency.loads_in_flight()) + len(world.residency._wishes)
    assert ahead * 10 * MS == pytest.approx(RESERVED_NS, rel=0.02)
    assert refusal.code == "overloaded"
    assert refusal.retry_after_s == pytest.approx((ahead * 10 + 10 - 20) / 1000, rel=0.02)
    assert f"model 'model-{refusal.slot}'" in refusal.message
    assert "raise --device-memory" in refusal.message


def test_a_giant_that_takes_longer_than_any_request_has_is_loaded_all_the_same() -> None:
    world = busy_world(device_chunks=3000)
    world.add(99, 2500)
    assert not [a for a in world.want(99, latest_ns=world.now_ns + MS) if isinstance(a, Refuse)]
    assert world.state(99) is State.LOADING


# --- nobody waits any more ----------------------------------------------------------------------
def blocked_world() -> World:
    world = World(1)
    for slot in (1, 2, 3):
        world.add(slot)
    world.load(1)
    world.port.leases[1] = 1
    return world


def test_a_wish_that_nobody_waits_for_any_more_is_withdrawn_not_loaded() -> None:
    world = blocked_world()
    world.want(2, waiter=5)
    world.port.asking.discard(2)  # its requests have expired
    world.port.leases[1] = 0
    assert world.tick() == [Withdraw(2, frozenset({5}))]
    assert world.state(1) is State.DEVICE
    assert world.residency.totals().withdrawals == 1


def test_a_load_that_requests_were_told_to_come_back_for_is_done() -> None:
    world = busy_world(device_chunks=1)
    world.load(1)
    world.port.leases[1] = 1
    world.want(2)
    assert world.residency.expect(2, world.now_ns, world.now_ns) is not None
    world.port.asking.discard(2)
    world.port.leases[1] = 0
    world.tick()
    assert world.state(2) is State.LOADING


def test_a_pinned_version_needs_nobody_who_waits() -> None:
    world = blocked_world()
    world.add(2, pinned=True)
    world.want(2, waiter=-1)
    world.port.leases[1] = 0
    world.tick()
    assert world.state(2) is State.LOADING
