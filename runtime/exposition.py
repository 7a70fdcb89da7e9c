"""Metrics as Prometheus text, from the supervisor's own state and the front ends' totals.

Names start with `overcommit_`.  Per-model series are limited to the versions with the most requests
(`Settings.metrics_models`); what is counted for the others is one series named `_other`, so that
twenty thousand models do not flood a scraper.  `exposition_of` tells everything of one model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from overcommit.runtime.front_end_messages import BATCH_UNIT, Counters
from overcommit.runtime.holdings import Forms
from overcommit.runtime.ledger import FIELDS
from overcommit.runtime.site_status import site_metrics, tiers_of
from overcommit.runtime.views import Tier

if TYPE_CHECKING:
    from overcommit.runtime.entries import Entry
    from overcommit.runtime.house import House
    from overcommit.runtime.occupied import Occupation
    from overcommit.runtime.prefetching import Prefetching
    from overcommit.runtime.site import Site

OTHER: Final = "_other"
_TEXTS: Final = {
    "success": "Requests answered",
    "failure": "Requests failed",
    "queue_ns": "Nanoseconds requests waited in a worker",
    "compute_ns": "Nanoseconds requests were computed",
    "input_ns": "Nanoseconds of these in which batches were gathered",
    "output_ns": "Nanoseconds of these in which batches were split",
    "request_ns": "Nanoseconds requests took in all",
    "failure_ns": "Nanoseconds that failed requests took in all",
    "inferences": "Rows computed",
    "executions": "Batches computed; parts of them, where versions share one",
    "batches": "Batches that answered them",
}
_LABELS: Final = ("model", "version")
Row = tuple[tuple[str, str], tuple[int, ...]]  # labels, counts in the order of FIELDS


class _Snapshot(Collector):
    """One scrape."""

    def __init__(self, house: House, totals: Counters) -> None:
        self._house = house
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        yield from self._requests()
        yield from self._models()
        yield from self._residency()
        yield from self._pressure()
        yield from site_metrics(self._house)
        yield from _gpus(self._house.sites)
        if self._house.prefetching is not None:
            yield from _prefetching(self._house.prefetching)
        yield from self._processes()
        yield from self._failures()

    def _requests(self) -> Iterator[Metric]:
        totals = self._totals
        for name, text, value in (
            ("requests", "Inference requests answered", totals.requests),
            ("request_errors", "Inference requests answered with an error", totals.errors),
            ("request_retries", "Requests sent again after a worker's death", totals.retries),
            ("late_completions", "Answers that came for no request", totals.late_completions),
        ):
            yield CounterMetricFamily(f"overcommit_{name}", text, value)
        fronts = [front.counters for front in self._house.fleet.of_kind("front_end")]
        in_flight = sum(counters.in_flight for counters in fronts)
        blocks = sum(counters.blocks_used for counters in fronts)
        yield GaugeMetricFamily("overcommit_requests_in_flight", "Requests in flight", in_flight)
        yield GaugeMetricFamily("overcommit_payload_blocks_used", "Payload blocks in use", blocks)

    def _models(self) -> Iterator[Metric]:
        yield from _model_families(rows_of(self._house))

    def _residency(self) -> Iterator[Metric]:
        sites = self._house.sites
        timings = [site.activations.timings for site in sites]
        totals = self._house.totals()
        for name in totals.__slots__:
            text = f"Residency: {name.replace('_', ' ')}"
            yield CounterMetricFamily(f"overcommit_{name}", text, getattr(totals, name))
        yield CounterMetricFamily(
            "overcommit_read_bytes",
            "Bytes of weights read from disk",
            sum(timing.bytes_read for timing in timings),
        )
        yield CounterMetricFamily(
            "overcommit_copied_bytes",
            "Bytes copied to DEVICE",
            sum(timing.bytes_copied for timing in timings),
        )
        capacity = GaugeMetricFamily(
            "overcommit_tier_capacity_bytes", "Bytes a tier may hold", labels=("tier",)
        )
        used = GaugeMetricFamily(
            "overcommit_tier_used_bytes", "Bytes a tier holds", labels=("tier",)
        )
        saved = GaugeMetricFamily(
            "overcommit_tier_saved_bytes",
            "Bytes that a tier would hold more if versions shared nothing",
            labels=("tier",),
        )
        all_of = [tiers_of(site) for site in sites]
        for tier in ("device", "host") if sites[0].residency.host is not None else ("device",):
            for family, key in ((saved, "saved"), (capacity, "capacity"), (used, "used")):
                family.add_metric((tier,), sum(each[tier][key] for each in all_of))
        yield saved
        forms = Forms.of(site.residency.host_forms() for site in sites)
        for name, text, value in (
            ("raw_bytes", "Bytes of the weights in HOST, as they are on DEVICE", forms.raw_bytes),
            ("stored_bytes", "Bytes that they take, packed or not", forms.stored_bytes),
            ("packed_parts", "Parts in HOST that are packed", forms.packed_parts),
            ("packing_ratio", "How many times as much HOST holds as raw", forms.ratio),
        ):
            yield GaugeMetricFamily(f"overcommit_host_{name}", text, value)
        yield capacity
        yield used

    def _pressure(self) -> Iterator[Metric]:
        # The worst of them; each device has series of its own.
        readings = [site.pressure.reading for site in self._house.sites]
        reading = max(readings, key=lambda each: (each.is_thrashing, each.busy_share))
        for name, text, value in (
            ("thrashing", "1 while models push each other out of DEVICE", reading.is_thrashing),
            ("working_set_bytes", "Bytes of the models used lately", reading.working_set_bytes),
            ("loads_per_second", "Activations a second, lately", reading.loads_per_s),
            ("load_busy_share", "Share of the time with a load in flight", reading.busy_share),
            ("uses_per_load", "Requests that a load serves, lately", reading.uses_per_load),
            (
                "stay_seconds",
                "In which a loaded model leaves after others",
                reading.stay_ns / 1e9,
            ),
        ):
            yield GaugeMetricFamily(f"overcommit_{name}", text, float(value))

    def _processes(self) -> Iterator[Metric]:
        deaths = CounterMetricFamily(
            "overcommit_process_deaths", "Child processes that died", labels=("kind",)
        )
        live = GaugeMetricFamily(
            "overcommit_processes_ready", "Child processes that serve", labels=("kind",)
        )
        for kind in ("front_end", "worker", "mover"):
            seats = [seat for seat in self._house.fleet.seats if seat.kind == kind]
            deaths.add_metric((kind,), sum(seat.deaths for seat in seats))
            live.add_metric((kind,), sum(1 for _ in self._house.fleet.of_kind(kind)))
        yield deaths
        yield live
        occupied = self._house.occupied()
        yield GaugeMetricFamily(
            "overcommit_workers_occupied", "Workers in one batch for unusually long", len(occupied)
        )
        yield _occupied(self._house, occupied)

    def _failures(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "overcommit_supervisor_failures",
            "What failed in the supervisor, which went on without it",
            labels=("what", "error"),
        )
        for failure in self._house.boundary.failures():
            family.add_metric((failure.what, failure.error), failure.count)
        yield family


def _occupied(house: House, occupied: Sequence[Occupation]) -> Metric:
    family = GaugeMetricFamily(
        "overcommit_worker_occupied_seconds",
        "For how long the worker has been in this batch; while that is unusually long",
        labels=("worker", *_LABELS),
    )
    for each in occupied:
        family.add_metric((str(each.seat), *house.names_of(each.slot)), each.still_ns / 1e9)
    return family


def _gpus(sites: Sequence[Site]) -> Iterator[Metric]:
    """Yield what NVML says, of every GPU that answers."""
    families: dict[str, GaugeMetricFamily] = {}
    for site in sites:
        reading = None if site.gpu_watch is None else site.gpu_watch.reading
        if reading is None:
            continue
        label = (str(reading.device),)
        for name, text, value in (
            ("memory_total_bytes", "Bytes of GPU memory", reading.total_bytes),
            ("memory_used_bytes", "Bytes of GPU memory that anybody holds", reading.used_bytes),
            ("memory_free_bytes", "Bytes of GPU memory that are free", reading.free_bytes),
            ("busy_percent", "Time in which kernels ran", reading.busy_percent),
            ("temperature_celsius", "Temperature of the GPU", reading.temperature),
            ("power_watts", "Power that the GPU takes", reading.power_watts),
            ("ecc_uncorrected_errors", "Since the driver was loaded", reading.ecc_uncorrected),
            ("ecc_corrected_errors", "Since the driver was loaded", reading.ecc_corrected),
            ("pcie_to_gpu_bytes_per_second", "PCIe traffic to the GPU", reading.pcie_to_gpu),
            ("pcie_from_gpu_bytes_per_second", "PCIe traffic from the GPU", reading.pcie_from_gpu),
            ("xid_errors", "Xid events since the start, the last ones", len(reading.xids)),
        ):
            if value is not None:
                gauge = families.get(name)
                if gauge is None:
                    gauge = GaugeMetricFamily(f"overcommit_gpu_{name}", text, labels=("gpu",))
                    families[name] = gauge
                gauge.add_metric(label, value)
        held = families.get("process_bytes")
        if held is None:
            held = families["process_bytes"] = GaugeMetricFamily(
                "overcommit_gpu_process_bytes",
                "GPU memory by kind of process",
                labels=("gpu", "kind"),
            )
        pids, kinds = site.pids(), dict[str, int]()
        for pid, nbytes in reading.processes.items():
            kind = pids.get(pid, "other")
            kinds[kind] = kinds.get(kind, 0) + nbytes
        for kind, nbytes in sorted(kinds.items()):
            held.add_metric((*label, kind), nbytes)
    yield from families.values()


def _prefetching(prefetching: Prefetching) -> Iterator[Metric]:
    """Gain: used, saved_s, promoted.  Waste: lost, expired, cancelled.  Harm: regretted."""
    books = prefetching.books
    for name in books.totals.__slots__:
        text = f"Prefetches: {name.replace('_', ' ')}"
        label = name.removesuffix("_s") + "_seconds" if name.endswith("_s") else name
        yield CounterMetricFamily(f"overcommit_prefetch_{label}", text, getattr(books.totals, name))
    waiting = GaugeMetricFamily(
        "overcommit_prefetch_waiting_bytes", "Prefetched and not used yet", labels=("tier",)
    )
    for tier in (Tier.DEVICE, Tier.HOST):
        waiting.add_metric((tier.value,), books.waiting_bytes(tier))
    yield waiting
    models = len(prefetching.prefetcher)
    yield GaugeMetricFamily("overcommit_prefetch_models", "Models with a known past", models)


class _Detail(Collector):
    """The versions of one model."""

    def __init__(self, house: House, entries: Sequence[Entry]) -> None:
        self._house = house
        self._entries = entries

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        entries = self._entries
        yield from _model_families(rows_of(self._house, entries))
        for name, text in (
            ("loads_from_disk", "Loads from disk"),
            ("loads_from_host", "Loads from HOST"),
            ("evictions", "Evictions from DEVICE"),
        ):
            family = CounterMetricFamily(f"overcommit_model_{name}", text, labels=_LABELS)
            for entry in entries:
                view = self._house.view(entry.slot)
                value = 0 if view is None else getattr(view, name)
                family.add_metric((entry.name, entry.version), value)
            yield family
        held = GaugeMetricFamily(
            "overcommit_model_bytes", "Bytes a tier holds of it", labels=(*_LABELS, "tier")
        )
        for entry in entries:
            view = self._house.view(entry.slot)
            for tier in ("device", "host"):
                value = 0 if view is None else getattr(view, f"{tier}_bytes")
                held.add_metric((entry.name, entry.version, tier), value)
        yield held
        slots = {entry.slot for entry in entries}
        yield _occupied(self._house, [o for o in self._house.occupied() if o.slot in slots])


def rows_of(house: House, entries: Sequence[Entry] | None = None) -> list[Row]:
    """Return the counts of these versions; else of those that are shown, and of the rest."""
    if entries is not None:
        return [((each.name, each.version), house.ledger.get(each.slot)) for each in entries]
    rows: list[Row] = []
    for slot in house.ledger.shown():
        entry = house.registry.by_slot(slot)
        if entry is not None:
            rows.append(((entry.name, entry.version), house.ledger.get(slot)))
    rest = house.ledger.rest()
    if any(rest):
        rows.append(((OTHER, ""), rest))
    return rows


def _model_families(rows: list[Row]) -> Iterator[Metric]:
    for at, name in enumerate(FIELDS):
        family = CounterMetricFamily(f"overcommit_model_{name}", _TEXTS[name], labels=_LABELS)
        for labels, counts in rows:
            family.add_metric(labels, counts[at] / BATCH_UNIT if name == "batches" else counts[at])
        yield family


def exposition(house: House, totals: Counters) -> bytes:
    """Return the Prometheus text of this instant."""
    return _text(_Snapshot(house, totals))


def exposition_of(house: House, entries: Sequence[Entry]) -> bytes:
    """Return the Prometheus text of the versions of one model."""
    return _text(_Detail(house, entries))


def _text(collector: Collector) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)
