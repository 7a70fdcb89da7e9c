"""Copies from DEVICE to HOST: who gets one, when, at whose cost, and what becomes of it."""

from __future__ import annotations

import random

import pytest
from residency_world import CHUNK, MS, SECOND, World

from overcommit.runtime import demotion
from overcommit.runtime.config import MIB
from overcommit.runtime.mover_messages import CANCELLED
from overcommit.runtime.parts import PartInfo
from overcommit.runtime.residents import StartLoad, State


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of DEVICE is to be ready to leave, and it need not be full."""
    monkeypatch.setattr(demotion, "DEMOTE_FREE_SHARE", 1.0)
    monkeypatch.setattr(demotion, "DEMOTE_SHARE", 1.0)


class Steady:
    """What loads of any size cost."""

    is_known = True

    def __init__(self, cost_ns: float) -> None:
        self._cost_ns = cost_ns

    def of(self, size: float) -> float:
        return self._cost_ns

    def note(self, size: float, cost_ns: float) -> None:
        """It stays as it is."""


def measured(world: World, disk_ns: float = 9 * MS, host_ns: float = 1 * MS) -> World:
    """Loads take so long, from either source."""
    channels = world.residency.forecast.channels
    channels["disk"].pace = Steady(disk_ns)  # type: ignore[assignment]
    channels["host"].pace = Steady(host_ns)  # type: ignore[assignment]
    return world


def full(device: int = 4, host: int = 2) -> World:
    """So many versions on DEVICE, the last ones with a copy on HOST; nothing was measured."""
    world = World(device, host)
    for slot in range(device + 2):
        world.add(slot)
    world.load(*range(device))
    return world


def saves(world: World) -> list[StartLoad]:
    return [load for load in world.loads.values() if load.source == "device"]


def test_who_leaves_next_is_copied_in_place_of_who_stays_longest() -> None:
    world = full()
    before = {slot for slot in range(4) if world.has_host_copy(slot)}
    assert 1 not in before
    measured(world).tick(SECOND)
    (save,) = saves(world)
    assert save.slot == min({0, 1, 2, 3} - before)
    assert save.urgency == "prefetch"
    world.finish(save.job)
    assert world.has_host_copy(save.slot)
    assert world.state(save.slot) is State.DEVICE


def test_what_was_copied_is_not_read_from_disk_again() -> None:
    world = World(1, 2)
    world.add(0)
    world.add(1)
    world.load(0)
    world.residency._on_host.drop(world.residency._versions[0])  # type: ignore[union-attr]
    measured(world).tick(SECOND)
    world.finish()
    world.load(1)
    assert (world.state(0), world.has_host_copy(0)) == (State.HOST, True)
    world.want(0)
    assert [load.source for load in world.loads.values()] == ["host"]


def test_nothing_is_copied_where_a_copy_saves_little() -> None:
    assert not measured(full(), disk_ns=1.9 * MS).tick(SECOND)


def test_nothing_is_copied_before_both_were_measured() -> None:
    assert not full().tick(SECOND)


def test_nothing_is_copied_while_much_of_device_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demotion, "DEMOTE_FREE_SHARE", 0.05)
    world = World(8, 1)
    for slot in range(4):
        world.add(slot)
    world.load(0, 1, 2, 3)
    assert not measured(world).tick(SECOND)


def test_only_those_that_leave_next_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    world = full(host=1)
    monkeypatch.setattr(demotion, "DEMOTE_SHARE", 0.25)
    measured(world).tick(SECOND)
    (save,) = saves(world)
    world.finish(save.job)
    assert save.slot == 0
    assert not world.tick(100 * SECOND)
    assert world.has_host_copy(0)


def test_there_is_a_pause_after_each_copy() -> None:
    world = measured(full(4, 4))
    world.residency._on_host.drop(world.residency._versions[0])  # type: ignore[union-attr]
    world.residency._on_host.drop(world.residency._versions[1])  # type: ignore[union-attr]
    world.tick(SECOND)
    (save,) = saves(world)
    world.now_ns += 10 * MS
    world.finish(save.job)
    assert not world.tick(39 * MS)
    assert [load.slot for load in world.tick(2 * MS) if isinstance(load, StartLoad)] == [1]


def copying(host: int) -> tuple[World, StartLoad]:
    """A version that fills DEVICE is copied to a HOST with room for so many; another is known."""
    world = World(1, host)
    world.add(0)
    world.add(1)
    world.load(0)
    world.residency._on_host.drop(world.residency._versions[0])  # type: ignore[union-attr]
    measured(world).tick(SECOND)
    (save,) = saves(world)
    return world, save


def test_a_wish_that_needs_the_bytes_has_the_copy_stopped() -> None:
    world, save = copying(1)
    world.want(1)
    assert world.cancelled == [save.job]
    world.finish(save.job, ok=False, message=CANCELLED)
    assert world.state(1) is State.LOADING
    assert (world.state(0), world.has_host_copy(0)) == (State.DISK, False)


def test_a_copy_that_ends_before_it_was_stopped_counts() -> None:
    world, save = copying(2)
    world.want(1)
    world.finish(save.job)  # it was over when the word came
    assert world.state(1) is State.LOADING
    assert (world.state(0), world.has_host_copy(0)) == (State.HOST, True)


def test_a_copy_of_a_device_that_was_lost_is_worth_nothing() -> None:
    world = full(2, 2)
    world.residency._on_host.drop(world.residency._versions[0])  # type: ignore[union-attr]
    measured(world).tick(SECOND)
    (save,) = saves(world)
    world.take(world.residency.lose_device(world.now_ns))
    world.finish(save.job)
    assert (world.state(0), world.has_host_copy(0)) == (State.DISK, False)


def test_packed_parts_are_left_out() -> None:
    world = World(1, 1)
    world.add(0, packed_bytes=MIB)
    world.load(0)
    world.residency._on_host.drop(world.residency._versions[0])  # type: ignore[union-attr]
    assert not measured(world).tick(SECOND)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_the_books_balance(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`World` checks after each event that no bytes are lost, shared or read before they are there."""
    monkeypatch.setattr(demotion, "DEMOTE_PAUSES", 0)
    monkeypatch.setattr(demotion, "DEMOTE_REST_NS", 0)
    choice = random.Random(seed)
    world = measured(World(6, choice.choice((2, 3, 4))))
    trunk = PartInfo("trunk", 2 * CHUNK)
    head = PartInfo("head", CHUNK)
    images = ((), (), (), (trunk,), (trunk,), (head, trunk))
    for slot, parts in enumerate(images):
        world.add(slot, choice.choice((1 / 512, 1, 2)), parts=parts)
    begun = 0
    for _ in range(600):
        what, slot = choice.random(), choice.randrange(len(images))
        before = {load.job for load in saves(world)}
        if what < 0.3:
            world.want(slot)
        elif what < 0.65 and world.loads:
            job = choice.choice(list(world.loads))
            is_cancelled = job in world.cancelled and choice.random() < 0.7
            ok = not is_cancelled and choice.random() < 0.95
            world.finish(job, ok=ok, message=CANCELLED if is_cancelled else "bad sector")
        elif what < 0.67:
            world.take(world.residency.lose_device(world.now_ns))
        elif what < 0.69:
            world.remove(slot)
            world.add(slot, 1, parts=images[slot])
        elif what < 0.71:
            world.residency.release(slot, world.now_ns)
        elif what < 0.8 and world.state(slot) is State.DEVICE:
            world.use(slot)
        else:
            world.tick(choice.choice((MS, 50 * MS, 3 * SECOND)))
        begun += len({load.job for load in saves(world)} - before)
    assert begun > 5, "nothing was tried here"
    while world.loads:
        world.finish()
    for slot in range(len(images)):
        world.remove(slot)
    while world.loads:
        world.finish()
    world.tick()
    assert world.device.used_bytes == 0
    assert world.host is not None
    assert world.host.used_bytes == 0
