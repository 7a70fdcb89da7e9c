"""Scenario `front_ends`: what a second front end is worth, and what a request costs whom.

Where the clients are on other machines, the front ends and the workers have the cores to themselves,
and a server is as fast as its busiest kind of process allows:

    requests/s = min(F / f, W / w, cores / (f + w))

with F front ends that spend f seconds on a request and W workers that spend w.  f and w are measured
here, by process.  The client shares the cores, so two things make it like a remote one: it stays on
one core, and the request is one that costs a front end far more than anybody else (1,024 numbers as
JSON), so that what limits is what limits on a machine with more cores.  The small request is there
too, without a condition: with it, three parties of equal size share two cores.

What the formula says for 16 cores is printed as what it is: a formula's word, not a measurement.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from overcommit.bench import compare
from overcommit.bench.compare import OURS, Case, Comparing, Comparison, Contestant
from overcommit.bench.dialect import V2
from overcommit.bench.echo import EchoPlan
from overcommit.bench.loadgen import Plan
from overcommit.bench.models_repo import ALLOW_CODE, make_echo
from overcommit.bench.peers import Target
from overcommit.bench.prepare import Options, run_folder
from overcommit.bench.report import Figure, Report
from overcommit.bench.server import Server

SCALE: Final = 1.5
BATCH_MAX: Final = 64
CONNECTIONS: Final = 64
WIDTHS: Final = {"16 numbers": 16, "1,024 numbers": 1024}
HEAVY: Final = "1,024 numbers"
WARM_UP_S: Final = 1.0
SECONDS: Final = 4.0
QUICK_SECONDS: Final = 1.5
ROUNDS: Final = 5
QUICK_ROUNDS: Final = 2
MEMORY: Final = "256MiB"
TWO: Final = "overcommit, 2 front ends"
FRONT_END: Final = "front ends"
WORKER: Final = "worker"
CORES: Final = 16


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    cpus = sorted(os.sched_getaffinity(0))
    report.settings = {
        "rounds": rounds,
        "seconds": seconds,
        "workers": 1,
        "client on core": cpus[-1],
    }
    with run_folder(options, report) as folder:
        contestants = [
            Contestant(OURS, lambda: _serve(options, folder, OURS, 1)),
            Contestant(TWO, lambda: _serve(options, folder, TWO, 2)),
        ]
        cases = [_case(options, name, seconds, cpus[-1]) for name in WIDTHS]
        comparing = Comparing(report, rounds, min(WARM_UP_S, seconds), folder / "load.log")
        comparison = comparing.run(contestants, cases)
    compare.add(report, comparison)
    _add_costs(report, comparison)
    _expect(report, comparison, len(cpus))


@contextlib.contextmanager
def _serve(options: Options, folder: Path, name: str, front_ends: int) -> Iterator[Target]:
    repository = options.work / "front-ends"
    for width in WIDTHS.values():
        make_echo(repository, _model(width), SCALE, columns=width, batch=BATCH_MAX)
    flags = [ALLOW_CODE, "--workers", "1", "--front-ends", str(front_ends)]
    flags += ["--device-memory", MEMORY, "--host-memory", MEMORY]
    with Server(
        repository, options.work / "cache", folder, flags, f"{front_ends}-fronts"
    ) as server:
        server.wait_packed([_model(width) for width in WIDTHS.values()])
        kinds = {"front_end": FRONT_END, "worker": WORKER}
        roles = {
            int(row["pid"]): kinds[row["kind"]]
            for row in server.status()["processes"]
            if row["kind"] in kinds
        }
        yield Target(name, "127.0.0.1", server.port, V2(), server.family, roles=roles)


def _model(width: int) -> str:
    return f"echo-{width}"


def _case(options: Options, name: str, seconds: float, cpu: int) -> Case:
    def plan(target: Target) -> Plan:
        width = WIDTHS[name]
        return Plan(
            workload=EchoPlan(models=(_model(width),), scales=(SCALE,), columns=width),
            host=target.host,
            port=target.port,
            connections=CONNECTIONS,
            seconds=seconds,
            seed=options.seed,
            cpus=(cpu,),
        )

    return Case(name, plan)


def bound(
    front_end_us: float, worker_us: float, front_ends: int, workers: int, cores: int
) -> float:
    """Return the requests/s that no more than these processes on these cores can answer."""
    return 1e6 * min(
        front_ends / front_end_us, workers / worker_us, cores / (front_end_us + worker_us)
    )


def best(front_end_us: float, worker_us: float, cores: int) -> tuple[int, float]:
    """Return how many front ends, with a worker on every other core, answer most; and the bound."""
    rates = {
        count: bound(front_end_us, worker_us, count, cores - count, cores)
        for count in range(1, cores)
    }
    count = max(rates, key=lambda each: rates[each])
    return count, rates[count]


def _cost(comparison: Comparison, name: str, case: str, role: str) -> float:
    found = [
        m.by_role[role]
        for m in comparison.measurements
        if m.contestant == name and m.case == case and role in m.by_role
    ]
    return compare.Spread.of(found).median


def _add_costs(report: Report, comparison: Comparison) -> None:
    for case in comparison.cases():
        for name in (OURS, TWO):
            front, worker = (_cost(comparison, name, case, role) for role in (FRONT_END, WORKER))
            client = comparison.spread(name, case, "load_us").median
            report.add(
                f"{case}: CPU a request",
                Figure(f"{name}: {FRONT_END}", front, "us"),
                Figure(f"{name}: {WORKER}", worker, "us"),
                Figure(f"{name}: client", client, "us"),
            )
        front, worker = (_cost(comparison, OURS, case, role) for role in (FRONT_END, WORKER))
        count, rate = best(front, worker, CORES)
        report.notes.append(
            f"{case}: by the formula, {CORES} cores without the client give at most {rate:,.0f}/s, "
            f"with {count} front ends and {CORES - count} workers; not measured"
        )


def _expect(report: Report, comparison: Comparison, cores: int) -> None:
    faults = [m for m in comparison.measurements if m.errors + m.wrong]
    report.expect("no request failed or was wrong", not faults, f"{faults[:2]}")
    ratios: dict[str, compare.Spread] = {}
    for case in comparison.cases():
        two, one = (comparison.values(name, case, "rate") for name in (TWO, OURS))
        ratios[case] = compare.Spread.of(_ratios(two, one))
        report.notes.append(f"{case}: two front ends / one: {ratios[case].text(2)}")
    if cores > 1:
        ratio = ratios[HEAVY]
        report.expect(
            f"two front ends beat one where they are what limits ({HEAVY})",
            ratio.median > 1,
            f"{ratio.text(2)} x",
        )


def _ratios(two: dict[int, float], one: dict[int, float]) -> Sequence[float]:
    return [two[number] / one[number] for number in sorted(two.keys() & one.keys())]
