"""Scenario `overcommit`: 200 models of 8 MB, room for 40, beside servers that can do that.

Memory is limited alike: ours has a DEVICE tier for 40 models and no HOST tier; a peer may hold 40
models.  Files are not limited alike, in the peers' favour: they read theirs through the page cache,
which holds all of them; ours reads past it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from overcommit.bench import compare, peers, screen
from overcommit.bench.compare import OURS, Case, Comparison, Contestant
from overcommit.bench.dialect import Dialect
from overcommit.bench.echo import EchoPlan
from overcommit.bench.echo_repo import table_repository
from overcommit.bench.loadgen import Plan
from overcommit.bench.peers import Job, Kind, Target
from overcommit.bench.prepare import Options, run_folder
from overcommit.bench.report import Report
from overcommit.bench.server import Server

MODELS: Final = 200
MODEL_BYTES: Final = 8_000_000
SLOT_BYTES: Final = 8 << 20  # what an image of that size takes in DEVICE, at most
ROOM: Final = 40
WIDTH: Final = 16
BATCH_MAX: Final = 64
EXPONENT: Final = 1.1
CONNECTIONS: Final = 16
WARM_UP_S: Final = 4.0
SECONDS: Final = 15.0
QUICK_SECONDS: Final = 6.0
ROUNDS: Final = 3
QUICK_ROUNDS: Final = 2
TIMES: Final = 10.0
CASE: Final = f"{MODELS} models, room for {ROOM}, {CONNECTIONS} connections"
SCALES: Final = {f"table-{number:03}": 1 + number / 256 for number in range(MODELS)}


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    report.settings = {
        "against": ", ".join(options.against) or "nobody",
        "rounds": rounds,
        "seconds": seconds,
        "Zipf": EXPONENT,
        "device memory": f"{ROOM} x {SLOT_BYTES / 1e6:.1f} MB",
        "host memory": "none",
        "workers": 1,
    }
    with screen.bar(report.console, "making models") as advance:
        repository, arrays = table_repository(
            options.work, SCALES, MODEL_BYTES, WIDTH, BATCH_MAX, advance
        )
    with run_folder(options, report) as folder:
        job = Job(Kind.MULTIPLEXED, folder, SCALES, WIDTH, BATCH_MAX, arrays, ROOM)
        contestants = [Contestant(OURS, lambda: ours(options, report, repository, folder))]
        contestants += [_peer(name, job, options, report) for name in options.against]
        comparison = compare.run(
            report,
            contestants,
            [_case(options, seconds)],
            rounds,
            min(WARM_UP_S, seconds),
            folder / "load.log",
            options.load_processes,
        )
    compare.add(report, comparison)
    expect(report, comparison)


@contextlib.contextmanager
def ours(options: Options, report: Report, repository: Path, folder: Path) -> Iterator[Target]:
    """Run our server with room for 40 models, all of them packed."""
    flags = ["--allow-code", "--workers", "1", "--front-ends", "1"]
    flags += ["--device-memory", str(ROOM * SLOT_BYTES), "--host-memory", "0"]
    with Server(repository, options.work / "cache", folder, flags, OURS) as server:
        with screen.bar(report.console, "packing images") as advance:
            server.wait_packed(list(SCALES), advance)
        note = "one worker, one front end, images read with O_DIRECT where the disk allows it"
        yield Target(OURS, "127.0.0.1", server.port, Dialect(), server.family, (note,))
        device = server.status()["device"]
        capacity, used = device["capacity"], device["used"]
        report.expect(
            f"DEVICE has no more than {ROOM} models' room",
            used <= capacity <= ROOM * SLOT_BYTES,
            f"{used / 1e6:.0f} of {capacity / 1e6:.0f} MB",
        )


def _peer(name: str, job: Job, options: Options, report: Report) -> Contestant:
    return Contestant(name, lambda: peers.serve(name, job, options.work, report.step))


def _case(options: Options, seconds: float) -> Case:
    def plan(target: Target) -> Plan:
        return Plan(
            workload=EchoPlan(
                dialect=target.dialect, scales=SCALES, width=WIDTH, exponent=EXPONENT
            ),
            host=target.host,
            port=target.port,
            connections=CONNECTIONS,
            seconds=seconds,
            seed=options.seed,
        )

    return Case(CASE, plan)


def expect(report: Report, comparison: Comparison) -> None:
    """Judge: every answer right, and the conditions against Ray."""
    faults = [m for m in comparison.measurements if m.contestant == OURS and m.errors + m.wrong]
    report.expect("none of our requests failed or was wrong", not faults, f"{faults[:2]}")
    if "ray" in comparison.names():
        ratio = comparison.ratio("ray", CASE, "rate")
        report.expect(
            f"at least {TIMES:g} x Ray's requests/s", ratio.median >= TIMES, ratio.text(1)
        )
        ratio = comparison.ratio("ray", CASE, "p99_ms")
        report.expect("p99 below Ray's", ratio.median < 1, f"ours / its {ratio.text(3)}")
