"""How wishes end other than well: failures, waiters that go, versions that are removed."""

from __future__ import annotations

import pytest
from residency_world import CHUNK, MS, SECOND, World

from overcommit.runtime._shm import ABSENT
from overcommit.runtime.config import LOAD_BACKOFF_S
from overcommit.runtime.parts import PartInfo
from overcommit.runtime.residents import NOBODY, Publish, Refuse, StartLoad, State
from overcommit.runtime.views import Tier


# --- failures -----------------------------------------------------------------------------------
def test_a_failed_load_is_refused_backs_off_and_is_tried_again_after_it() -> None:
    world = World(4, host_chunks=4)
    world.add(1)
    for backoff_s in (*LOAD_BACKOFF_S, LOAD_BACKOFF_S[-1]):
        world.want(1, waiter=2)
        (refusal,) = world.finish(ok=False, message="digest of piece 3 is wrong")
        assert isinstance(refusal, Refuse)
        assert (refusal.code, refusal.waiters) == ("unavailable", frozenset({2}))
        assert refusal.retry_after_s == backoff_s
        for words in ("model-1", "digest of piece 3 is wrong", f"{backoff_s:.1f} s"):
            assert words in refusal.message
        assert world.device.used_bytes == 0
        assert world.state(1) is State.DISK
        assert not world.has_host_copy(1)
        world.now_ns += int(backoff_s * SECOND)
    world.load(1)
    view = world.residency.view(1)
    assert view is not None
    assert view.last_error == ""


def test_a_wish_during_the_backoff_is_refused_at_once_with_the_time_that_is_left() -> None:
    world = World(4)
    world.add(1)
    world.want(1)
    world.finish(ok=False, message="no such file")
    world.now_ns += 200 * MS
    (refusal,) = world.want(1, waiter=9)
    assert isinstance(refusal, Refuse)
    assert refusal.waiters == {9}
    assert refusal.retry_after_s == pytest.approx(0.3)
    assert "no such file" in refusal.message
    world.now_ns += 300 * MS
    assert isinstance(world.want(1)[0], StartLoad)


def test_a_success_ends_the_row_of_failures() -> None:
    world = World(1)
    world.add(1)
    world.add(2)
    world.want(1)
    world.finish(ok=False)
    world.now_ns += SECOND
    world.load(1, 2)
    world.want(1)
    (refusal, *_) = world.finish(ok=False)
    assert isinstance(refusal, Refuse)
    assert refusal.retry_after_s == LOAD_BACKOFF_S[0]


def test_a_host_copy_that_could_not_be_copied_is_read_from_disk_the_next_time() -> None:
    world = World(1, host_chunks=2)
    world.add(1)
    world.add(2)
    world.load(1, 2)
    (load,) = world.want(1)
    assert isinstance(load, StartLoad)
    assert load.source == "host"
    world.finish(ok=False)
    world.now_ns += SECOND
    (load,) = world.want(1)
    assert isinstance(load, StartLoad)
    assert load.source == "disk"


def test_a_load_that_is_reported_twice_is_ignored() -> None:
    world = World(1)
    world.add(1)
    world.want(1)
    (load,) = world.residency.loads_in_flight()
    world.finish(load.job)
    assert world.finish(load.job, ok=False) == []
    assert world.state(1) is State.DEVICE


def test_other_models_load_while_one_backs_off() -> None:
    world = World(1)
    world.add(1)
    world.add(2)
    world.want(1)
    world.want(2)
    actions = world.finish(ok=False)
    assert [type(action) for action in actions] == [Refuse, StartLoad]


# --- waiters ------------------------------------------------------------------------------------
def test_nobody_is_a_waiter_that_gets_no_answer() -> None:
    world = World(1)
    world.add(1, pinned=True)
    assert isinstance(world.want(1, NOBODY)[0], StartLoad)
    (publish,) = world.finish()
    assert isinstance(publish, Publish)
    assert publish.waiters == frozenset()
    assert world.want(1, NOBODY) == []


def test_a_pinned_version_whose_load_failed_is_tried_again_by_itself() -> None:
    world = World(1)
    world.add(1, pinned=True)
    world.want(1, NOBODY)
    world.finish(ok=False, message="the disk is gone")
    assert world.residency.next_tick_ns() == SECOND + int(LOAD_BACKOFF_S[0] * SECOND)
    assert isinstance(world.tick(int(LOAD_BACKOFF_S[0] * SECOND))[0], StartLoad)


def test_a_wish_is_given_up_when_all_who_wanted_it_are_gone() -> None:
    world = World(1)
    world.add(1)
    world.add(2)
    world.load(1)
    world.port.leases[1] = 1
    world.want(2, waiter=5)
    world.want(2, waiter=6)
    world.residency.forget_waiter(5)
    assert world.port.is_hungry
    world.residency.forget_waiter(6)
    assert not world.port.is_hungry
    world.port.leases[1] = 0
    assert world.tick() == []


def test_a_load_goes_on_without_those_who_are_gone() -> None:
    world = World(1)
    world.add(1)
    world.want(1, waiter=5)
    world.residency.forget_waiter(5)
    (publish,) = world.finish()
    assert isinstance(publish, Publish)
    assert publish.waiters == frozenset()


def test_a_wish_for_an_unknown_slot_is_refused() -> None:
    world = World(1)
    (refusal,) = world.want(3, waiter=1)
    assert isinstance(refusal, Refuse)
    assert (refusal.code, refusal.waiters) == ("unavailable", frozenset({1}))
    assert world.residency.view(3) is None


# --- removal ------------------------------------------------------------------------------------
def test_removing_an_unknown_version_does_nothing() -> None:
    world = World(1)
    assert world.remove(4) == []


def test_waiters_of_a_removed_version_are_refused_at_once() -> None:
    world = World(1)
    world.add(1)
    world.want(1, waiter=2)
    (refusal,) = world.remove(1)
    assert isinstance(refusal, Refuse)
    assert (refusal.code, refusal.waiters) == ("unavailable", frozenset({2}))
    assert world.device.used_bytes > 0  # the mover still writes there
    assert world.finish() == []
    assert world.device.used_bytes == 0


def test_a_leased_version_leaves_when_the_lease_drops() -> None:
    world = World(1, host_chunks=1)
    world.add(1)
    world.load(1)
    world.port.leases[1] = 1
    world.remove(1)
    assert world.port.is_hungry
    assert world.device.used_bytes == CHUNK
    world.port.leases[1] = 0
    world.tick()
    assert world.device.used_bytes == 0
    assert world.port.words[1] == (ABSENT, 1)
    assert world.residency.next_tick_ns() is None


def test_what_a_removal_frees_serves_the_next_wish() -> None:
    world = World(1)
    world.add(1)
    world.add(2)
    world.want(1)
    assert world.want(2) == []
    world.remove(1)
    (load,) = world.finish()
    assert isinstance(load, StartLoad)
    assert load.slot == 2


def test_a_new_version_in_the_slot_of_a_leaving_one_waits_for_it_and_goes_on_counting() -> None:
    world = World(4)
    world.add(1)
    world.load(1)
    world.port.leases[1] = 1
    world.remove(1)
    world.add(1, 2)
    assert world.want(1, waiter=3) == []
    world.add(2)
    assert isinstance(world.want(2)[0], StartLoad)  # holds up nobody else
    world.port.leases[1] = 0
    (load,) = world.tick()
    assert isinstance(load, StartLoad)
    world.finish(load.job)
    assert world.published[-1].generation == 2


def test_removing_twice_while_the_first_is_still_leased_loses_no_bytes() -> None:
    world = World(4)
    world.add(1)
    world.load(1)
    world.port.leases[1] = 1
    world.remove(1)
    world.add(1, 2)
    world.want(1)
    world.remove(1)
    world.port.leases[1] = 0
    world.tick()
    assert world.device.used_bytes == 0
    assert not world.port.is_hungry


def test_adding_a_known_version_changes_its_pin_and_priority_only() -> None:
    world = World(2)
    world.add(1)
    world.add(2)
    world.add(3)
    world.load(1, 2)
    world.add(1, pinned=True)
    world.want(3)
    assert world.port.evicted == [2]


# --- what the mover has published -----------------------------------------------------------------
def test_a_load_publishes_if_it_brings_all_that_is_missing_and_somebody_waits() -> None:
    world = World(8, host_chunks=8)
    trunk = PartInfo("a", 2 * CHUNK)
    world.add(1)
    world.add(2, parts=[trunk])
    world.add(3, parts=[trunk])
    world.want(1, waiter=4)
    (load,) = world.loads.values()
    assert (load.publishes, load.waiters) == (1, frozenset({4}))
    world.finish()
    world.want(2)
    assert [load.publishes for load in world.loads.values()] == [0, 0], "two are on their way"
    world.finish()
    world.finish()
    world.want(3)
    assert [load.publishes for load in world.loads.values()] == [1], "the trunk is there"
    world.finish()
    world.add(4)
    world.prefetch(4, Tier.DEVICE)
    assert [load.publishes for load in world.loads.values()] == [0]


def test_what_was_published_and_leased_before_residency_heard_of_it_keeps_its_bytes() -> None:
    world = World(4)
    world.add(1)
    world.want(1)
    (job,) = world.loads
    world.publish_early(job)
    world.port.leases[1] += 1
    world.remove(1)
    world.finish(job)
    assert world.device.used_bytes == CHUNK
    world.port.leases[1] = 0
    world.tick()
    assert world.device.used_bytes == 0
    assert world.port.words[1] == (ABSENT, 1)


def test_no_two_tries_share_a_generation() -> None:
    world = World(4)
    world.add(1)
    world.want(1)
    (failed,) = world.loads.values()
    world.finish(ok=False)
    world.now_ns += SECOND
    world.want(1)
    (second,) = world.loads.values()
    world.remove(1)
    world.add(1)
    world.finish()
    world.want(1)
    (third,) = world.loads.values()
    assert failed.publishes < second.publishes < third.publishes
    world.finish()
    assert world.published[-1].generation == third.publishes
