"""Scenario `embedding`: MiniLM, 32 tokens, batched by the server, beside the same engine in a loop.

The loop (`bare_loop`) runs the same program over the same image, with as many threads and batches as
large as those that the server formed, and nothing around it.  What is missing to its rows a second
is the price of serving: HTTP, rings, batching, and the client, which shares the processor.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from overcommit.bench import screen
from overcommit.bench.bare_loop import Loop
from overcommit.bench.compare import Spread
from overcommit.bench.errors import BenchError
from overcommit.bench.loadgen import Load, Plan
from overcommit.bench.prepare import VOCABULARY, Fleet, Options, fleet_of, run_folder
from overcommit.bench.report import Figure, Report
from overcommit.bench.server import Server
from overcommit.bench.tally import Tally
from overcommit.bench.variants_repo import make_repository
from overcommit.bench.workload import EmbeddingPlan

TOKENS: Final = 32
INPUTS: Final = 4
CONNECTIONS: Final = 32
WARM_UP_S: Final = 4.0
SECONDS: Final = 10.0
QUICK_SECONDS: Final = 4.0
ROUNDS: Final = 5
QUICK_ROUNDS: Final = 3
RATIO_MIN: Final = 0.95


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    threads = len(os.sched_getaffinity(0))
    report.settings = {
        "tokens": TOKENS,
        "connections": CONNECTIONS,
        "rounds": rounds,
        "seconds": seconds,
        "threads": threads,
    }
    root = options.work / "encoder"
    with screen.bar(report.console, "making models") as advance:
        folders = make_repository(root, 1, advance)
    fleet = fleet_of(options, report, folders, VOCABULARY, (TOKENS,) * INPUTS)
    (name,) = fleet.names
    flags = ["--workers", "1", "--worker-threads", str(threads), "--front-ends", "1"]
    flags += ["--device-memory", "512MiB", "--host-memory", "256MiB"]
    served: list[float] = []
    bare: list[float] = []
    tallies: list[Tally] = []
    cache = root / "cache"
    with (
        run_folder(options, report) as folder,
        Server(fleet.repository, cache, folder, flags) as server,
    ):
        fleet.references.save(folder / "references.npz")
        server.wait_packed([name])
        _load(report, server, folder, WARM_UP_S, "warming up")
        before = server.metrics()
        tallies.append(_load(report, server, folder, seconds, "finding the batch size"))
        batch = _batch_size(before, server.metrics(), name)
        report.step(f"batches of {batch:.1f} requests")
        loop = Loop(
            image=str(_image(fleet, cache)),
            batch=max(1, round(batch)),
            tokens=TOKENS,
            threads=threads,
            seconds=seconds,
            vocabulary=VOCABULARY,
        )
        with _bare(loop, folder) as ask:
            ask()
            for number in range(rounds):
                bare.append(ask())
                what = f"round {number + 1} of {rounds}"
                tallies.append(_load(report, server, folder, seconds, what))
                served.append(tallies[-1].rate)
                report.step(f"{what}: {served[-1]:.1f}/s served, {bare[-1]:.1f}/s in a bare loop")
    _report(report, batch, served, bare, tallies)


def _report(
    report: Report, batch: float, served: list[float], bare: list[float], tallies: list[Tally]
) -> None:
    ratio = Spread.of([mine / most for mine, most in zip(served, bare, strict=True)])
    times = [tally.times() for tally in tallies[1:]]
    report.add(
        f"MiniLM, {TOKENS} tokens",
        Figure(
            "embeddings",
            Spread.of(served).median,
            "1/s",
            Spread.of(bare).median,
            f"limit: a bare loop with batches of {max(1, round(batch))}; by round {ratio.text(3)}",
        ),
        Figure("requests in a batch", batch),
        *(
            Figure(
                f"p{share * 100:g}",
                Spread.of([t.quantile(share) for t in times]).median / 1e6,
                "ms",
            )
            for share in (0.5, 0.99)
        ),
    )
    most = Spread.of(bare).median
    report.headlines.append(
        (
            f"MiniLM embeddings, {TOKENS} tokens, {CONNECTIONS} connections",
            f"{Spread.of(served).median:,.0f}/s",
            f"the engine in a bare loop {most:,.0f}/s ({ratio.median:.0%})",
        )
    )
    faults = sum(tally.accounted - tally.right for tally in tallies)
    report.expect("every answer is what transformers computes", not faults, f"{faults} are not")
    report.expect(
        f"at least {RATIO_MIN:.0%} of the bare loop", ratio.median >= RATIO_MIN, ratio.text(3)
    )


def _load(report: Report, server: Server, folder: Path, seconds: float, what: str) -> Tally:
    plan = Plan(
        workload=EmbeddingPlan(references=str(folder / "references.npz"), json_share=0.0),
        port=server.port,
        connections=CONNECTIONS,
        seconds=seconds,
    )
    with Load(plan, folder / "load.log") as load:
        return screen.watch(report.console, what, load)


def _batch_size(before: dict[str, float], after: dict[str, float], name: str) -> float:
    def grown(metric: str) -> float:
        sample = f'overcommit_model_{metric}_total{{model="{name}",version="1"}}'
        return after.get(sample, 0.0) - before.get(sample, 0.0)

    batches = grown("batches")
    if not batches:
        raise BenchError(f"/metrics shows no batch of {name}")
    return grown("success") / batches


def _image(fleet: Fleet, cache: Path) -> Path:
    images = sorted((cache / "images").glob("*.image"), key=lambda path: path.stat().st_mtime)
    if not images:
        raise BenchError(f"{cache} holds no image of {fleet.names[0]}")
    return images[-1]


@contextmanager
def _bare(loop: Loop, folder: Path) -> Iterator[Callable[[], float]]:
    """Run the loop's process; yields a function that runs a round and returns its rows a second."""
    log = folder / "bare.log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-P", "-m", "overcommit.bench.bare_loop"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def tell(line: bytes) -> bytes:
            stdin.write(line + b"\n")
            stdin.flush()
            answer = stdout.readline()
            if not answer:
                raise BenchError(f"the bare loop ended:\n{log.read_text()[-2000:]}")
            return answer

        try:
            tell(msgspec.json.encode(loop))
            yield lambda: float(tell(b"go"))
        finally:
            process.kill()
