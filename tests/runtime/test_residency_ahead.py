"""Prefetches in residency: to HOST and to DEVICE, promoted, cancelled, and whom they may displace."""

from __future__ import annotations

import pytest
from residency_world import SECOND, World

from overcommit.runtime._shm import ABSENT, LOADING, RESIDENT
from overcommit.runtime.mover_messages import CANCELLED
from overcommit.runtime.parts import PartInfo
from overcommit.runtime.residents import NOBODY, State
from overcommit.runtime.views import Tier

SHARED = PartInfo("trunk", 2 * 1024 * 1024)


def test_a_prefetch_to_host_reads_the_disk_and_leaves_device_alone() -> None:
    world = World(1, host_chunks=1)
    world.add(1)
    (load,) = world.prefetch(1, Tier.HOST)
    assert (load.source, load.device, load.urgency) == ("disk", None, "prefetch")
    assert world.port.words.get(1, (ABSENT, 0))[0] == ABSENT
    world.finish()
    assert world.state(1) is State.HOST
    assert world.device.used_bytes == 0
    (load,) = world.want(1)
    assert (load.source, load.urgency) == ("host", "foreground")


def test_a_prefetch_to_device_publishes_a_version_for_nobody_and_the_next_wish_attaches() -> None:
    world = World(1)
    world.add(1)
    world.prefetch(1, Tier.DEVICE)
    assert world.port.words[1][0] == LOADING
    world.finish()
    assert world.port.words[1][0] == RESIDENT
    assert world.published[0].waiters == frozenset()
    world.want(1, 3)
    assert world.published[1].waiters == {3}
    assert world.residency.totals().attaches == 1


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DEVICE])
def test_who_wants_what_is_on_its_way_promotes_it_once(tier: Tier) -> None:
    world = World(1, host_chunks=1)
    world.add(1)
    world.prefetch(1, tier)
    world.want(1, 0)
    world.want(1, 1)
    assert len(world.promoted) == 1
    while world.loads:
        world.finish()
    assert world.published[0].waiters == {0, 1}
    assert world.residency.totals().loads_from_disk == (1 if tier is Tier.DEVICE else 0)


def test_a_wish_that_needs_the_room_of_a_prefetch_cancels_it_and_gets_it() -> None:
    world = World(1)
    world.add(1)
    world.add(2)
    world.prefetch(1, Tier.DEVICE)
    world.want(2)
    world.tick()
    assert len(world.cancelled) == 1, "said once"
    world.finish(ok=False, message=CANCELLED)
    assert world.state(1) is State.DISK
    assert world.state(2) is State.LOADING
    assert world.refused == []
    world.finish()
    world.load(1)


def test_what_is_wanted_after_its_prefetch_was_cancelled_is_loaded_again() -> None:
    world = World(2)
    world.add(1)
    world.add(2, 2)
    world.prefetch(1, Tier.DEVICE)
    world.want(2)
    world.want(1)
    assert len(world.cancelled) == 1
    assert world.promoted == []
    world.finish(ok=False, message=CANCELLED)
    while world.loads:
        world.finish()
        world.tick()
    assert [publish.slot for publish in world.published] == [2, 1]
    assert world.refused == []


def test_a_prefetch_that_fails_holds_its_version_off_and_refuses_nobody() -> None:
    world = World(1)
    world.add(1)
    world.prefetch(1, Tier.DEVICE)
    world.finish(ok=False, message="bad sector")
    assert world.refused == []
    assert world.prefetch(1, Tier.DEVICE) == []
    world.now_ns += SECOND
    assert world.prefetch(1, Tier.DEVICE) != []


def test_nothing_is_prefetched_while_a_request_waits_or_another_prefetch_is_under_way() -> None:
    world = World(3, host_chunks=3)
    for slot in (1, 2, 3):
        world.add(slot)
    world.want(1)
    assert world.prefetch(2, Tier.DEVICE) == []
    assert world.prefetch(2, Tier.HOST) == []
    world.finish()
    assert world.prefetch(2, Tier.HOST) != []
    assert world.prefetch(3, Tier.DEVICE) == []


def test_a_prefetch_displaces_only_whom_its_judge_lets_go() -> None:
    world = World(2)
    for slot in (1, 2, 3):
        world.add(slot)
    world.load(1, 2)
    assert world.prefetch(3, Tier.DEVICE, lambda version: False) == []
    assert world.port.evicted == []
    world.prefetch(3, Tier.DEVICE, lambda version: version.slot == 2)
    assert world.port.evicted == [2], "1 is the least recently used"


def test_a_prefetch_never_displaces_what_is_leased_waited_for_or_pinned() -> None:
    world = World(3)
    for slot in (1, 2, 3, 4):
        world.add(slot, pinned=slot == 3)
    world.load(1, 2, 3)
    world.port.leases[1] = 1
    world.port.waiting[2] = 1
    assert world.prefetch(4, Tier.DEVICE) == []
    world.now_ns += 60 * SECOND
    assert world.prefetch(4, Tier.DEVICE) == []
    assert world.port.evicted == []


def test_a_prefetch_to_host_spares_copies_that_its_judge_spares() -> None:
    world = World(1, host_chunks=1)
    for slot in (1, 2, 3):
        world.add(slot)
    world.load(1, 2)
    assert world.has_host_copy(2)
    assert world.prefetch(3, Tier.HOST, lambda version: False) == []
    assert world.prefetch(3, Tier.HOST) != []


def test_a_prefetch_to_device_takes_nobodys_last_host_copy() -> None:
    world = World(1, host_chunks=1)
    for slot in (1, 2, 3):
        world.add(slot)
    world.prefetch(1, Tier.HOST)
    world.finish()
    world.prefetch(2, Tier.DEVICE)
    world.finish()
    assert world.state(1) is State.HOST
    assert not world.has_host_copy(2)


def test_a_part_that_a_prefetch_reads_is_promoted_by_another_version_that_shares_it() -> None:
    world = World(4, host_chunks=4)
    world.add(1, parts=[SHARED])
    world.add(2, parts=[SHARED])
    world.prefetch(1, Tier.HOST)
    started = len(world.loads)
    world.want(2)
    assert len(world.promoted) == 1
    assert len(world.loads) == started + 1, "only what is its own"
    while world.loads:
        world.finish()
    assert world.state(2) is State.DEVICE


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DEVICE])
def test_a_version_that_is_removed_during_its_prefetch_leaves_nothing(tier: Tier) -> None:
    world = World(1, host_chunks=1)
    world.add(1)
    world.prefetch(1, tier)
    world.remove(1)
    world.finish()
    world.tick()
    assert world.device.used_bytes == 0
    assert world.host is not None
    assert world.host.used_bytes == 0


def test_a_pinned_version_that_is_prefetched_is_published_once() -> None:
    world = World(1)
    world.add(1, pinned=True)
    world.prefetch(1, Tier.DEVICE)
    world.want(1, NOBODY)
    world.finish()
    assert len(world.published) == 1
