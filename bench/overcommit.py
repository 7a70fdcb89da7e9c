"""Scenario `overcommit`: 200 models of 8 MB, room for 40, beside servers that can do that.

Memory is limited alike: 40 models may be loaded, and all 200 lie in host memory, which is where a
peer finds its files, since the page cache keeps all of them: ours reads past that cache and has a
HOST tier of the same size instead.  Ours without a HOST tier is measured too: it has less memory
than the peers then, reads every model that is not loaded from the disk, and no condition is set.

The factor is asked against Ray Serve as it is released; its mode with HAProxy is shown beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from overcommit.bench import compare, peers, screen
from overcommit.bench.compare import OURS, Case, Comparing, Comparison, Contestant
from overcommit.bench.dialect import V2
from overcommit.bench.loadgen import Plan
from overcommit.bench.models_repo import ALLOW_CODE, make_tables
from overcommit.bench.peers import Job, Kind, Target
from overcommit.bench.popularity import ByZipf
from overcommit.bench.prepare import Options, run_folder
from overcommit.bench.report import Report
from overcommit.bench.server import Server
from overcommit.bench.tables import COLUMNS, ROW_BYTES, TablePlan, rows_of

MODELS: Final = 200
ROWS: Final = 8_000_000 // ROW_BYTES
SLOT_BYTES: Final = 8 << 20  # what an image of that size takes in DEVICE, at most
ROOM: Final = 40
BATCH_MAX: Final = 64
EXPONENT: Final = 1.1
CONNECTIONS: Final = 16
WARM_UP_S: Final = 3.0
SECONDS: Final = 15.0
QUICK_SECONDS: Final = 4.0
ROUNDS: Final = 3
QUICK_ROUNDS: Final = 2
TIMES: Final = 10.0
CASE: Final = f"{MODELS} models, room for {ROOM}, {CONNECTIONS} connections"
NO_HOST: Final = "overcommit, nothing in HOST"


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
        "host memory": f"{MODELS} x {SLOT_BYTES / 1e6:.1f} MB",
        "workers": 1,
    }
    repository = options.work / f"tables-{MODELS}"
    with screen.bar(report.console, "making models") as advance:
        seeds = make_tables(repository, MODELS, rows=ROWS, batch=BATCH_MAX, on_progress=advance)
    arrays = make_arrays(options.work / f"arrays-{MODELS}", seeds)
    with run_folder(options, report) as folder:
        names = dict.fromkeys(seeds, 1.0)
        job = Job(Kind.MULTIPLEXED, folder, names, COLUMNS, BATCH_MAX, arrays, ROOM)
        contestants = [
            _ours(OURS, MODELS, options, report, repository, folder, seeds),
            _ours(NO_HOST, 0, options, report, repository, folder, seeds),
        ]
        contestants += [_peer(name, job, options, report) for name in options.against]
        comparing = Comparing(
            report, rounds, min(WARM_UP_S, seconds), folder / "load.log", options.load_processes
        )
        comparison = comparing.run(contestants, [_case(options, seconds, seeds)])
    compare.add(report, comparison)
    expect(report, comparison)


def make_arrays(folder: Path, seeds: Mapping[str, int]) -> Path:
    """Write the tables as `NAME.npy`, as a user of a peer would keep them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in seeds.items():
        file = folder / f"{name}.npy"
        if not file.exists():
            aside = folder / ".making.npy"
            np.save(aside, rows_of(seed, np.arange(ROWS)))
            aside.rename(file)
    return folder


def _ours(
    name: str,
    host_models: int,
    options: Options,
    report: Report,
    repository: Path,
    folder: Path,
    models: Iterable[str],
) -> Contestant:
    """Our server with room for 40 models in DEVICE and for some more in HOST, all packed."""
    flags = [ALLOW_CODE, "--workers", "1", "--front-ends", "1"]
    flags += ["--device-memory", str(ROOM * SLOT_BYTES)]
    flags += ["--host-memory", str(host_models * SLOT_BYTES)]

    @contextlib.contextmanager
    def serve() -> Iterator[Target]:
        with Server(repository, options.work / "cache", folder, flags, OURS) as server:
            with screen.bar(report.console, "packing images") as advance:
                server.wait_packed(list(models), advance)
            note = f"one worker, one front end, room for {host_models} models in HOST"
            yield Target(name, "127.0.0.1", server.port, V2(), server.family, (note,))
            device = server.status()["device"]
            capacity, used = device["capacity"], device["used"]
            if used > capacity or capacity > ROOM * SLOT_BYTES:
                raise server.blame(f"uses {used:,} of {capacity:,} bytes in DEVICE")

    return Contestant(name, serve)


def _peer(name: str, job: Job, options: Options, report: Report) -> Contestant:
    return Contestant(name, lambda: peers.serve(name, job, options.work, report.step))


def _case(options: Options, seconds: float, seeds: Mapping[str, int]) -> Case:
    def plan(target: Target) -> Plan:
        return Plan(
            workload=TablePlan(
                models=tuple(seeds),
                seeds=tuple(seeds.values()),
                rows=ROWS,
                dialect=target.dialect,
                popularity=ByZipf(exponent=EXPONENT),
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
    for name in ("ray", "ray-haproxy"):
        if name not in comparison.names():
            continue
        rate = comparison.ratio(name, CASE, "rate")
        if name == "ray":
            report.expect(
                f"at least {TIMES:g} x {name}'s requests/s", rate.median >= TIMES, rate.text(1)
            )
        else:
            report.notes.append(f"requests/s, ours / {name}'s: {rate.text(1)}")
        late = comparison.ratio(name, CASE, "p99_ms")
        report.expect(f"p99 below {name}'s", late.median < 1, f"ours / its {late.text(3)}")
