"""Every transition that residency's docstring lists, walked."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from residency_world import World

from overcommit.runtime import residency as module
from overcommit.runtime.mover_messages import CANCELLED
from overcommit.runtime.residents import State
from overcommit.runtime.views import Tier


def _add() -> World:
    world = World(1)
    world.add(1)
    return world


def _disk_to_loading() -> World:
    world = _add()
    world.want(1)
    return world


def _on_device() -> World:
    world = _disk_to_loading()
    world.finish()
    return world


def _on_host() -> World:
    world = World(1, host_chunks=2)
    world.add(1)
    world.add(2)
    world.load(1, 2)
    return world


def _host_to_loading() -> World:
    world = _on_host()
    world.want(1)
    return world


def _failed() -> World:
    world = _disk_to_loading()
    world.finish(ok=False)
    return world


def _evicted() -> World:
    world = _on_device()
    world.add(2)
    world.load(2)
    return world


def _lost_host_copy() -> World:
    world = World(2, host_chunks=1)
    world.add(1)
    world.add(2)
    world.load(1, 2)
    assert not world.has_host_copy(1)
    return world


def _host_copy_evicted() -> World:
    world = World(1, host_chunks=1)
    for slot in (1, 2):
        world.add(slot)
    world.load(1)
    assert world.has_host_copy(1)
    world.load(2)
    return world


def _removed(before: Callable[[], World]) -> Callable[[], World]:
    def walk() -> World:
        world = before()
        world.remove(1)
        return world

    return walk


def _removed_while_leased() -> World:
    world = _on_device()
    world.port.leases[1] = 1
    world.remove(1)
    assert 1 in world.residency._pump.leaving
    return world


def _removed_while_loading() -> World:
    world = _disk_to_loading()
    world.remove(1)
    assert 1 in world.residency._pump.leaving
    return world


def _left() -> World:
    for world in (_removed_while_leased(), _removed_while_loading()):
        world.port.leases[1] = 0
        while world.loads:
            world.finish()
        world.tick()
        assert not world.residency._pump.leaving
    return world


def _filling() -> World:
    world = World(1, host_chunks=1)
    world.add(1)
    world.prefetch(1, Tier.HOST)
    return world


def _loading_ahead() -> World:
    world = World(1)
    world.add(1)
    world.prefetch(1, Tier.DEVICE)
    return world


def _not_filled() -> World:
    world = _filling()
    world.finish(ok=False, message=CANCELLED)
    return world


EDGES: dict[str, tuple[Callable[[], World], State | None]] = {
    "(none) -> DISK [add]": (_add, State.DISK),
    "DISK -> LOADING [Transfers.try_begin]": (_disk_to_loading, State.LOADING),
    "HOST -> LOADING [Transfers.try_begin]": (_host_to_loading, State.LOADING),
    "DISK -> LOADING [Transfers.try_ahead]": (_loading_ahead, State.LOADING),
    "DISK -> HOST [Transfers.try_ahead]": (_filling, State.HOST),
    "HOST -> DISK [on_load_done]": (_not_filled, State.DISK),
    "LOADING -> DEVICE [on_load_done]": (_on_device, State.DEVICE),
    "LOADING -> DISK [on_load_done]": (_failed, State.DISK),
    "DEVICE -> DISK [DeviceRoom.try_let_go]": (_evicted, State.DISK),
    "DEVICE -> HOST [DeviceRoom.try_let_go]": (_on_host, State.HOST),
    "DEVICE -> DEVICE [HostRoom.drop]": (_lost_host_copy, State.DEVICE),
    "HOST -> DISK [HostRoom.drop]": (_host_copy_evicted, State.DISK),
    "DISK -> (none) [remove]": (_removed(_add), None),
    "HOST -> (none) [remove]": (_removed(_on_host), None),
    "DEVICE -> (none) [remove]": (_removed(_on_device), None),
    "DEVICE -> leaving [remove]": (_removed_while_leased, None),
    "LOADING -> leaving [remove]": (_removed_while_loading, None),
    "leaving -> (none) [Pump.run]": (_left, None),
}


def test_every_edge_that_the_docstring_lists_is_walked() -> None:
    pattern = re.compile(r"^(\S+ -> \S+ \[[\w.]+)", re.MULTILINE)
    listed = [f"{edge}]" for edge in pattern.findall(module.__doc__ or "")]
    assert sorted(listed) == sorted(EDGES)


@pytest.mark.parametrize("edge", EDGES)
def test_the_edge_ends_where_it_says(edge: str) -> None:
    walk, end = EDGES[edge]
    view = walk().residency.view(1)
    assert (view.state if view is not None else None) is end
