"""Versions that share parts, by rule: what is loaded, placed, chosen and given back."""

from __future__ import annotations

from residency_world import CHUNK, SECOND, World

from overcommit.runtime.config import PAGE_BYTES
from overcommit.runtime.parts import PartInfo
from overcommit.runtime.residents import Publish, Refuse, StartLoad, State
from overcommit.runtime.views import Tier

TRUNK = PartInfo("trunk", 4 * CHUNK)
HEAD = 1 / 512  # of a chunk: one page


def world_of(heads: int, device: int = 8, host: int = 0, head: float = HEAD) -> World:
    world = World(device, host)
    for slot in range(heads):
        world.add(slot, head, parts=[TRUNK])
    return world


def started(actions: list[object]) -> list[tuple[int, str, str]]:
    return [(a.slot, a.digest, a.source) for a in actions if isinstance(a, StartLoad)]


def test_fifty_heads_take_the_trunk_once_in_both_tiers() -> None:
    world = world_of(50, host=8)
    world.load(*range(50))
    expected = TRUNK.nbytes + 50 * PAGE_BYTES
    assert world.host is not None
    assert (world.device.used_bytes, world.host.used_bytes) == (expected, expected)
    assert world.residency.totals().bytes_loaded == expected
    assert world.residency.saved_bytes() == (49 * TRUNK.nbytes,) * 2
    view = world.residency.view(7)
    assert view is not None
    assert (view.device_bytes, view.device_shared_bytes) == (
        TRUNK.nbytes + PAGE_BYTES,
        TRUNK.nbytes,
    )


def test_a_part_that_is_on_its_way_is_waited_for_and_not_loaded_twice() -> None:
    world = world_of(2, host=8)
    assert started(world.want(0)) == [(0, "trunk", "disk"), (0, "", "disk")]
    assert started(world.want(1)) == [(1, "", "disk")]
    trunk, head, other = world.loads
    assert world.finish(other) == []
    (publish,) = world.finish(trunk)
    assert isinstance(publish, Publish)
    assert publish.slot == 1
    (publish,) = world.finish(head)
    assert isinstance(publish, Publish)
    assert (publish.slot, publish.shared) == (0, (0,))


def test_a_failed_head_fails_its_own_version_and_the_trunk_goes_on_for_the_others() -> None:
    world = world_of(2)
    world.want(0, waiter=1)
    world.want(1, waiter=2)
    trunk, head, other = world.loads
    (refusal,) = world.finish(head, ok=False, message="bad sector")
    assert isinstance(refusal, Refuse)
    assert (refusal.slot, refusal.waiters) == (0, {1})
    world.finish(other)
    (publish,) = world.finish(trunk)
    assert isinstance(publish, Publish)
    assert (publish.slot, publish.waiters) == (1, {2})


def test_a_failed_trunk_fails_all_who_wait_for_it_and_nobody_else() -> None:
    world = world_of(2)
    world.add(9)
    for slot in (0, 1, 9):
        world.want(slot)
    trunk = next(iter(world.loads))
    refusals = world.finish(trunk, ok=False)
    assert [type(action) for action in refusals] == [Refuse, Refuse]
    while world.loads:
        world.finish()
    assert world.state(9) is State.DEVICE
    assert world.device.used_bytes == CHUNK, "what nobody holds is given back when its load ends"


def test_a_trunk_that_nobody_wants_any_more_is_kept_until_its_load_ends_and_may_be_joined() -> None:
    world = world_of(2)
    world.want(0)
    trunk, head = world.loads
    world.finish(head, ok=False)
    assert world.device.used_bytes == TRUNK.nbytes
    assert started(world.want(1)) == [(1, "", "disk")]
    world.finish(trunk)
    world.finish()
    assert world.state(1) is State.DEVICE


def test_evicting_a_head_frees_the_head_alone_and_it_comes_back_alone() -> None:
    world = world_of(3, device=6, host=16, head=1)  # the trunk and two heads
    world.load(0, 1)
    actions = world.want(2)
    assert world.port.evicted == [0]
    assert started(actions) == [(2, "", "disk")]
    while world.loads:
        world.finish()
    assert started(world.want(0)) == [(0, "", "host")]


def test_the_trunk_leaves_with_the_last_of_its_heads() -> None:
    world = world_of(3, device=7, head=1)
    world.add(9, 3)
    world.add(10, 6)
    world.load(0, 1, 2)
    world.load(9)
    assert sorted(world.port.evicted) == [0, 1, 2], "two heads free too little, the trunk is needed"
    world.load(10)
    assert world.device.used_bytes == 6 * CHUNK


def test_no_more_heads_leave_than_free_what_is_needed() -> None:
    world = world_of(3, device=7, head=1)
    world.add(9, 1)
    world.load(0, 1, 2)
    world.load(9)
    assert world.port.evicted == [0]


def test_a_wish_that_lacks_its_head_alone_takes_no_victim_that_holds_its_trunk_for_it() -> None:
    world = world_of(2, device=5, head=1)
    world.load(0)
    assert started(world.want(1)) == [(1, "", "disk")], "the trunk stays though its holder left"
    assert world.port.evicted == [0]


def test_a_leased_head_keeps_the_trunk() -> None:
    world = world_of(2, device=6, head=1)
    world.add(9, 4)
    world.load(0, 1)
    world.port.leases[0] = 1
    assert world.want(9) == []
    assert world.device.used_bytes == 6 * CHUNK, "evicting the other would not have been enough"


def test_what_a_version_shares_with_pinned_ones_counts_once_for_whether_it_can_ever_fit() -> None:
    world = World(8)
    world.add(0, 2, pinned=True, parts=[TRUNK])
    world.add(1, 2, parts=[TRUNK])
    world.add(2, 3, parts=[TRUNK])
    world.load(0, 1)
    (refusal, *_) = world.want(2)
    assert isinstance(refusal, Refuse)
    assert refusal.code == "out_of_memory"


def test_a_version_all_of_whose_parts_are_there_is_published_at_once() -> None:
    world = World(8)
    for slot in (0, 1):
        world.add(slot, 0, parts=[TRUNK])
    world.load(0)
    (publish,) = world.want(1, waiter=3)
    assert isinstance(publish, Publish)
    assert (publish.waiters, publish.shared) == ({3}, (0,))


def test_a_part_that_comes_twice_in_a_version_lies_once_and_is_mapped_twice() -> None:
    world = World(8)
    world.add(0, 0, parts=[TRUNK, TRUNK])
    (load,) = world.want(0)
    (publish,) = world.finish()
    assert isinstance(load, StartLoad)
    assert isinstance(publish, Publish)
    assert load.device is not None
    assert publish.extents == (*load.device, *load.device)
    assert publish.shared == (0, 1)
    assert world.device.used_bytes == TRUNK.nbytes


def test_what_device_has_and_host_has_not_is_not_read_again_for_host() -> None:
    world = World(16, host_chunks=3)  # too small for the trunk
    for slot in (0, 1):
        world.add(slot, 1, parts=[TRUNK])
    world.load(0)
    (load,) = world.want(1)
    assert isinstance(load, StartLoad)
    assert (load.digest, load.host is not None) == ("", True)
    world.finish()
    assert world.host is not None
    assert world.host.used_bytes == CHUNK


def test_a_version_counts_as_on_host_if_host_and_device_have_all_its_parts() -> None:
    world = world_of(2, device=6, host=16, head=1)
    world.add(9, 1)
    world.load(0, 1)
    world.load(9)
    assert world.port.evicted == [0]
    view = world.residency.view(0)
    assert view is not None
    assert (view.state, view.tier) == (State.HOST, Tier.HOST)


def test_a_removed_version_leaves_the_trunk_to_the_others() -> None:
    world = world_of(2, host=8)
    world.load(0, 1)
    world.remove(0)
    assert world.host is not None
    assert world.device.used_bytes == world.host.used_bytes == TRUNK.nbytes + PAGE_BYTES
    world.remove(1)
    assert (world.device.used_bytes, world.host.used_bytes) == (0, 0)


def test_a_version_that_was_removed_while_loading_hands_the_trunk_on() -> None:
    world = world_of(2)
    world.want(0)
    world.want(1)
    world.remove(0)
    while world.loads:
        world.finish()
    assert world.state(1) is State.DEVICE
    assert world.device.used_bytes == TRUNK.nbytes + PAGE_BYTES


def test_a_trunk_that_could_not_be_copied_is_not_trusted_on_host() -> None:
    world = world_of(1, device=5, host=16)
    world.add(9, 5)
    world.load(0)
    world.load(9)
    assert [source for _, _, source in started(world.want(0))] == ["host", "host"]
    world.finish(ok=False)
    world.finish()
    world.now_ns += SECOND
    assert [source for _, _, source in started(world.want(0))] == ["disk", "disk"]


def test_a_prefetch_to_host_reads_no_part_that_device_has() -> None:
    world = World(16, host_chunks=12)
    world.add(0, 1, pinned=True, parts=[TRUNK])  # pinned: takes nothing in HOST
    world.add(1, 1, parts=[TRUNK])
    world.load(0)
    assert started(world.prefetch(1, Tier.HOST, lambda victim: True)) == [(1, "", "disk")]
    world.finish()
    view = world.residency.view(1)
    assert view is not None
    assert (view.state, view.tier) == (State.HOST, Tier.HOST)
