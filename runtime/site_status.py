"""What operators see of a site: its tiers, its pressure, its GPU, what it serves.

Called by administration and exposition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from overcommit.runtime.gpu_watch import describe

if TYPE_CHECKING:
    from overcommit.runtime.house import House
    from overcommit.runtime.site import Site


def tiers_of(site: Site) -> dict[str, dict[str, int]]:
    """Return what its tiers may hold, hold, and would hold more if versions shared nothing."""
    residency = site.residency
    saved = (*residency.saved_bytes(), 0)
    return {
        tier: {
            "capacity": 0 if allocator is None else allocator.capacity_bytes,
            "used": 0 if allocator is None else allocator.used_bytes,
            "saved": saved[number],
        }
        for number, (tier, allocator) in enumerate(
            (("device", residency.device), ("host", residency.host))
        )
    }


def describe_site(house: House, site: Site) -> dict[str, object]:
    """Return what status shows."""
    spread = None if house.spreading is None else house.spreading.spread
    gpu = None
    if site.gpu_watch is not None:
        gpu = describe(site.gpu_watch.reading, site.pids())
    return {
        "device": site.name,
        "site": site.number,
        "lost": site.why_lost() if site.is_lost else "",
        "tiers": tiers_of(site),
        "versions": len(house.registry) if spread is None else spread.versions(site.number),
        "resident": sum(1 for _ in site.residency.device_slots()),
        "waiting": sum(site.pressure.waiting.values()),
        "workers": site.workers,
        "totals": {
            "loads_from_disk": (totals := site.residency.totals()).loads_from_disk,
            "loads_from_host": totals.loads_from_host,
            "evictions": totals.evictions_device,
            "bytes_read": site.activations.timings.bytes_read,
            "bytes_copied": site.activations.timings.bytes_copied,
        },
        "thrashing": site.pressure.describe(),
        "gpu": gpu,
    }


_GAUGES: Final[dict[str, tuple[str, Callable[[Site], float]]]] = {
    "capacity_bytes": ("Bytes that it may hold", lambda s: s.residency.device.capacity_bytes),
    "used_bytes": ("Bytes that it holds", lambda s: s.residency.device.used_bytes),
    "waiting": ("Requests that wait there", lambda s: sum(s.pressure.waiting.values())),
    "workers": ("Workers that serve it", lambda s: s.workers),
    "thrashing": ("1 while models push each other out", lambda s: s.pressure.reading.is_thrashing),
    "lost": ("1 while it cannot be used", lambda s: s.is_lost),
}
_COUNTERS: Final[dict[str, tuple[str, Callable[[Site], float]]]] = {
    "loads_from_disk": ("Loads from disk", lambda s: s.residency.totals().loads_from_disk),
    "loads_from_host": ("Loads from HOST", lambda s: s.residency.totals().loads_from_host),
    "evictions": ("Evictions", lambda s: s.residency.totals().evictions_device),
    "copied_bytes": ("Bytes copied there", lambda s: s.activations.timings.bytes_copied),
}


def site_metrics(house: House) -> Iterator[Metric]:
    """Yield the families that tell devices apart."""
    for name, (text, read) in _GAUGES.items():
        gauge = GaugeMetricFamily(f"overcommit_device_{name}", text, labels=("device",))
        for site in house.sites:
            gauge.add_metric((site.name,), float(read(site)))
        yield gauge
    for name, (text, read) in _COUNTERS.items():
        counter = CounterMetricFamily(f"overcommit_device_{name}", text, labels=("device",))
        for site in house.sites:
            counter.add_metric((site.name,), float(read(site)))
        yield counter
    if house.spreading is not None:
        spreading = house.spreading
        replicas = float(spreading.spread.replicas)
        yield GaugeMetricFamily(
            "overcommit_replicas", "Versions' sites beyond their first", replicas
        )
        yield CounterMetricFamily(
            "overcommit_replications", "Versions that got another site", spreading.replicated
        )
        yield CounterMetricFamily(
            "overcommit_moves", "Versions that went to another site", spreading.moves
        )
