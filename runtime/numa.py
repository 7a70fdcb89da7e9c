"""Which cores are near a GPU: host memory that they touch first is near it too.

A copy from the other socket's memory reaches a half to a third of the link on some machines, and pinned
pages never move; so the mover runs where the GPU is before it touches HOST.

Called by the mover, before it has threads.
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
    near = cores_of(node, root) & os.sched_getaffinity(0)
    if not near:
        return frozenset()
    os.sched_setaffinity(0, near)
    log.info("HOST lies on NUMA node %d, where the GPU is", node)
    return near
