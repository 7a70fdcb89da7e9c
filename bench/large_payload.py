"""Scenario `large_payload`: binary tensors of 64 KiB to 16 MiB there and back, to the last bit.

The limit of each size is measured in the same round: the same bytes over the same loop-back, copied
twice on the far side, which is what a server whose workers are processes of their own cannot avoid.
Then a thousand of the largest: the memory of the server's processes must stay where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from overcommit.bench import loopback, screen
from overcommit.bench.compare import Spread
from overcommit.bench.loadgen import Load, Plan
from overcommit.bench.models_repo import ALLOW_CODE, make_echo
from overcommit.bench.payloads import PayloadPlan
from overcommit.bench.prepare import Options, run_folder
from overcommit.bench.processes import pss_bytes
from overcommit.bench.report import Figure, Report
from overcommit.bench.server import Server
from overcommit.bench.tally import Tally
from overcommit.runtime.config import KIB, MIB

SIZES: Final = (64 * KIB, 1 * MIB, 16 * MIB)
SECONDS: Final = 4.0
QUICK_SECONDS: Final = 2.0
ROUNDS: Final = 5
QUICK_ROUNDS: Final = 3
RATIO_MIN: Final = 0.6  # of the largest
REQUESTS_FLAT: Final = 1000
CHUNK_S: Final = 10.0
SPARE: Final = 1.05  # of the time that those which are missing should take
GROWTH_MAX: Final = 32 * MIB
MODEL: Final = "payload"


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    report.settings = {"rounds": rounds, "seconds": seconds, "connections": 1, "workers": 1}
    root = options.work / "payload"
    make_echo(root, MODEL, columns=-1, batch=4)
    flags = [ALLOW_CODE, "--workers", "1", "--front-ends", "1"]
    flags += ["--device-memory", "256MiB", "--host-memory", "256MiB"]
    tallies: list[Tally] = []
    with (
        run_folder(options, report) as folder,
        Server(root, options.work / "cache", folder, flags) as server,
    ):
        server.wait_packed([MODEL])
        ours: dict[int, list[float]] = {nbytes: [] for nbytes in SIZES}
        limits: dict[int, list[float]] = {nbytes: [] for nbytes in SIZES}
        slowest: dict[int, list[float]] = {nbytes: [] for nbytes in SIZES}
        for number in range(rounds):
            for nbytes in SIZES:
                what = f"round {number + 1} of {rounds}: {_name(nbytes)}"
                limits[nbytes].append(loopback.measure_bandwidth(nbytes, 1, seconds / 2))
                _load(report, server, folder, nbytes, seconds / 2, f"{what}: warming up")
                tally = _load(report, server, folder, nbytes, seconds, what)
                tallies.append(tally)
                ours[nbytes].append(tally.rate * nbytes)
                slowest[nbytes].append(tally.times().quantile(0.99) / 1e6)
                share = ours[nbytes][-1] / limits[nbytes][-1]
                report.step(f"{what}: {ours[nbytes][-1] / 1e9:.2f} GB/s, {share:.0%} of the limit")
        for nbytes in SIZES:
            _figures(report, nbytes, ours[nbytes], limits[nbytes], slowest[nbytes])
        _watch_memory(report, server, folder, tallies)
    right, faults = sum(t.right for t in tallies), sum(t.accounted - t.right for t in tallies)
    report.expect(
        "every answer is its request, bit for bit",
        not faults and right > 0,
        f"{faults} of {right + faults} are not",
    )


def _name(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= MIB else f"{nbytes >> 10} KiB"


def _load(
    report: Report, server: Server, folder: Path, nbytes: int, seconds: float, what: str
) -> Tally:
    plan = Plan(
        workload=PayloadPlan(nbytes=nbytes, models=(MODEL,)),
        port=server.port,
        connections=1,
        seconds=seconds,
    )
    with Load(plan, folder / "load.log") as load:
        return screen.watch(report.console, what, load)


def _figures(
    report: Report, nbytes: int, ours: list[float], limits: list[float], p99_ms: list[float]
) -> None:
    rate, limit = Spread.of(ours), Spread.of(limits)
    ratio = Spread.of([mine / most for mine, most in zip(ours, limits, strict=True)])
    note = f"ratio by round {ratio.text(2)}; limit: loop-back with two copies"
    name = _name(nbytes)
    report.add(
        "one way of the way there and back",
        Figure(f"{name}: bandwidth", rate.median / 1e9, "GB/s", limit.median / 1e9, note),
        Figure(f"{name}: requests", rate.median / nbytes, "1/s"),
        Figure(f"{name}: p99", Spread.of(p99_ms).median, "ms"),
    )
    report.headlines.append(
        (
            f"{name} there and back",
            f"{rate.median / 1e9:.2f} GB/s each way",
            f"{limit.median / 1e9:.2f} GB/s ({ratio.median:.0%})",
        )
    )
    if nbytes == SIZES[-1]:
        report.expect(
            f"{name}: at least {RATIO_MIN:.0%} of the loop-back with two copies",
            ratio.median >= RATIO_MIN,
            ratio.text(2),
        )


def _watch_memory(report: Report, server: Server, folder: Path, tallies: list[Tally]) -> None:
    before = _memory(server)
    done, rate = 0, tallies[-1].rate  # of the largest
    while done < REQUESTS_FLAT:
        what = f"{done} of {REQUESTS_FLAT} large requests"
        seconds = min(CHUNK_S, SPARE * (REQUESTS_FLAT - done) / max(rate, 1.0))
        tally = _load(report, server, folder, SIZES[-1], max(1.0, seconds), what)
        tallies.append(tally)
        rate = tally.rate
        done += tally.right
        if not tally.right:
            break
    grown = _memory(server) - before
    report.add(
        "memory",
        Figure("all processes before (PSS)", before / 1e6, "MB"),
        Figure(f"growth over {done} requests", grown / 1e6, "MB"),
    )
    report.expect(
        f"memory is flat over {REQUESTS_FLAT} requests of {_name(SIZES[-1])}",
        grown <= GROWTH_MAX and done >= REQUESTS_FLAT,
        f"{grown / 1e6:+.1f} MB over {done}",
    )


def _memory(server: Server) -> int:
    return sum(pss_bytes(row.pid) for row in server.family())
