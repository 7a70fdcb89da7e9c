"""Making room: the HOST tier by rule, and the choice of victims as a property."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from residency_world import CHUNK, FakePort, World

from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.device_room import DeviceRoom
from overcommit.runtime.host_room import HostRoom
from overcommit.runtime.parts import Part
from overcommit.runtime.policy import Lru
from overcommit.runtime.residents import StartLoad, State, Terms, Totals, Version
from overcommit.runtime.views import Tier


def test_disk_loads_go_through_host_and_come_back_from_there() -> None:
    world = World(1, host_chunks=2)
    world.add(1)
    world.add(2)
    (load,) = world.want(1)
    assert isinstance(load, StartLoad)
    assert load.host is not None
    world.finish()
    world.load(2)
    view = world.residency.view(1)
    assert view is not None
    assert (view.state, view.tier, view.host_bytes) == (State.HOST, Tier.HOST, CHUNK)
    (load,) = world.want(1)
    assert isinstance(load, StartLoad)
    assert load.source == "host"
    world.finish()
    totals = world.residency.totals()
    assert (totals.loads_from_disk, totals.loads_from_host) == (2, 1)
    assert totals.bytes_loaded == 3 * CHUNK


def test_host_copies_of_what_device_holds_leave_first_and_of_these_the_youngest() -> None:
    world = World(3, host_chunks=4)
    for slot in range(1, 6):
        world.add(slot)
    world.load(1, 2, 3, 4)  # 1 is on HOST alone now; 2, 3 and 4 are in both tiers
    world.load(5)
    assert [slot for slot in range(1, 6) if world.has_host_copy(slot)] == [1, 2, 3, 5]
    assert world.state(2) is State.HOST
    assert world.residency.totals().evictions_host == 1


def test_a_version_that_came_back_from_host_is_the_youngest_there() -> None:
    world = World(2, host_chunks=3)
    for slot in (1, 2, 3, 4):
        world.add(slot)
    world.load(1, 2, 3, 1)  # 1 came back from its host copy; now 3 and 1 are in both tiers
    world.want(4)
    assert not world.has_host_copy(1)


def test_a_host_copy_that_a_load_reads_is_no_victim() -> None:
    world = World(2, host_chunks=1)
    for slot, chunks in ((1, 1), (2, 2), (3, 1)):
        world.add(slot, chunks)
    world.load(1, 2)
    (load,) = world.want(1, waiter=4)
    assert isinstance(load, StartLoad)
    assert load.source == "host"
    world.residency.forget_waiter(4)
    (load,) = world.want(3)
    assert isinstance(load, StartLoad)
    assert (load.source, load.host) == ("disk", None)


def test_a_host_copy_that_a_queued_wish_will_read_is_no_victim() -> None:
    world = World(4, host_chunks=2)
    for slot, chunks in ((1, 2), (2, 3), (3, 1)):
        world.add(slot, chunks)
    world.load(1, 2)  # 2 is larger than HOST, so the copy of 1 stayed
    world.port.leases[2] = 1
    assert world.want(1) == []
    (load,) = world.want(3)
    assert isinstance(load, StartLoad)
    assert (load.source, load.host) == ("disk", None)
    assert world.has_host_copy(1)


def test_a_version_larger_than_host_goes_straight_to_device_and_evicts_nothing_there() -> None:
    world = World(4, host_chunks=1)
    world.add(1)
    world.add(2, 3)
    world.load(1)
    (load,) = world.want(2)
    assert isinstance(load, StartLoad)
    assert load.host is None
    assert world.has_host_copy(1)


def test_a_host_copy_counts_only_when_it_is_complete() -> None:
    world = World(1, host_chunks=1)
    world.add(1)
    world.add(2)
    world.load(1, 2)  # both copies of 1 are gone
    world.want(1)
    view = world.residency.view(1)
    assert view is not None
    assert (view.tier, view.state, view.host_bytes) == (Tier.DISK, State.LOADING, CHUNK)


def test_a_pinned_version_takes_no_host_memory() -> None:
    world = World(2, host_chunks=2)
    world.add(1, pinned=True)
    world.load(1)
    assert not world.has_host_copy(1)


def test_host_hears_of_uses_that_came_after_the_publish() -> None:
    world = World(1, host_chunks=2)
    for slot in (1, 2, 3):
        world.add(slot)
    world.load(1)
    world.use(1)
    world.load(2)  # both are in HOST, 1 on HOST alone
    world.port.last_used_ns[1] = world.now_ns + 1000  # its last request ended late
    world.port.uses[1] += 1
    world.load(1, 3)
    assert world.has_host_copy(1)
    assert not world.has_host_copy(2)


# --- slabs --------------------------------------------------------------------------------------
def _two_slabs() -> World:
    """Sixteen models in two slabs, their ages interleaved, and a wish for a chunk."""
    world = World(2)
    for slot in range(16):
        world.add(slot, 1 / 8)
    world.load(*range(16))
    for slot in range(8):
        world.use(slot)
        world.use(slot + 8)
    world.add(99, 1)
    return world


def test_small_models_of_one_slab_leave_together_where_their_bytes_alone_are_no_chunk() -> None:
    world = _two_slabs()
    assert len(world.want(99)) == 1
    assert len(world.port.evicted) == 8, "all of one slab and none of the other"
    assert len({slot // 8 for slot in world.port.evicted}) == 1


def test_the_slab_in_which_most_of_the_victims_live_is_the_one_that_goes() -> None:
    world = _two_slabs()
    for slot in (*range(7), 8, *range(9, 16), 7):
        world.use(slot)
    assert len(world.want(99)) == 1
    assert sorted(world.port.evicted) == [*range(8)]  # 0 to 6 and 8 by age; 7 is their mate


def test_small_models_that_make_room_for_small_ones_leave_alone() -> None:
    world = World(1)
    for slot in range(9):
        world.add(slot, 1 / 8)
    world.load(*range(8))
    assert len(world.want(8)) == 1
    assert world.port.evicted == [0]


def test_the_rest_of_a_slab_leaves_where_there_are_bytes_but_no_chunk() -> None:
    world = _two_slabs()
    for slot in (4, 5, 6, 7, 12, 13, 14, 15):
        world.remove(slot)
    world.port.evicted.clear()
    assert len(world.want(99)) == 1
    assert sorted(world.port.evicted) == [0, 1, 2, 3]


def test_a_leased_mate_keeps_its_slab_and_the_other_one_goes() -> None:
    world = _two_slabs()
    world.port.leases[7] = 1
    assert len(world.want(99)) == 1
    assert 7 not in world.port.evicted
    assert all(world.state(slot) is not State.DEVICE for slot in range(8, 16))


# --- properties ---------------------------------------------------------------------------------
def _version(policy: Lru, slot: int, chunks: int, state: State) -> Version:
    policy.on_add(slot, chunks * CHUNK, 0)
    policy.on_use(slot, 1, slot)
    parts = (Part("", chunks * CHUNK, 1),)
    return Version(slot, f"model-{slot}", chunks * CHUNK, Terms(), 1, parts, state)


def _fill(room: DeviceRoom | HostRoom, policy: Lru, held: list[tuple[int, State]]) -> list[Version]:
    versions = []
    for slot, (chunks, state) in enumerate(held):
        if chunks * CHUNK > room.allocator.free_bytes:
            break
        version = _version(policy, slot, chunks, state)
        assert room.try_place(version, version.parts, 0)
        if isinstance(room, HostRoom) and state is State.DEVICE:
            room.on_published(version, 0)
        versions.append(version)
    return versions


HELD = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([State.DEVICE, State.HOST])))


@given(held=HELD, loading=st.sets(st.integers(0, 12)), chunks=st.integers(1, 10))
def test_host_gives_up_the_only_copy_only_when_the_others_are_not_enough(
    held: list[tuple[int, State]], loading: set[int], chunks: int
) -> None:
    policy = Lru()
    port = FakePort()
    device = DeviceRoom(ChunkAllocator(0), policy, Totals(), port)
    room = HostRoom(ChunkAllocator(10 * CHUNK), policy, Totals(), port, device)
    held = [(n, State.LOADING if i in loading else state) for i, (n, state) in enumerate(held)]
    versions = _fill(room, policy, held)
    free = room.allocator.free_bytes
    wish = _version(policy, 99, chunks, State.DISK)
    placed = room.try_place(wish, wish.parts, 1)
    gone = [version for version in versions if not version.host]
    cheap = sum(v.nbytes for v, (_, s) in zip(versions, held, strict=False) if s is State.DEVICE)
    idle = sum(
        v.nbytes for v, (_, s) in zip(versions, held, strict=False) if s is not State.LOADING
    )
    assert not any(version.state is State.LOADING for version in gone)
    assert placed == (wish.nbytes <= free + idle)
    if not placed:
        assert not gone
    if any(version.state is State.DISK for version in gone):
        assert free + cheap < wish.nbytes
    surplus = free + sum(version.nbytes for version in gone) - wish.nbytes
    assert all(version.nbytes > surplus for version in gone)


@given(
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=10),
    leased=st.sets(st.integers(0, 9)),
    needed=st.integers(1, 10),
)
def test_device_evicts_a_minimal_set_of_what_is_not_leased_or_nothing(
    chunks: list[int], leased: set[int], needed: int
) -> None:
    policy, port = Lru(), FakePort()
    room = DeviceRoom(ChunkAllocator(10 * CHUNK), policy, Totals(), port)
    versions = _fill(room, policy, [(n, State.DEVICE) for n in chunks])
    for version in versions:
        port.words[version.slot] = (2, 1)
        port.leases[version.slot] = int(version.slot in leased)
    free = room.allocator.free_bytes
    idle = sum(version.nbytes for version in versions if version.slot not in leased)
    wish = _version(policy, 99, needed, State.DISK)
    placed = room.try_place(wish, wish.parts, 1)
    gone = [version for version in versions if not version.device]
    assert placed == (wish.nbytes <= free + idle)
    assert not leased & {version.slot for version in gone}
    surplus = free + sum(version.nbytes for version in gone) - wish.nbytes
    assert placed or not gone
    assert all(version.nbytes > surplus for version in gone)
