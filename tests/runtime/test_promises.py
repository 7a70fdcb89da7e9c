"""Requests that were told to come back: their version is loaded in time, and still there."""

from __future__ import annotations

import pytest
from residency_world import CHUNK, MS, World

from overcommit.runtime.config import LOADS_IN_FLIGHT_MAX, MIB
from overcommit.runtime.device_room import PROMISED_SHARE
from overcommit.runtime.pace import Pace
from overcommit.runtime.placement import STARVING_NS
from overcommit.runtime.residents import State, Terms
from overcommit.runtime.wish_queue import DUE_LOADS, GRACE_NS


def known_world(device_chunks: int, models: int, chunks: float = 1) -> World:
    """A world whose loads take 10 ms."""
    world = World(device_chunks)
    pace = Pace()
    for _ in range(2):
        pace.note(CHUNK, 10 * MS)
    world.residency.forecast.channels["disk"].pace = pace
    for slot in range(models):
        world.add(slot, chunks)
    return world


def promise(world: World, slot: int) -> int:
    """Requests come, and are told to come back; return when."""
    world.want(slot)
    expected = world.residency.expect(slot, world.now_ns, world.now_ns)
    assert expected is not None
    world.port.asking.discard(slot)
    return expected[1]


def promised_world(device_chunks: int, promised: int) -> tuple[World, int]:
    """DEVICE is full, and of what is there requests may come back for so many."""
    world = known_world(device_chunks, device_chunks + 4)
    for slot in range(promised, device_chunks):
        world.load(slot)
    until_ns = max(promise(world, slot) for slot in range(promised))
    for _ in range(promised):
        world.finish()
    assert all(world.state(slot) is State.DEVICE for slot in range(device_chunks))
    return world, until_ns


def test_who_was_told_to_come_back_finds_it_there_though_another_waits_for_room() -> None:
    world, until_ns = promised_world(device_chunks=4, promised=2)
    world.port.leases.update((2, 3))  # nobody else may leave
    world.want(5)
    assert world.loads == {}
    assert world.port.evicted == []
    world.now_ns = until_ns + GRACE_NS  # nobody came
    world.tick()
    assert world.port.evicted == [0]


def test_a_wish_that_starves_gets_what_was_promised() -> None:
    world, _ = promised_world(device_chunks=4, promised=2)
    world.port.leases.update((2, 3))
    world.want(5)
    for slot in (0, 1):  # it was promised for very long
        version = world.residency._versions[slot]
        version.promised_ns += 10 * STARVING_NS
    world.tick(STARVING_NS)
    assert world.port.evicted == []
    world.tick(2)
    assert world.port.evicted == [0]


def test_not_all_of_device_is_kept_and_who_comes_back_last_goes_first() -> None:
    world, _ = promised_world(device_chunks=4, promised=4)
    assert PROMISED_SHARE * 4 == 3
    last = max(range(4), key=lambda slot: world.residency._versions[slot].promised_ns)
    world.want(5)
    assert world.port.evicted == [last]
    world.want(6)
    assert world.port.evicted == [last], "the others are kept"


def test_who_shares_a_slab_with_what_was_promised_leaves_after_others() -> None:
    world = known_world(device_chunks=2, models=1)
    for slot in (10, 11):
        world.residency.add(slot, f"m{slot}", MIB // 4, world.now_ns, Terms())
        world.load(slot)  # both in one slab
    world.load(0)
    world.use(0)  # the policy would let 10 and 11 go
    world.residency._versions[11].promised_ns = world.now_ns + 1000 * MS
    world.add(5)
    world.want(5)
    assert world.port.evicted == [0]


def busy_world() -> World:
    """One in which all loads are under way that may be, and ten wait."""
    world = known_world(device_chunks=40, models=30)
    for slot in range(LOADS_IN_FLIGHT_MAX):
        world.want(slot)
    for slot in range(10, 20):
        world.want(slot)
    return world


def test_a_promised_load_that_is_due_goes_before_its_turn() -> None:
    world = busy_world()
    until_ns = promise(world, 20)
    assert until_ns - world.now_ns > 100 * MS
    world.now_ns = until_ns - int(DUE_LOADS * 10 * MS) - 1
    world.finish()
    assert world.state(20) is not State.LOADING, "not yet"
    world.now_ns += 2
    world.finish()
    assert world.state(20) is State.LOADING


def test_of_two_that_are_due_the_one_that_was_told_an_earlier_time_goes_first() -> None:
    world = busy_world()
    times = [promise(world, slot) for slot in (20, 21)]
    assert times[0] < times[1]
    world.now_ns = times[1]
    world.finish()
    assert world.state(20) is State.LOADING
    assert world.state(21) is not State.LOADING
    world.finish()
    assert world.state(21) is State.LOADING


def test_a_time_that_was_told_stays_true_when_others_are_told_a_later_one() -> None:
    world = busy_world()
    promise(world, 20)
    wish = world.residency._wishes.get(20)
    assert wish is not None
    before_ns = wish.due_ns
    world.now_ns += 20 * MS
    promise(world, 20)
    assert wish.due_ns == pytest.approx(before_ns, abs=21 * MS)
    assert wish.due_ns <= before_ns


def test_a_small_one_is_kept_where_a_large_one_before_it_is_too_much() -> None:
    world = known_world(device_chunks=8, models=1)
    world.add(1, 5)
    world.add(2, 2)
    world.add(3, 1)
    world.load(3, 1, 2)
    for number, slot in enumerate((1, 3, 2)):  # 5 + 1 of 8 chunks are kept, 2 more are too many
        world.residency._versions[slot].promised_ns = world.now_ns + (1 + number) * 1000 * MS
    world.want(0)
    assert world.port.evicted == [2]
