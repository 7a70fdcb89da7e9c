"""Cores near a GPU, from a `/sys` of the test's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from overcommit.runtime import numa

BUS = "0000:65:00.0"


def machine(root: Path, node: str, cores: str) -> Path:
    device = root / "bus/pci/devices" / BUS
    device.mkdir(parents=True)
    (device / "numa_node").write_text(node)
    folder = root / "devices/system/node/node1"
    folder.mkdir(parents=True)
    (folder / "cpulist").write_text(cores)
    return root


@pytest.fixture
def same_cores() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


def test_a_list_of_cores_is_read(tmp_path: Path) -> None:
    assert numa.cores_of(1, machine(tmp_path, "1", "0-2,5,8-9\n")) == {0, 1, 2, 5, 8, 9}
    assert numa.cores_of(7, tmp_path) == frozenset()


def test_the_thread_moves_to_the_cores_that_it_may_use(
    tmp_path: Path, same_cores: set[int]
) -> None:
    one = min(same_cores)
    root = machine(tmp_path, "1\n", f"{one},4000")
    assert numa.move_near(BUS.upper(), root) == {one}
    assert os.sched_getaffinity(0) == {one}


@pytest.mark.parametrize(("node", "cores"), [("-1", "0"), ("1", "4000"), ("1", ""), ("x", "0")])
def test_where_nobody_says_nothing_changes(
    tmp_path: Path, same_cores: set[int], node: str, cores: str
) -> None:
    assert numa.move_near(BUS, machine(tmp_path, node, cores)) == frozenset()
    assert os.sched_getaffinity(0) == same_cores


def test_sites_of_host_memory_lie_on_nodes_of_their_own(
    tmp_path: Path, same_cores: set[int]
) -> None:
    cores = sorted(same_cores)
    for node, core in enumerate([cores[0], cores[-1], 4000]):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(str(core))
    assert numa.nodes(tmp_path) == [0, 1], "of the third we may use no core"
    assert numa.move_to_site(0, 1, tmp_path) == frozenset(), "one site is everywhere"
    assert numa.move_to_site(3, 4, tmp_path) == {cores[-1]}
    assert os.sched_getaffinity(0) == {cores[-1]}
    assert numa.move_to_site(1, 2, tmp_path / "nowhere") == frozenset()
