"""What residency decides, one rule a test."""

from __future__ import annotations

import pytest
from residency_world import MS, SECOND, World

from overcommit.runtime._shm import ABSENT, LOADING, RESIDENT
from overcommit.runtime.config import LOADS_IN_FLIGHT_MAX, MIB
from overcommit.runtime.pump import RETRY_NS, WISH_WAIT_S
from overcommit.runtime.residents import Publish, Refuse, StartLoad, State


def test_a_wish_for_an_absent_version_starts_one_load_and_is_published_when_it_is_done() -> None:
    world = World(4)
    world.add(1, 2)
    (load,) = world.want(1, waiter=7)
    assert isinstance(load, StartLoad)
    assert (load.slot, load.source, load.host) == (1, "disk", None)
    assert world.port.words[1] == (LOADING, 0)
    (publish,) = world.finish(load.job)
    assert publish == Publish(1, 1, load.device, frozenset({7}))
    assert world.port.words[1] == (RESIDENT, 1)


def test_many_waiters_share_one_load() -> None:
    world = World(4)
    world.add(1)
    assert len(world.want(1, waiter=0)) == 1
    assert [world.want(1, waiter) for waiter in (1, 2, 1)] == [[], [], []]
    world.finish()
    assert world.published[0].waiters == {0, 1, 2}


def test_a_resident_version_is_published_at_once_under_the_same_generation() -> None:
    world = World(4)
    world.add(1)
    world.load(1)
    (publish,) = world.want(1, waiter=3)
    assert publish == Publish(1, 1, world.published[0].extents, frozenset({3}))
    totals = world.residency.totals()
    assert (totals.attaches, totals.loads_from_disk) == (1, 1)


def test_the_least_recently_used_version_makes_room() -> None:
    world = World(2)
    for slot in (1, 2, 3):
        world.add(slot)
    world.load(1, 2)
    world.use(1)
    world.want(3)
    assert world.port.evicted == [2]
    assert world.state(2) is State.DISK
    assert world.port.words[2] == (ABSENT, 1)


def test_a_priority_that_is_lowered_later_counts_at_once() -> None:
    world = World(3)
    for slot in (1, 2, 3, 4):
        world.add(slot)
    world.load(1, 2, 3)
    world.add(3, priority=-1)
    world.want(4)
    assert world.port.evicted == [3]


def test_being_loaded_counts_as_a_use() -> None:
    world = World(2)
    for slot in (1, 2, 3):
        world.add(slot)
    world.load(1)
    world.use(1)
    world.load(2)
    world.want(3)
    assert world.port.evicted == [1]


def test_uses_that_nobody_reported_are_found_and_ordered() -> None:
    world = World(3)
    for slot in (1, 2, 3, 4):
        world.add(slot)
    world.load(1, 2, 3)
    for slot in (3, 1, 2):
        world.use(slot)
    world.want(4)
    assert world.port.evicted == [3]


def test_a_low_priority_version_leaves_before_an_older_one() -> None:
    world = World(2)
    world.add(1, priority=1)
    world.add(2)
    world.add(3)
    world.load(1, 2)
    world.want(3)
    assert world.port.evicted == [2]


def test_a_leased_version_stays_and_the_next_one_leaves() -> None:
    world = World(2)
    for slot in (1, 2, 3):
        world.add(slot)
    world.load(1, 2)
    world.port.leases[1] = 1
    world.want(3)
    assert world.port.evicted == [2]


def test_a_lease_that_is_taken_between_the_look_and_the_eviction_is_respected() -> None:
    world = World(2)
    for slot in (1, 2, 3):
        world.add(slot)
    world.load(1, 2)
    world.port.lies = 1
    world.want(3)
    assert world.port.evicted == [2]
    assert world.port.words[1] == (RESIDENT, 1)


def test_pinned_and_queued_for_versions_stay() -> None:
    world = World(3)
    world.add(1, pinned=True)
    for slot in (2, 3, 4):
        world.add(slot)
    world.load(1, 2, 3)
    world.port.waiting[2] = 5
    world.want(4)
    assert world.port.evicted == [3]


def test_the_set_that_leaves_is_minimal() -> None:
    world = World(6)
    for slot, chunks in ((1, 1), (2, 1), (3, 4), (4, 4)):
        world.add(slot, chunks)
    world.load(1, 2, 3)
    world.want(4)
    assert world.port.evicted == [3]


def test_nothing_is_evicted_for_a_wish_that_would_not_fit_anyway() -> None:
    world = World(4)
    for slot, chunks in ((1, 2), (2, 2), (3, 4)):
        world.add(slot, chunks)
    world.load(1, 2)
    world.port.leases[2] = 1
    assert world.want(3) == []
    assert world.port.evicted == []


def test_a_wish_without_room_waits_hungry_and_is_served_when_a_lease_drops() -> None:
    world = World(1)
    world.add(1)
    world.add(2)
    world.load(1)
    world.port.leases[1] = 1
    assert world.want(2) == []
    assert world.port.is_hungry
    assert world.residency.next_tick_ns() == world.now_ns + RETRY_NS
    assert world.tick() == []
    world.port.leases[1] = 0
    (load,) = world.tick()
    assert isinstance(load, StartLoad)
    assert not world.port.is_hungry
    assert world.residency.next_tick_ns() is None


def test_a_small_wish_overtakes_one_that_does_not_fit_but_not_one_that_starves() -> None:
    world = World(4)
    for slot, chunks in ((1, 2), (2, 4), (3, 1), (4, 1)):
        world.add(slot, chunks)
    world.load(1)
    world.port.leases[1] = 1
    assert world.want(2) == []
    assert len(world.want(3)) == 1
    world.finish()
    world.tick(1_001 * MS)
    assert world.state(3) is State.DISK  # taken, and kept free for the one that starves
    assert world.want(4) == []
    world.port.leases[1] = 0
    (load,) = world.tick()
    assert isinstance(load, StartLoad)
    assert load.slot == 2


def test_a_starving_wish_takes_what_others_wait_for() -> None:
    world = World(1)
    world.add(1)
    world.add(2)
    world.load(1)
    world.port.waiting[1] = 1
    assert world.want(2) == []
    assert world.tick(SECOND) == []
    assert len(world.tick()) == 1
    assert world.port.evicted == [1]


def test_a_starving_wish_leaves_alone_what_was_published_a_moment_ago() -> None:
    world = World(1)
    for slot in (1, 2):
        world.add(slot)
    world.want(1)
    assert world.want(2) == []
    world.port.waiting[1] = 1
    world.tick(3 * SECOND)
    world.finish()
    assert world.tick() == []
    assert len(world.tick(SECOND)) == 1


def test_a_wish_that_waits_too_long_is_refused() -> None:
    world = World(1)
    world.add(1)
    world.add(2)
    world.load(1)
    world.port.leases[1] = 1
    world.want(2, waiter=4)
    (refusal,) = world.tick(int(WISH_WAIT_S * SECOND))
    assert isinstance(refusal, Refuse)
    assert (refusal.code, refusal.waiters) == ("overloaded", frozenset({4}))
    assert "model-2" in refusal.message
    assert not world.port.is_hungry


@pytest.mark.parametrize("pinned_chunks", [0, 2])
def test_a_version_that_can_never_fit_is_refused_with_limit_and_remedy(pinned_chunks: int) -> None:
    world = World(4)
    if pinned_chunks:
        world.add(1, pinned_chunks, pinned=True)
        world.load(1)
    world.add(2, 5 - pinned_chunks)
    (refusal,) = world.want(2)
    assert isinstance(refusal, Refuse)
    assert refusal.code == "out_of_memory"
    for word in ("model-2", "8.0 MiB", "--device-memory"):
        assert word in refusal.message
    assert ("pin" in refusal.message) == bool(pinned_chunks)


def test_a_queued_wish_is_refused_when_a_pinned_version_takes_the_last_room_for_it() -> None:
    world = World(4)
    world.add(1, 3, pinned=True)
    world.add(2, 2)
    world.want(1)
    assert isinstance(world.want(2)[0], Refuse)


def test_pinned_small_models_keep_whole_chunks_from_large_ones() -> None:
    world = World(4)
    for slot, chunks, pinned in ((1, 0.4, True), (2, 0.5, False), (3, 0.4, True)):
        world.add(slot, chunks, pinned=pinned)
        world.load(slot)
    world.add(4, 3)
    (refusal,) = world.want(4)  # 3.2 chunks of bytes could be free, but only two whole ones
    assert isinstance(refusal, Refuse)
    assert refusal.code == "out_of_memory"
    world.add(5, 2)
    world.load(5)


def test_no_more_loads_than_the_limit_run_at_once_and_the_rest_start_in_order() -> None:
    world = World(16)
    slots = range(LOADS_IN_FLIGHT_MAX + 2)
    for slot in slots:
        world.add(slot)
        world.want(slot)
    assert [load.slot for load in world.loads.values()] == list(slots[:LOADS_IN_FLIGHT_MAX])
    assert not world.port.is_hungry
    world.finish()
    assert [load.slot for load in world.loads.values()] == list(slots[1 : LOADS_IN_FLIGHT_MAX + 1])


def test_every_publish_has_a_greater_generation() -> None:
    world = World(1)
    world.add(1)
    world.add(2)
    world.load(1, 2, 1, 2, 1)
    assert [p.generation for p in world.published if p.slot == 1] == [1, 2, 3]


# --- the look of it -----------------------------------------------------------------------------
def test_loads_in_flight_are_listed_for_a_new_mover() -> None:
    world = World(2)
    world.add(1)
    world.add(2)
    loads = world.want(1) + world.want(2)
    assert world.residency.loads_in_flight() == loads


def test_its_repr_says_what_is_where() -> None:
    world = World(4, host_chunks=2)
    world.add(1)
    world.load(1)
    assert repr(world.residency) == (
        "<Residency 1 versions, 1 in DEVICE (2.0 MiB of 8.0 MiB), 1 in HOST (2.0 MiB of 4.0 MiB), "
        "0 loading, 0 waiting>"
    )


def test_only_victims_that_come_up_are_looked_at() -> None:
    world = World(64)
    for slot in range(65):
        world.add(slot)
    world.load(*range(64))
    for slot in range(10):
        world.use(slot)
    world.want(64)
    assert world.port.evicted == [10]
    assert world.port.looks == 11
    assert world.device.capacity_bytes == 64 * 2 * MIB
