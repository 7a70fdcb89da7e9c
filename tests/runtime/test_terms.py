"""How long a version stays: `min_resident`, the server's own minimum, and `ttl`."""

from __future__ import annotations

from residency_world import MS, SECOND, World

from overcommit.runtime.placement import STARVING_NS
from overcommit.runtime.residents import State


# --- min_resident -------------------------------------------------------------------------------
def test_a_fresh_version_is_passed_over_for_an_older_one() -> None:
    world = World(2)
    for slot in (1, 2, 3):
        world.add(slot, min_resident_ns=10 * SECOND if slot == 1 else 0)
    world.load(1, 2)
    world.want(3)
    assert world.port.evicted == [2], "1 is the least recently used"


def test_a_wish_waits_for_the_end_of_the_minimum_and_then_gets_the_bytes() -> None:
    world = World(1)
    world.add(1, min_resident_ns=500 * MS)
    world.add(2)
    world.load(1)
    assert world.want(2) == []
    assert world.tick(400 * MS) == []
    assert len(world.tick(100 * MS)) == 1
    assert world.port.evicted == [1]


def test_a_starving_wish_takes_what_is_fresh_but_first_what_is_not() -> None:
    world = World(3)
    world.add(1, min_resident_ns=3600 * SECOND)
    world.add(2)
    world.add(3, 2)
    world.add(4, 2)
    world.load(1, 2)
    world.port.leases[2] = 1
    world.want(4)
    world.tick(STARVING_NS // 2)
    world.port.leases[2] = 0
    assert world.port.evicted == []
    world.tick(1)
    assert world.port.evicted == [2]


def test_only_the_desperate_take_the_last_fresh_one() -> None:
    world = World(1)
    world.add(1, min_resident_ns=3600 * SECOND)
    world.add(2)
    world.load(1)
    assert world.want(2) == []
    assert world.tick(STARVING_NS) == []
    assert len(world.tick(1)) == 1


def test_fresh_mates_in_a_slab_stay_until_somebody_is_desperate() -> None:
    world = World(1)
    for slot in range(8):
        world.add(slot, 1 / 8, min_resident_ns=3600 * SECOND if slot == 3 else 0)
    world.add(99, 1)
    world.load(*range(8))
    assert world.want(99) == []
    assert 3 not in world.port.evicted
    assert len(world.tick(STARVING_NS + 1)) == 1
    assert sorted(world.port.evicted) == list(range(8))


def test_while_damped_the_young_leave_after_the_old_whatever_they_are_worth() -> None:
    world = World(2)
    for slot in (1, 2, 3):
        world.add(slot)
    world.load(1)
    world.now_ns += SECOND
    world.load(2)
    world.now_ns += SECOND
    world.use(1)  # the policy would evict 2
    world.residency.set_stay(SECOND + SECOND // 2)
    world.want(3)
    assert world.port.evicted == [1]


def test_while_damped_the_young_leave_if_there_is_nobody_else() -> None:
    world = World(1)
    world.add(1)
    world.add(2)
    world.load(1)
    world.residency.set_stay(10 * SECOND)
    assert len(world.want(2)) == 1


# --- ttl ----------------------------------------------------------------------------------------
def test_without_a_ttl_nothing_ever_leaves_by_itself() -> None:
    world = World(1)
    world.add(1)
    world.load(1)
    assert world.residency.next_tick_ns() is None
    world.tick(365 * 86_400 * SECOND)
    assert world.state(1) is State.DEVICE


def test_an_idle_version_gives_device_back_at_its_ttl_and_keeps_its_host_copy() -> None:
    world = World(1, host_chunks=1)
    world.add(1, ttl_ns=SECOND)
    world.want(1)
    published_ns = world.now_ns
    world.finish()
    assert world.residency.next_tick_ns() == published_ns + SECOND
    world.tick(SECOND - 2)
    assert world.state(1) is State.DEVICE
    world.tick(1)
    assert world.state(1) is State.HOST
    totals = world.residency.totals()
    assert (totals.expiries, totals.evictions_device) == (1, 0)
    assert world.residency.next_tick_ns() is None


def test_a_use_puts_the_ttl_off() -> None:
    world = World(1)
    world.add(1, ttl_ns=SECOND)
    world.load(1)
    world.now_ns += SECOND // 2
    used_ns = world.now_ns
    world.use(1)
    world.tick(SECOND // 2)
    assert world.state(1) is State.DEVICE
    assert world.residency.next_tick_ns() == used_ns + SECOND
    world.tick(SECOND // 2)
    assert world.state(1) is State.DISK


def test_what_is_leased_waited_for_or_pinned_does_not_expire() -> None:
    world = World(3)
    for slot in (1, 2, 3):
        world.add(slot, pinned=slot == 3, ttl_ns=SECOND)
    world.load(1, 2, 3)
    world.port.leases[1] = 1
    world.port.waiting[2] = 1
    world.tick(2 * SECOND)
    assert [world.state(slot) for slot in (1, 2, 3)] == [State.DEVICE] * 3
    world.port.leases[1] = world.port.waiting[2] = 0
    world.tick(SECOND)
    assert [world.state(slot) for slot in (1, 2, 3)] == [State.DISK, State.DISK, State.DEVICE]


def test_a_minimum_is_kept_whatever_the_ttl() -> None:
    world = World(1)
    world.add(1, ttl_ns=SECOND, min_resident_ns=10 * SECOND)
    world.load(1)
    world.tick(2 * SECOND)
    assert world.state(1) is State.DEVICE
    world.tick(9 * SECOND)
    assert world.state(1) is State.DISK


def test_a_ttl_that_is_given_later_counts_from_then_and_can_be_taken_back() -> None:
    world = World(1)
    world.add(1)
    world.load(1)
    world.now_ns += 100 * SECOND
    world.add(1, ttl_ns=SECOND)
    assert world.residency.next_tick_ns() == world.now_ns + SECOND
    world.add(1)
    assert world.residency.next_tick_ns() is None


def test_versions_that_come_and_go_leave_no_times_behind() -> None:
    world = World(1)
    for slot in (1, 2):
        world.add(slot, ttl_ns=SECOND)
    for _ in range(50):
        world.load(1, 2)
    assert len(world.residency._idle._heap) < 70
    world.remove(1)
    world.remove(2)
    assert world.residency.next_tick_ns() is None
    assert len(world.residency._idle) == 0
