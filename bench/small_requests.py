"""Scenario `small_requests`: FP32 [1,16] in JSON, one worker, one front end, beside other servers.

Nothing is computed to speak of: what is measured is everything around a model.  The limit is the
loop-back ping-pong rate: the same bytes there and back, with no server between them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from overcommit.bench import compare, peers, pingpong
from overcommit.bench.compare import OURS, Case, Comparing, Comparison, Contestant
from overcommit.bench.dialect import V2, Grpc
from overcommit.bench.echo import EchoPlan
from overcommit.bench.loadgen import Plan
from overcommit.bench.models_repo import ALLOW_CODE, make_echo
from overcommit.bench.peers import Job, Kind, Target
from overcommit.bench.prepare import Options, run_folder
from overcommit.bench.report import Report
from overcommit.bench.server import Server

CONNECTIONS: Final = (1, 16, 64, 256)
SCALE: Final = 2.0
WIDTH: Final = 16
BATCH_MAX: Final = 64
WARM_UP_S: Final = 0.8
SECONDS: Final = 4.0
QUICK_SECONDS: Final = 1.2
ROUNDS: Final = 5
QUICK_ROUNDS: Final = 3
MEMORY: Final = "256MiB"
# (peer, connections, at least this many times its requests a second)
RATES: Final = (("triton", 16, 3.0), ("triton", 64, 3.0), ("mosec", 64, 2.0))


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    report.settings = {
        "against": ", ".join(options.against) or "nobody",
        "rounds": rounds,
        "seconds": seconds,
        "load processes": options.load_processes,
        "workers": 1,
        "front ends": 1,
        "protocol": options.protocol,
    }
    with run_folder(options, report) as folder:
        contestants = [Contestant(OURS, lambda: ours(options, folder))]
        contestants += [_peer(name, options, report, folder) for name in options.against]
        cases = [_case(options, connections, seconds) for connections in CONNECTIONS]
        report.step("measuring the loop-back ping-pong")
        limits = {name_of(count): pingpong.measure(count) for count in CONNECTIONS}
        comparing = Comparing(
            report, rounds, min(WARM_UP_S, seconds), folder / "load.log", options.load_processes
        )
        comparison = comparing.run(contestants, cases)
    compare.add(report, comparison, limits)
    expect(report, comparison)


def name_of(connections: int) -> str:
    """Name a case."""
    return "1 connection" if connections == 1 else f"{connections} connections"


@contextlib.contextmanager
def ours(options: Options, folder: Path) -> Iterator[Target]:
    """Run our server."""
    repository = options.work / "small-requests"
    make_echo(repository, "echo", SCALE, columns=WIDTH, batch=BATCH_MAX)
    flags = [ALLOW_CODE, "--workers", "1", "--front-ends", "1"]
    flags += ["--device-memory", MEMORY, "--host-memory", MEMORY]
    with Server(repository, options.work / "cache", folder, flags, OURS) as server:
        server.wait_packed(["echo"])
        note = f"batches of up to {BATCH_MAX}, no queue delay, one worker, one front end"
        if options.protocol == "grpc":
            port = server.grpc_port
            yield Target(OURS, "127.0.0.1", port, Grpc(), server.family, (note,))
            return
        yield Target(OURS, "127.0.0.1", server.port, V2(), server.family, (note,))


def _peer(name: str, options: Options, report: Report, folder: Path) -> Contestant:
    scales = {"echo": SCALE}
    job = Job(Kind.ECHO, folder, scales, WIDTH, BATCH_MAX, protocol=options.protocol)
    return Contestant(name, lambda: peers.serve(name, job, options.work, report.step))


def _case(options: Options, connections: int, seconds: float) -> Case:
    def plan(target: Target) -> Plan:
        return Plan(
            workload=EchoPlan(dialect=target.dialect, scales=(SCALE,), columns=WIDTH),
            host=target.host,
            port=target.port,
            connections=connections,
            seconds=seconds,
            seed=options.seed,
        )

    return Case(name_of(connections), plan)


def expect(report: Report, comparison: Comparison) -> None:
    """Judge: every answer right, and the conditions against each peer that was measured."""
    faults = [m for m in comparison.measurements if m.contestant == OURS and m.errors + m.wrong]
    report.expect("none of our requests failed or was wrong", not faults, f"{faults[:2]}")
    measured = comparison.names()
    if "grpc" in report.settings.values():
        return  # the conditions are about HTTP
    for peer, connections, times in RATES:
        if peer in measured:
            ratio = comparison.ratio(peer, name_of(connections), "rate")
            report.expect(
                f"at least {times:g} x {peer}'s requests/s with {name_of(connections)}",
                ratio.median >= times,
                ratio.text(2),
            )
    for peer in ("triton", "mosec"):
        if peer not in measured:
            continue
        for case in comparison.cases():
            ratio = comparison.ratio(peer, case, "p99_ms")
            report.expect(
                f"p99 below {peer}'s with {case}", ratio.median < 1, f"ours / it {ratio.text(2)}"
            )
    if "triton" in measured:
        ratio = comparison.ratio("triton", name_of(1), "p50_ms")
        report.expect(
            "p50 of one connection below triton's", ratio.median < 1, f"ours / it {ratio.text(2)}"
        )
