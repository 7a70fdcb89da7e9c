"""What a front end asks on behalf of a client and only the supervisor knows.

Operations: `index`, `unload`, `models`, `model`, `metrics`, `ensure`, `status`, `rollout`; those of
`accounts.py`, `client_books.py` and `client_loads.py`.  Every reply is bytes that the front end passes on.

Invariants
 1. One `AdminReply` (in parts, if long) for each `Admin`; an unknown operation or a wrong argument
    is answered with an error, never dropped.
 2. Totals never shrink: what a front end had counted when it died is kept.

Called by the supervisor, from its one thread.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Callable

import msgspec

from overcommit.runtime import triton_metrics
from overcommit.runtime.accounts import Accounts
from overcommit.runtime.catalogue import Catalogue
from overcommit.runtime.children import Child
from overcommit.runtime.client_books import ClientBooks
from overcommit.runtime.client_loads import ClientLoads
from overcommit.runtime.config import ADMIN_REPLY_PART_BYTES, VERSIONS_MAX
from overcommit.runtime.dependents import taken_along
from overcommit.runtime.entries import Entry, State
from overcommit.runtime.errors import BadRequest, OvercommitError
from overcommit.runtime.exposition import exposition, exposition_of, rows_of
from overcommit.runtime.front_end_messages import BATCH_UNIT, Admin, AdminReply, Counters
from overcommit.runtime.gathering import Gathering
from overcommit.runtime.holdings import Forms
from overcommit.runtime.house import House
from overcommit.runtime.ledger import FIELDS
from overcommit.runtime.occupied import Occupation
from overcommit.runtime.site_status import describe_site, tiers_of

MODELS_PAGE_MAX = 1000
_TOTALS = ("requests", "errors", "in_flight", "blocks_used", "late_completions", "retries")
_BATCHES = FIELDS.index("batches")

# Index states as V2 clients know them.
_INDEX_STATE = {
    State.READY: "READY",
    State.PACKING: "LOADING",
    State.UNAVAILABLE: "UNAVAILABLE",
    State.UNLOADED: "UNAVAILABLE",
}


def add_counters(total: Counters, more: Counters) -> Counters:
    """Add two sets of totals; gauges (`in_flight`, `blocks_used`) are taken from neither."""
    return Counters(
        requests=total.requests + more.requests,
        errors=total.errors + more.errors,
        late_completions=total.late_completions + more.late_completions,
        retries=total.retries + more.retries,
    )


class Administration:
    """Answers `Admin` messages."""

    def __init__(self, house: House, catalogue: Catalogue) -> None:
        self.house = house
        self.catalogue = catalogue
        self._past = Counters()
        self._occupied: list[Occupation] = []  # as of the operation
        self.books = ClientBooks(house, catalogue.packing.set_level)
        self.gathering = Gathering()
        self.loads = ClientLoads(catalogue, self._reply)
        self._operations: dict[str, Callable[[Admin], bytes]] = {
            "index": self._index,
            "unload": self._unload,
            "models": self._models,
            "model": self._model,
            "metrics": self._metrics,
            "ensure": self._ensure,
            "status": self._status,
            "rollout": self._rollout,
            **Accounts(house).operations,
            **self.books.operations,
        }

    def on_admin(self, front: Child, request: Admin, now_ns: int) -> None:
        """Carry one operation out and answer; where it shows counts, when they are all there."""
        if request.operation == "statistics":
            others = [each for each in self.house.fleet.of_kind("front_end") if each is not front]
            self.gathering.ask(others, lambda: self._answer(front, request), now_ns)
        else:
            self._answer(front, request)

    def _answer(self, front: Child, request: Admin) -> None:
        status = 200
        try:
            if self._is_answered_later(front, request):
                return
            operation = self._operations.get(request.operation)
            if operation is None:
                raise BadRequest(f"unknown operation '{request.operation}'")
            self._occupied = self.house.occupied()
            body = operation(request)
        except OvercommitError as error:
            status = error.http_status
            body = msgspec.json.encode({"error": error.message})
        self._reply(front, request, status, body)

    def _is_answered_later(self, front: Child, request: Admin) -> bool:
        now_ns = time.monotonic_ns()
        if request.operation not in self.loads.operations:
            return False
        self.loads.on_admin(front, request, now_ns)
        return True

    def _reply(self, front: Child, request: Admin, status: int, body: bytes) -> None:
        for start in range(0, max(len(body), 1), ADMIN_REPLY_PART_BYTES):
            part = body[start : start + ADMIN_REPLY_PART_BYTES]
            more = start + ADMIN_REPLY_PART_BYTES < len(body)
            front.post(AdminReply(id=request.id, status=status, body=part, more=more))

    def on_counters(self, front: Child, counters: Counters) -> None:
        """A front end tells its totals, and what it has counted for versions since the last time."""
        self.house.ledger.add(counters.models)
        self.house.ledger.add_batches(counters.batches)
        front.counters = msgspec.structs.replace(counters, models=(), batches=(), told=0)
        if counters.told:
            self.gathering.on_told(front, counters.told)

    def on_front_end_gone(self, front: Child) -> None:
        """A front end died; its totals stay."""
        self._past = add_counters(self._past, front.counters)
        self.gathering.on_gone(front)
        self.loads.on_front_end_gone(front)

    def totals(self) -> Counters:
        """Sum over the living and the dead front ends."""
        total = self._past
        for front in self.house.fleet.of_kind("front_end"):
            total = add_counters(total, front.counters)
        return total

    # --- operations -----------------------------------------------------------------------------
    def _index(self, request: Admin) -> bytes:
        only_ready = bool(request.arguments.get("ready", False))
        offset = _number(request, "offset", 0)
        limit = _number(request, "limit", VERSIONS_MAX)
        registry, state_of = self.house.registry, self.catalogue.ensembles.state
        # A filter has to be applied before its pages can be counted.
        entries = (
            itertools.islice(
                (entry for entry in registry.entries() if state_of(entry) is State.READY),
                *(offset, offset + limit),
            )
            if only_ready
            else registry.page(offset, limit)
        )
        rows = [
            {
                "name": entry.name,
                "version": entry.version,
                "state": _INDEX_STATE[state_of(entry)],
                **({"reason": reason} if (reason := self._reason(entry)) else {}),
            }
            for entry in entries
        ]
        return msgspec.json.encode(rows)

    def _reason(self, entry: Entry) -> str:
        """Why it does not serve, or not yet as its files have it; "": there is nothing to say."""
        slot = self.house.registry.successor_slot(entry)
        share = self.catalogue.packing.share_done(slot)
        if share is not None:
            return f"its image is being made: {share:.0%}"
        if entry.state is State.UNLOADED and not entry.reason:
            return "unloaded"
        if reason := self.catalogue.ensembles.verdict(entry).reason or entry.reason:
            return reason
        long = [each for each in self._occupied if each.slot == entry.slot]
        return (
            f"worker {long[-1].seat} is in a batch of it for {long[-1].still_s} s" if long else ""
        )

    def _unload(self, request: Admin) -> bytes:
        name = _text(request, "name")
        registry = self.house.registry
        if not registry.has(name):
            return b"{}"  # it is not loaded, which is what was asked for
        names = [name]
        if request.arguments.get("unload_dependents"):
            names += taken_along(registry, name, self.loads.by_name - {name})
        now_ns = time.monotonic_ns()
        for each in names:
            if registry.has(each):
                self.catalogue.take_out(each, now_ns)
                self.loads.unload(each, now_ns)
        return b"{}"

    def _rollout(self, request: Admin) -> bytes:
        said = {
            key: _text(request, key) for key in ("weights", "aliases") if key in request.arguments
        }
        return self.catalogue.name(_text(request, "name"), **said)

    def _ensure(self, request: Admin) -> bytes:
        slot = request.arguments.get("slot")
        if not isinstance(slot, int):
            raise BadRequest("'ensure' needs the argument 'slot'")
        self.catalogue.ensure(slot)
        return b"{}"

    def _models(self, request: Admin) -> bytes:
        offset = _number(request, "offset", 0)
        limit = min(_number(request, "limit", 100), MODELS_PAGE_MAX)
        requests = self.house.ledger.requests
        chosen = self._chosen(request)
        if request.arguments.get("order") == "requests":
            best = heapq.nlargest(offset + limit, chosen, key=lambda entry: requests(entry.slot))
            entries = best[offset:]
        else:
            entries = chosen[offset : offset + limit]
        now_ns = time.monotonic_ns()
        states = Counter(map(self.catalogue.ensembles.state, self.house.registry.entries()))
        return msgspec.json.encode(
            {
                "models": [self._row(entry, now_ns) for entry in entries],
                "total": len(chosen),
                "states": {state.name: count for state, count in states.items()},
                **self._tiers(),
            }
        )

    def _chosen(self, request: Admin) -> list[Entry]:
        """Return the versions in a state (`state`), and of which something is to be said (`reason`)."""
        state, reason = request.arguments.get("state", ""), request.arguments.get("reason", False)
        state_of = self.catalogue.ensembles.state
        return [
            entry
            for entry in self.house.registry.entries()
            if (not state or state_of(entry).name == state) and (not reason or self._reason(entry))
        ]

    def _model(self, request: Admin) -> bytes:
        """Everything about the versions of one model.  Raises NotFound."""
        now_ns = time.monotonic_ns()
        versions = [
            {
                **self._row(entry, now_ns),
                **dict(zip(FIELDS, self.house.ledger.get(entry.slot), strict=True)),
                "batches": self.house.ledger.get(entry.slot)[_BATCHES] / BATCH_UNIT,
                "folder": entry.folder,
                "image": entry.image_path,
                "program": entry.program_key,
            }
            for entry in self.house.registry.versions(_text(request, "name"))
        ]
        return msgspec.json.encode({"versions": versions})

    def _row(self, entry: Entry, now_ns: int) -> dict[str, object]:
        usage = self.house.usage(entry.slot)
        known = entry.state is State.READY
        view = self.house.view(entry.slot) if known else None
        last_ns = usage.last_used_ns
        terms = self.house.sites[0].activations.stays.said(entry.config)
        return {
            "name": entry.name,
            "version": entry.version,
            "state": self.catalogue.ensembles.state(entry).name,
            "reason": self._reason(entry),
            "engine": entry.engine,
            "tier": view.tier.name if view is not None else "DISK" if known else "",
            "loading": bool(view is not None and view.state.name == "LOADING"),
            "device_bytes": view.device_bytes if view is not None else 0,
            "host_bytes": view.host_bytes if view is not None else 0,
            "host_raw_bytes": view.host_raw_bytes if view is not None else 0,
            "device_shared_bytes": view.device_shared_bytes if view is not None else 0,
            "host_shared_bytes": view.host_shared_bytes if view is not None else 0,
            "bytes": entry.nbytes,
            "requests": self.house.ledger.requests(entry.slot),
            "last_used_s": (now_ns - last_ns) / 1e9 if last_ns else None,
            "pinned": entry.config.pin,
            "priority": entry.config.priority,
            "min_resident_s": terms.min_resident_ns / 1e9,
            "ttl_s": terms.ttl_ns / 1e9,
            "loads_from_disk": view.loads_from_disk if view is not None else 0,
            "loads_from_host": view.loads_from_host if view is not None else 0,
            "evictions": view.evictions if view is not None else 0,
        }

    def _tiers(self) -> dict[str, object]:
        """Both tiers, of all sites together."""
        all_of = [tiers_of(site) for site in self.house.sites]
        tiers: dict[str, dict[str, object]] = {
            tier: {key: sum(each[tier][key] for each in all_of) for key in all_of[0][tier]}
            for tier in ("device", "host")
        }
        forms = Forms.of(site.residency.host_forms() for site in self.house.sites)
        tiers["host"] |= {
            "packing": self.house.settings.host_packing,
            "raw": forms.raw_bytes,
            "stored": forms.stored_bytes,
            "packed_parts": forms.packed_parts,
            "ratio": round(forms.ratio, 3),
        }
        return {**tiers}

    def _prefetch(self) -> dict[str, object] | None:
        prefetching = self.house.prefetching
        if prefetching is None:
            return None
        books = prefetching.books
        return {
            "models": len(prefetching.prefetcher),
            "uses_seen": prefetching.uses_seen,
            "waiting_bytes": sum(ahead.nbytes for ahead in books.outstanding.values()),
            **msgspec.to_builtins(books.totals),
        }

    def _occupied_rows(self) -> list[dict[str, object]]:
        return [
            {
                "worker": each.seat,
                **dict(zip(("model", "version"), self.house.names_of(each.slot), strict=True)),
                "seconds": each.still_ns / 1e9,
            }
            for each in self._occupied
        ]

    def _status(self, request: Admin) -> bytes:
        house = self.house
        devices = [describe_site(house, site) for site in house.sites]
        timings = [site.activations.timings for site in house.sites]
        activations = heapq.merge(*(t.activations for t in timings), key=lambda a: a.done_ns)
        attaches = heapq.merge(*(t.attaches for t in timings), key=lambda a: a.attach.ready_ns)
        fronts = [
            {"seat": front.seat.index, **_totals(front.counters)}
            for front in self.house.fleet.of_kind("front_end")
        ]
        return msgspec.json.encode(
            {
                "processes": [*house.fleet.describe(), *self.catalogue.packing.describe()],
                "occupied": self._occupied_rows(),
                "failures": house.boundary.failures(),
                **self._tiers(),
                "gpu": devices[0]["gpu"],
                "devices": devices,
                "totals": {
                    **msgspec.to_builtins(house.totals()),
                    "bytes_read": sum(timing.bytes_read for timing in timings),
                    "bytes_copied": sum(timing.bytes_copied for timing in timings),
                },
                "thrashing": max(
                    (site.pressure for site in house.sites),
                    key=lambda pressure: pressure.reading.is_thrashing,
                ).describe(),
                "prefetch": self._prefetch(),
                "packing": len(self.catalogue.packing),
                "activations": list(activations),
                "attaches": list(attaches),
                "front_ends": fronts,
                "requests": _totals(self.totals()),
            }
        )

    def _metrics(self, request: Admin) -> bytes:
        name, house = request.arguments.get("model"), self.house
        versions = house.registry.versions(_text(request, "model")) if name else None
        if request.arguments.get("names") == "triton":
            sites = house.sites if versions is None else ()
            return triton_metrics.exposition(rows_of(house, versions), sites)
        if versions is not None:
            return exposition_of(house, versions)
        return exposition(house, self.totals())


def _totals(counters: Counters) -> dict[str, int]:
    names = [name for name in counters.__struct_fields__ if name in _TOTALS]
    return {name: getattr(counters, name) for name in names}


def _text(request: Admin, name: str) -> str:
    value = request.arguments.get(name)
    if not isinstance(value, str):
        raise BadRequest(f"'{request.operation}' needs the argument '{name}'")
    return value


def _number(request: Admin, name: str, default: int) -> int:
    value = request.arguments.get(name, default)
    if not isinstance(value, int) or value < 0:
        raise BadRequest(f"'{name}' must be a whole number of at least 0")
    return value
