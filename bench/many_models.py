"""Scenario `many_models`: 500 small models asked in turn, beside one model that gets everything.

The price of multiplexing: every request is another model's, so each has its own lane and its own lease,
and what shares a batch are versions of one program.  One model is measured twice: with batches of its
own, and without any, which is what many models would be without sharing.  The condition holds for both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from overcommit.bench import compare, screen
from overcommit.bench.compare import OURS, Case, Comparing, Comparison, Contestant
from overcommit.bench.dialect import V2
from overcommit.bench.echo import EchoPlan
from overcommit.bench.loadgen import Plan
from overcommit.bench.models_repo import ALLOW_CODE, make_echo, make_echoes
from overcommit.bench.peers import Target
from overcommit.bench.prepare import Options, run_folder
from overcommit.bench.report import Report
from overcommit.bench.server import Server

MODELS: Final = 500
INPUTS: Final = 4  # of each model
BATCH_MAX: Final = 64
CONNECTIONS: Final = (16, 64)
WARM_UP_S: Final = 1.0
SECONDS: Final = 4.0
QUICK_SECONDS: Final = 1.5
ROUNDS: Final = 5
QUICK_ROUNDS: Final = 2
RATIO_MIN: Final = 0.9
ALONE: Final = "alone"  # max_batch_size = 1
TOGETHER: Final = "together"


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    report.settings = {"models": MODELS, "rounds": rounds, "seconds": seconds, "workers": 1}
    root = options.work / f"echoes-{MODELS}"
    with screen.bar(report.console, "making models") as advance:
        scales = make_echoes(root, MODELS, batch=BATCH_MAX, on_progress=advance)
    make_echo(root, ALONE, batch=1)
    make_echo(root, TOGETHER, batch=BATCH_MAX)
    plans = {
        # As many different requests each: the client's memory is not a price of multiplexing.
        "one model, batches": EchoPlan(models=(TOGETHER,), inputs=MODELS * INPUTS),
        "one model, no batches": EchoPlan(models=(ALONE,), inputs=MODELS * INPUTS),
        f"{MODELS} models in turn": EchoPlan(
            models=tuple(scales), scales=tuple(scales.values()), inputs=INPUTS
        ),
    }
    cases = [
        _case(options, name, plan, connections, seconds)
        for connections in CONNECTIONS
        for name, plan in plans.items()
    ]
    with run_folder(options, report) as folder:
        ours = Contestant(OURS, lambda: _ours(options, report, root, folder, scales))
        comparing = Comparing(report, rounds, WARM_UP_S, folder / "load.log")
        comparison = comparing.run([ours], cases)
    compare.add(report, comparison)
    _expect(report, comparison)


@contextlib.contextmanager
def _ours(
    options: Options, report: Report, root: Path, folder: Path, scales: Mapping[str, float]
) -> Iterator[Target]:
    flags = [ALLOW_CODE, "--workers", "1", "--front-ends", "1"]
    flags += ["--device-memory", "512MiB", "--host-memory", "256MiB"]
    with Server(root, options.work / "cache", folder, flags, OURS) as server:
        with screen.bar(report.console, "packing images") as advance:
            server.wait_packed([*scales, ALONE, TOGETHER], advance)
        yield Target(OURS, "127.0.0.1", server.port, V2(), server.family)


def _name(name: str, connections: int) -> str:
    return f"{name}, {connections} connections"


def _case(options: Options, name: str, plan: EchoPlan, connections: int, seconds: float) -> Case:
    def make(target: Target) -> Plan:
        return Plan(
            workload=plan,
            host=target.host,
            port=target.port,
            connections=connections,
            seconds=seconds,
            seed=options.seed,
        )

    return Case(_name(name, connections), make)


def _expect(report: Report, comparison: Comparison) -> None:
    faults = [m for m in comparison.measurements if m.errors + m.wrong]
    report.expect("no request failed or was wrong", not faults, f"{faults[:2]}")
    many = f"{MODELS} models in turn"
    for connections in CONNECTIONS:
        for one in ("one model, no batches", "one model, batches"):
            top = comparison.values(OURS, _name(many, connections), "rate")
            bottom = comparison.values(OURS, _name(one, connections), "rate")
            ratio = compare.Spread.of([top[n] / bottom[n] for n in sorted(top)])
            report.expect(
                f"with {connections} connections, at least {RATIO_MIN:.0%} of the requests/s of "
                f"{one}",
                ratio.median >= RATIO_MIN,
                f"{many} / {one}, {connections} connections: {ratio.text(2)}",
            )
