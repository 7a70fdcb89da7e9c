"""What operators see of residency: where each version is, and what sharing saves.

Called by residency, for status and metrics; pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from overcommit.runtime.allocator import ChunkAllocator
from overcommit.runtime.holdings import Holdings
from overcommit.runtime.parts import Part
from overcommit.runtime.refusals import mib
from overcommit.runtime.residents import State, Version


class Tier(Enum):
    """The best tier that has a version's weights."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


@dataclass(slots=True, frozen=True)
class View:
    """One version, for status."""

    tier: Tier
    device_bytes: int  # that it holds, shared ones included
    host_bytes: int  # in the form that weights have there
    host_raw_bytes: int  # what they are on DEVICE
    device_shared_bytes: int  # of these, what other versions hold as well
    host_shared_bytes: int
    generation: int
    state: State
    loads_from_disk: int
    loads_from_host: int
    evictions: int
    last_error: str


def view_of(version: Version, device: Holdings, host: Holdings | None) -> View:
    """Return a version's state of this instant."""
    tier = Tier.DISK
    if version.state is State.DEVICE:
        tier = Tier.DEVICE
    elif all(_is_filled(part, device) or _is_filled(part, host) for part in version.parts):
        tier = Tier.HOST
    return View(
        tier=tier,
        device_bytes=device.footprint(version.device),
        host_bytes=0 if host is None else host.footprint(version.host),
        host_raw_bytes=sum(part.nbytes for part in version.host),
        device_shared_bytes=_shared(version.device, device),
        host_shared_bytes=0 if host is None else _shared(version.host, host),
        generation=version.generation,
        state=version.state,
        loads_from_disk=version.loads_from_disk,
        loads_from_host=version.loads_from_host,
        evictions=version.evictions,
        last_error=version.last_error,
    )


def joined(views: Sequence[View]) -> View | None:
    """Join what several sites say of one version, the one that serves it first; None: nothing."""
    if len(views) < 2:
        return views[0] if views else None
    best = max(views, key=lambda view: list(Tier).index(view.tier))
    return View(
        tier=best.tier,
        device_bytes=sum(view.device_bytes for view in views),
        host_bytes=sum(view.host_bytes for view in views),
        host_raw_bytes=sum(view.host_raw_bytes for view in views),
        device_shared_bytes=sum(view.device_shared_bytes for view in views),
        host_shared_bytes=sum(view.host_shared_bytes for view in views),
        generation=best.generation,
        state=best.state,
        loads_from_disk=sum(view.loads_from_disk for view in views),
        loads_from_host=sum(view.loads_from_host for view in views),
        evictions=sum(view.evictions for view in views),
        last_error=views[0].last_error,
    )


def summary_of(
    versions: int, tiers: Sequence[tuple[ChunkAllocator, int]], loading: int, waiting: int
) -> str:
    """Say in a line who is where: DEVICE and, if there is one, HOST, with their holders."""
    text = f"{versions} versions, "
    for name, (allocator, holders) in zip(("DEVICE", "HOST"), tiers, strict=False):
        used, capacity = allocator.used_bytes, allocator.capacity_bytes
        text += f"{holders} in {name} ({mib(used)} of {mib(capacity)}), "
    return f"<Residency {text}{loading} loading, {waiting} waiting>"


def _is_filled(part: Part, holdings: Holdings | None) -> bool:
    place = None if holdings is None else holdings.places.get(part)
    return place is not None and place.is_filled


def _shared(parts: Iterable[Part], holdings: Holdings) -> int:
    return holdings.footprint(part for part in parts if holdings.is_shared(part))
