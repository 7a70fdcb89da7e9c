"""Scenario `variants`: forty variants of one model, room for eleven, every answer checked.

What it proves: with weights coming and going all the time, no request is answered with another
variant's weights, and none fails.  What it measures: throughput, latency, where the weights were,
and the activations beside the copy and read bandwidth of the machine.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Final

from overcommit.bench import limits, plots, screen, snapshot
from overcommit.bench.loadgen import Load, Plan
from overcommit.bench.prepare import Fleet, Options, minilm_variants, run_folder
from overcommit.bench.report import Figure, Report
from overcommit.bench.server import Server
from overcommit.bench.snapshot import Snapshot
from overcommit.bench.tally import Tally
from overcommit.bench.workload import EmbeddingPlan

VARIANTS: Final = 40
EXPONENT: Final = 1.1
DEVICE_MEMORY: Final = "1GB"
HOST_MEMORY: Final = "1.5GB"
WARM_UP_S: Final = 4.0
SECONDS: Final = 60.0
QUICK_SECONDS: Final = 15.0


def run(options: Options, report: Report) -> None:
    """Run the scenario with its own models."""
    fleet = minilm_variants(options, report, VARIANTS)
    run_fleet(options, report, fleet, DEVICE_MEMORY, HOST_MEMORY)


def run_fleet(
    options: Options, report: Report, fleet: Fleet, device_memory: str, host_memory: str
) -> None:
    """Run the scenario with these models and budgets."""
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    report.settings = {
        "models": len(fleet.names),
        "device memory": device_memory,
        "host memory": host_memory,
        "Zipf": EXPONENT,
        "connections": options.connections,
        "workers": options.workers,
        "seconds": seconds,
        "seed": options.seed,
    }
    flags = ["--device-memory", device_memory, "--host-memory", host_memory]
    flags += ["--workers", str(options.workers)]
    with run_folder(options, report) as folder:
        fleet.references.save(folder / "references.npz")
        copy = limits.measure_copy()
        report.step("starting the server")
        with Server(fleet.repository, fleet.cache, folder, flags) as server:
            report.step(f"ready after {server.ready_s:.1f} s")
            with screen.bar(report.console, "packing images") as advance:
                server.wait_packed(fleet.names, advance)
            warm_up = _load(options, report, server, folder, min(WARM_UP_S, seconds), "warming up")
            before = snapshot.settle(server)
            tally = _load(options, report, server, folder, seconds, "measuring")
            after = snapshot.settle(
                server, also=lambda s: s.requests >= warm_up.accounted + tally.accounted
            )
            metrics = server.metrics()
            server.terminate()
            status = server.wait_end()
            left = server.family()
        report.step("measuring the limits of the machine")
        physical = limits.measure(fleet.images(), copy)
        _figures(report, tally, before, after, physical)
        _answers(report, [warm_up, tally])
        _movement(report, before, after, metrics)
        counted = warm_up.accounted + tally.accounted
        report.expect(
            "the server counted as many requests as the clients",
            after.requests == counted,
            f"{after.requests:,} and {counted:,}",
        )
        report.expect("SIGTERM: exit status 0", status == 0, f"{status}")
        report.expect("no process is left", not left, f"{len(left)} left")


def _load(
    options: Options, report: Report, server: Server, folder: Path, seconds: float, what: str
) -> Tally:
    plan = Plan(
        workload=EmbeddingPlan(references=str(folder / "references.npz"), exponent=EXPONENT),
        port=server.port,
        connections=options.connections,
        seconds=seconds,
        seed=options.seed + (what == "measuring"),
    )
    with Load(plan, folder / "load.log", options.load_processes) as load:
        return screen.watch(report.console, what, load)


def _figures(
    report: Report, tally: Tally, before: Snapshot, after: Snapshot, physical: limits.Limits
) -> None:
    times = tally.times()
    report.add(
        "requests",
        Figure("throughput", tally.rate, "1/s", note=f"{tally.right:,} right answers"),
        *(
            Figure(f"p{share * 100:g}", times.quantile(share) / 1e6, "ms")
            for share in (0.5, 0.9, 0.99)
        ),
        Figure("slowest", times.highest / 1e6, "ms"),
        Figure("models asked", len(tally.targets)),
    )
    p50, p99 = (times.quantile(share) / 1e6 for share in (0.5, 0.99))
    said = f"{tally.rate:,.0f}/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms"
    report.headlines.append((f"{len(after.models)} variants of MiniLM, room for 11", said, ""))
    report.add("tiers", *snapshot.tier_figures(before, after, tally.accounted))
    report.plots["latency"] = functools.partial(plots.latency, {"overcommit": times})
    records = snapshot.new_activations(before, after)
    done = [plots.Activation(r["nbytes"], r["total_ns"] / 1e9, r["source"]) for r in records]
    ways = {"disk": physical.read, "host": physical.copy}
    report.plots["activations"] = functools.partial(plots.activations, done, ways)
    for source in ("host", "disk"):
        report.add("activations", *snapshot.activation_figures(records, source, physical))
    report.add(
        "limits",
        Figure("memory copy, one thread", physical.copy_one_thread / 1e9, "GB/s"),
        Figure("memory copy, all cores", physical.copy_all_cores / 1e9, "GB/s"),
        Figure(
            "read of weight images",
            physical.read / 1e9,
            "GB/s",
            note="O_DIRECT" if physical.read_is_direct else "buffered: O_DIRECT is refused here",
        ),
    )
    if not all(record["direct"] for record in records if record["source"] == "disk"):
        report.notes.append("some reads of the server were not O_DIRECT")


def _answers(report: Report, tallies: list[Tally]) -> None:
    """Every request: one answer, the right one."""
    right = sum(tally.right for tally in tallies)
    wrong = sum(tally.wrong for tally in tallies)
    report.expect(
        "every answer is its own variant's reference",
        wrong == 0 < right,
        f"{wrong} wrong of {right}",
    )
    failed = {
        "errors": sum(tally.errors for tally in tallies),
        "connections lost": sum(tally.broken for tally in tallies),
        "without an answer": sum(tally.unanswered for tally in tallies),
        "refused connections": sum(tally.connect_errors for tally in tallies),
        "answers to nothing": sum(tally.unexpected for tally in tallies),
    }
    text = ", ".join(f"{count} {name}" for name, count in failed.items() if count)
    report.expect("no request failed", not text, text)
    sent = sum(tally.sent for tally in tallies)
    accounted = sum(tally.accounted for tally in tallies)
    report.expect(
        "every request has one fate", sent == accounted, f"{sent} sent, {accounted} ended"
    )
    for tally in tallies:
        report.notes += tally.examples


def _movement(report: Report, before: Snapshot, after: Snapshot, metrics: dict[str, float]) -> None:
    """Weights did move, and metrics say the same as status."""
    for name, text in (
        ("evictions_device", "models were evicted from DEVICE"),
        ("loads_from_host", "models were loaded again from HOST"),
    ):
        grown = after.total(name) - before.total(name)
        report.expect(text, grown > 0, f"{grown}")
    again = after.reloads_from_disk - before.reloads_from_disk
    report.expect("models were loaded again from DISK", again > 0, f"{again}")
    for name in ("loads_from_disk", "loads_from_host", "evictions_device"):
        sample = metrics.get(f"overcommit_{name}_total")
        report.expect(
            f"/metrics agrees on {name}",
            sample == after.total(name),
            f"{sample}, {after.total(name)}",
        )
    capacity, used = (after.status["device"][key] for key in ("capacity", "used"))
    weights = sum(row["bytes"] for row in after.models.values())
    report.expect("DEVICE stays within its budget", used <= capacity, f"{used:,} of {capacity:,}")
    report.expect(
        "the models are more than fit", weights > capacity, f"{weights / capacity:.1f} x DEVICE"
    )
