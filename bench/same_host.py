"""Scenario `same_host`: what the Python client gains by shared memory, there and back, to the last bit.

Two clients of one server, one with shared memory and one without, ask in turns, so that whatever else the
machine does falls on both.  The limit is none of the machine's: the binary body is what both would be
without.
"""

from __future__ import annotations

import statistics
import time
from typing import Final

import numpy as np

import overcommit
from overcommit.bench.errors import BenchError
from overcommit.bench.models_repo import ALLOW_CODE, make_echo
from overcommit.bench.prepare import Options, run_folder
from overcommit.bench.report import Figure, Report
from overcommit.bench.server import Server
from overcommit.runtime.config import KIB, MIB

SIZES: Final = (512 * KIB, 1 * MIB, 4 * MIB, 16 * MIB)
PAIRS: Final = 200
QUICK_PAIRS: Final = 50
WARM_UP: Final = 8
RATIO_MIN: Final = 1.0
MODEL: Final = "payload"


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    pairs = QUICK_PAIRS if options.quick else PAIRS
    report.settings = {"pairs": pairs, "connections": 1, "workers": 1}
    root = options.work / "payload"
    make_echo(root, MODEL, columns=-1, batch=4)
    flags = [ALLOW_CODE, "--workers", "1", "--front-ends", "1", "--client-shared-memory"]
    flags += ["--device-memory", "256MiB", "--host-memory", "256MiB"]
    with (
        run_folder(options, report) as folder,
        Server(root, options.work / "cache", folder, flags) as server,
    ):
        server.wait_packed([MODEL])
        url = f"http://127.0.0.1:{server.port}"
        with (
            overcommit.Client(url) as shared,
            overcommit.Client(url, shared_memory=False) as body,
        ):
            for nbytes in SIZES:
                _measure(report, (shared, body), nbytes, pairs)


def _measure(
    report: Report, clients: tuple[overcommit.Client, overcommit.Client], nbytes: int, pairs: int
) -> None:
    x = np.random.default_rng(nbytes).random((1, nbytes // 4), np.float32)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM_UP + pairs):
        for client, spent in zip(clients, times, strict=True):
            began_s = time.perf_counter()
            y = client.infer(MODEL, {"x": x})["y"]
            spent.append(time.perf_counter() - began_s)
            if number % WARM_UP == 0 and not np.array_equal(x, y):
                raise BenchError(f"an answer of {nbytes} bytes is not its request")
    shared, body = (statistics.median(spent[WARM_UP:]) * 1e3 for spent in times)
    name = f"{nbytes / MIB:g} MiB"
    note = f"median of {pairs}, in turns; the limit is the binary body"
    report.add(
        "one request of the Python client, there and back",
        Figure(f"{name}: shared memory", shared, "ms", body, note),
    )
    report.headlines.append((f"{name} there and back", f"{shared:.2f} ms", f"{body:.2f} ms"))
    report.step(f"{name}: {shared:.2f} ms, by body {body:.2f} ms ({body / shared:.2f}x)")
    if nbytes >= MIB:
        report.expect(
            f"{name}: shared memory is faster than a body",
            body / shared >= RATIO_MIN,
            f"{body / shared:.2f}x",
        )
