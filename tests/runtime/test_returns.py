"""Who comes back by whole seconds finds the version there, and nothing is loaded for who has come."""

from __future__ import annotations

from residency_world import CHUNK, MS, SECOND, World

from overcommit.runtime.pace import Pace
from overcommit.runtime.residents import State
from overcommit.runtime.returns import BOOKED_MAX, Returns
from overcommit.runtime.wish_queue import GRACE_NS


def world_of(device_chunks: int = 2, models: int = 6) -> World:
    """A world whose loads take 10 ms, and DEVICE full of others that may leave."""
    world = World(device_chunks)
    for slot in range(models):
        world.add(slot)
    world.load(*range(1, 1 + device_chunks))
    world.residency.forecast.channels["disk"].pace = pace = Pace()
    for _ in range(2):
        pace.note(CHUNK, 10 * MS)
    return world


def returns_of(world: World) -> Returns:
    return world.residency._returns


def refuse(world: World, slot: int) -> tuple[int, int]:
    """Requests are told to come back, and the version is loaded; return when: now, and as was told."""
    told_ns = world.now_ns
    world.want(slot)
    expected = world.residency.expect(slot, world.now_ns, world.now_ns)
    assert expected is not None
    world.port.asking.discard(slot)
    world.now_ns += 10 * MS
    world.finish()
    assert world.state(slot) is State.DEVICE
    return told_ns, expected[1]


def tick_at(world: World, at_ns: int) -> None:
    """Tick as often as it asks for, up to this time."""
    while (due_ns := world.residency.next_tick_ns()) is not None and due_ns <= at_ns:
        world.tick(max(1, due_ns - world.now_ns))
    world.tick(max(1, at_ns - world.now_ns))


def push_out(world: World, slot: int) -> None:
    """Others are used until the version has left."""
    world.port.leases.clear()
    for other in (1, 2, 3):
        world.want(other)
        while world.loads:
            world.finish()
        world.use(other)
    assert world.state(slot) is not State.DEVICE


def test_who_comes_when_the_second_is_over_finds_it_there_again() -> None:
    world = world_of()
    told_ns, meant_ns = refuse(world, 0)
    tick_at(world, meant_ns + GRACE_NS)
    push_out(world, 0)
    tick_at(world, told_ns + SECOND - 100 * MS)
    assert world.loads == {}, "far too early: it would be held for nothing"
    tick_at(world, told_ns + SECOND - 10 * MS)
    (load,) = world.loads.values()
    assert load.slot == 0
    world.finish()
    # It is kept for the first of them and for the last, who was refused just before it had come.
    last_ns = meant_ns + SECOND + GRACE_NS
    assert world.residency._versions[0].promised_ns == last_ns
    assert len(returns_of(world)) == 0


def test_what_is_there_still_is_kept_and_not_loaded() -> None:
    world = world_of()
    told_ns, meant_ns = refuse(world, 0)
    tick_at(world, told_ns + SECOND)
    assert world.state(0) is State.DEVICE
    assert world.loads == {}
    assert world.residency._versions[0].promised_ns == meant_ns + SECOND + GRACE_NS


def test_for_who_came_at_the_time_that_was_meant_nothing_is_loaded_again() -> None:
    world = world_of()
    told_ns, meant_ns = refuse(world, 0)
    tick_at(world, meant_ns)
    world.use(0)
    tick_at(world, world.now_ns + GRACE_NS)
    assert len(returns_of(world)) == 0
    push_out(world, 0)
    tick_at(world, told_ns + 2 * SECOND)
    assert world.loads == {}
    assert world.state(0) is State.DISK


def test_who_came_and_waits_is_not_awaited_again() -> None:
    world = world_of()
    _, meant_ns = refuse(world, 0)
    tick_at(world, meant_ns)
    world.port.waiting[0] += 1
    tick_at(world, world.now_ns + GRACE_NS)
    assert len(returns_of(world)) == 0


def test_who_came_and_was_refused_again_is_awaited_once() -> None:
    world = world_of()
    _, meant_ns = refuse(world, 0)
    tick_at(world, meant_ns)
    returns_of(world).book(world.residency._versions[0], world.now_ns + 90 * MS, world.now_ns)
    tick_at(world, world.now_ns + GRACE_NS)
    assert len(returns_of(world)) == 1


def test_a_version_that_was_removed_is_not_awaited() -> None:
    world = world_of()
    told_ns, _ = refuse(world, 0)
    world.take(world.residency.remove(0, world.now_ns))
    world.add(0, 2)
    tick_at(world, told_ns + 2 * SECOND)
    assert world.loads == {}
    assert len(returns_of(world)) == 0


def test_a_version_that_is_not_to_be_tried_yet_is_refused_to_nobody() -> None:
    world = world_of()
    told_ns, meant_ns = refuse(world, 0)
    tick_at(world, meant_ns + GRACE_NS)
    push_out(world, 0)
    world.residency._versions[0].retry_ns = told_ns + 5 * SECOND
    tick_at(world, told_ns + 2 * SECOND)
    assert world.refused == []
    assert world.loads == {}


def test_refusals_of_one_load_are_one_booking_and_those_of_the_next_another() -> None:
    world = world_of()
    version = world.residency._versions[0]
    returns, now_ns = returns_of(world), world.now_ns
    for ms in range(0, 40, 10):
        returns.book(version, now_ns + 50 * MS, now_ns + ms * MS)
    assert len(returns) == 1
    returns.book(version, now_ns + 100 * MS, now_ns + 50 * MS)
    assert len(returns) == 2


def test_who_is_meant_to_come_at_the_second_s_end_needs_no_booking() -> None:
    world = world_of()
    returns, now_ns = returns_of(world), world.now_ns
    returns.book(world.residency._versions[0], now_ns + SECOND - GRACE_NS, now_ns)
    assert len(returns) == 0
    assert returns.next_ns() is None


def test_there_are_so_many_bookings_and_no_more() -> None:
    world = world_of(models=BOOKED_MAX + 10)
    now_ns = world.now_ns
    for version in list(world.residency._versions.values()):
        returns_of(world).book(version, now_ns + 50 * MS, now_ns)
    assert len(returns_of(world)) == BOOKED_MAX
