"""Which cores are near a device: host memory that they touch first is near it too.

A copy from the other socket's memory reaches a half to a third of the link on some machines, and pinned
pages never move; so the mover runs where the GPU is before it touches HOST.

Where DEVICE is host memory in several sites, each has a node of its own as far as there are nodes.

Called by the mover and by workers, before they have threads.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger("overcommit.mover")


def node_of(bus_id: str, root: Path = Path("/sys")) -> int | None:
    """Return the NUMA node of a PCI device; None where there is one node, or nobody says."""
    try:
        node = int((root / "bus/pci/devices" / bus_id.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def cores_of(node: int, root: Path = Path("/sys")) -> frozenset[int]:
    """Return the cores of a node, from a list like `0-3,8,10-11`; none when it cannot be read."""
    try:
        text = (root / f"devices/system/node/node{node}/cpulist").read_text().strip()
        cores: set[int] = set()
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return frozenset()
    return frozenset(cores)


def move_near(bus_id: str, root: Path = Path("/sys")) -> frozenset[int]:
    """Run this thread, and those that it starts, on the cores near the device, if we may.

    Return those cores; none where nothing was changed.
    """
    node = node_of(bus_id, root)
    if node is None:
        return frozenset()
    near = _move(cores_of(node, root))
    if near:
        log.info("HOST lies on NUMA node %d, where the GPU is", node)
    return near


def nodes(root: Path = Path("/sys")) -> list[int]:
    """Return the nodes that have cores which we may use."""
    folders = (root / "devices/system/node").glob("node[0-9]*")
    numbers = sorted(int(folder.name.removeprefix("node")) for folder in folders)
    return [n for n in numbers if cores_of(n, root) & os.sched_getaffinity(0)]


def move_to_site(site: int, sites: int, root: Path = Path("/sys")) -> frozenset[int]:
    """Run this thread, and those that it starts, on the site's node; nothing changes where there is one."""
    there = nodes(root) if sites > 1 else []
    if len(there) < 2:
        return frozenset()
    node = there[site % len(there)]
    near = _move(cores_of(node, root))
    log.info("device cpu:%d is NUMA node %d", site, node)
    return near


def _move(cores: frozenset[int]) -> frozenset[int]:
    near = cores & os.sched_getaffinity(0)
    if near:
        os.sched_setaffinity(0, near)
    return near
