"""Scenario `embedding`: MiniLM, 32 tokens, batched by the server, beside the same engine in a loop.

The loop (`bare_loop`) runs the same program over the same image, with as many threads and batches as
large as the server's, and nothing around it.  What is missing to its rows a second is the price of
serving: HTTP, rings, batching, and the client, which shares the processor.

"As large" is exact: twice as many connections as a batch holds keep one full batch waiting while
another runs.  With a bound above that the sizes fall where the first requests did, 5 and 27 in
turns, and no loop with their mean is beside them.

Each turn of the server stands between two of the loop and is held against their mean.  A turn that
others disturbed is taken again, a few times, as in `compare`; one that stayed disturbed says nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from overcommit.bench import cpu, screen
from overcommit.bench.bare_loop import Loop
from overcommit.bench.compare import OTHERS_CORES_MAX, TRIES_MAX, Spread
from overcommit.bench.errors import BenchError
from overcommit.bench.loadgen import Load, Plan
from overcommit.bench.prepare import VOCABULARY, Options, fleet_of, run_folder
from overcommit.bench.processes import read_row
from overcommit.bench.report import Figure, Report
from overcommit.bench.server import Server
from overcommit.bench.tally import Tally
from overcommit.bench.variants_repo import make_repository
from overcommit.bench.workload import EmbeddingPlan

TOKENS: Final = 32
INPUTS: Final = 4
BATCH: Final = 16
CONNECTIONS: Final = 2 * BATCH
MODEL_TOML: Final = f"[batching]\nmax_batch_size = {BATCH}\n"
FULL_MIN: Final = 0.95  # of a batch, in the mean: the first and the last of a turn are not full
WARM_UP_S: Final = 2.0
SECONDS: Final = 6.0
QUICK_SECONDS: Final = 2.5
ROUNDS: Final = 7
QUICK_ROUNDS: Final = 4
RATIO_MIN: Final = 0.95


@dataclass(slots=True, frozen=True)
class Round:
    """One turn of the server, and the loop before and after it."""

    served: float  # 1/s
    bare: float  # 1/s, the mean of both
    batch: float  # requests in a batch of the server, in the mean
    others: float  # cores that neither of them used
    tally: Tally

    @property
    def is_calm(self) -> bool:
        """Whether others left the machine alone."""
        return self.others <= OTHERS_CORES_MAX

    @property
    def ratio(self) -> float:
        """The server's throughput as a share of the loop's."""
        return self.served / self.bare


class Bare:
    """The loop's process."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    def tell(self, line: bytes) -> bytes:
        """Send a line, return the answer to it.  Raises BenchError when the loop has ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(line + b"\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise BenchError(f"the bare loop ended:\n{self._log.read_text()[-2000:]}")
        return answer

    def rate(self) -> float:
        """Run the loop for its time; return its rows a second."""
        return float(self.tell(b"go"))

    def cpu_seconds(self) -> float:
        """Return what it has used so far."""
        row = read_row(self._process.pid)
        return 0.0 if row is None else cpu.seconds_of([row])


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    count = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    threads = len(os.sched_getaffinity(0))
    report.settings = {
        "tokens": TOKENS,
        "connections": CONNECTIONS,
        "max_batch_size": BATCH,
        "rounds": count,
        "seconds": seconds,
        "threads": threads,
    }
    root = options.work / "encoder"
    with screen.bar(report.console, "making models") as advance:
        folders = make_repository(root, 1, advance)
    fleet = fleet_of(options, report, folders, VOCABULARY, (TOKENS,) * INPUTS)
    (name,) = fleet.names
    (folders[name] / "model.toml").write_text(MODEL_TOML)
    flags = ["--workers", "1", "--worker-threads", str(threads), "--front-ends", "1"]
    flags += ["--device-memory", "512MiB", "--host-memory", "256MiB"]
    with (
        run_folder(options, report) as folder,
        Server(fleet.repository, root / "cache", folder, flags) as server,
    ):
        fleet.references.save(folder / "references.npz")
        server.wait_packed([name])
        warm_up = _load(report, server, folder, WARM_UP_S, "warming up")
        loop = Loop(
            image=str(server.image_of(name)),
            batch=BATCH,
            tokens=TOKENS,
            threads=threads,
            seconds=seconds / 2,
            vocabulary=VOCABULARY,
        )
        with _bare(loop, folder) as bare:
            bare.rate()
            rounds = [
                _round(report, server, bare, folder, seconds, f"round {number + 1} of {count}")
                for number in range(count)
            ]
    _report(report, rounds, warm_up)


def _round(
    report: Report, server: Server, bare: Bare, folder: Path, seconds: float, what: str
) -> Round:
    """Take a turn, again while others disturb it; return the least disturbed."""
    found: list[Round] = []
    while len(found) < TRIES_MAX and not (found and found[-1].is_calm):
        before, started_s = _others_seconds(server, bare), time.monotonic()
        first = bare.rate()
        counted = _counted(server)
        tally = _load(report, server, folder, seconds, what)
        requests, batches = (
            after - earlier for after, earlier in zip(_counted(server), counted, strict=True)
        )
        if not batches:
            raise BenchError("/metrics shows no batch")
        last = bare.rate()
        others = (_others_seconds(server, bare) - before) / (time.monotonic() - started_s)
        found.append(
            Round(tally.rate, (first + last) / 2, requests / batches, max(0.0, others), tally)
        )
    best = min(found, key=lambda one: one.others)
    said = f"{what}: {best.served:.1f}/s served, {best.bare:.1f}/s in a bare loop"
    if not best.is_calm:
        said += f"; disturbed: others used {best.others:.2f} cores"
    report.step(said)
    return best


def _report(report: Report, rounds: list[Round], warm_up: Tally) -> None:
    tallies = [warm_up, *(one.tally for one in rounds)]
    count, rounds = len(rounds), [one for one in rounds if one.is_calm] or rounds
    calm = sum(one.is_calm for one in rounds)
    ratio = Spread.of([one.ratio for one in rounds])
    served = Spread.of([one.served for one in rounds]).median
    bare = Spread.of([one.bare for one in rounds]).median
    batch = min(one.batch for one in rounds)
    times = [one.tally.times() for one in rounds]
    client_us = Spread.of([one.tally.cpu_us_per_request for one in rounds]).median
    report.add(
        f"MiniLM, {TOKENS} tokens",
        Figure(
            *("embeddings", served, "1/s", bare),
            f"limit: a bare loop with batches of {BATCH}; by round {ratio.text(3)}",
        ),
        Figure("requests in a batch", batch, note="the smallest mean of a round"),
        *(
            Figure(
                f"p{share * 100:g}",
                Spread.of([t.quantile(share) for t in times]).median / 1e6,
                "ms",
            )
            for share in (0.5, 0.99)
        ),
        Figure("load generator's CPU", client_us, "us", note="a request, within the price"),
        Figure("disturbed by others", max(one.others for one in rounds), "cores", note="at worst"),
    )
    report.headlines.append(
        (
            f"MiniLM embeddings, {TOKENS} tokens, {CONNECTIONS} connections",
            f"{served:,.0f}/s",
            f"the engine in a bare loop {bare:,.0f}/s ({ratio.median:.0%})",
        )
    )
    faults = sum(tally.accounted - tally.right for tally in tallies)
    report.expect("every answer is what transformers computes", not faults, f"{faults} are not")
    report.expect(
        "batches are as large as the loop's", batch >= FULL_MIN * BATCH, f"{batch:.2f} of {BATCH}"
    )
    report.expect(
        f"at least {RATIO_MIN:.0%} of the bare loop",
        calm > 0 and ratio.median >= RATIO_MIN,
        f"{ratio.text(3)}, {calm} of {count} rounds undisturbed",
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


def _counted(server: Server) -> tuple[float, float]:
    """Return the requests that were answered and their batches, ever; there is one model."""
    samples = server.metrics()

    def total(what: str) -> float:
        begin = f"overcommit_model_{what}_total{{"
        return sum(value for name, value in samples.items() if name.startswith(begin))

    return total("success"), total("batches")


def _others_seconds(server: Server, bare: Bare) -> float:
    """Return the CPU time that neither the server nor the harness has used, ever."""
    mine = cpu.seconds_of(server.family()) + bare.cpu_seconds() + cpu.own_seconds()
    return cpu.machine_seconds() - mine


@contextmanager
def _bare(loop: Loop, folder: Path) -> Iterator[Bare]:
    """Run the loop's process."""
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
        bare = Bare(process, log)
        try:
            bare.tell(msgspec.json.encode(loop))
            yield bare
        finally:
            process.kill()
