"""Scenario `fleet`: 20,000 registered models on one box, cold and warm, and a load on 2,000 of them.

Phases, each on a server of its own:

 1. empty   no model at all: what the supervisor and the whole process tree take by themselves
 2. cold    empty cache folder, page cache dropped where that is allowed: every version is registered
            when the server says that it is ready, and any of them can be asked at once; then all
            images are made
 3. warm    everything is known: ready, memory, cost while idle, listings and metrics
 4. load    Zipf over 2,000 models, more than DEVICE holds; memory of the tree is sampled all the while
 5. kills   the same load once more, all of it in HOST or DEVICE, and workers and the mover are killed:
            not a byte of it may be read from disk again
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from overcommit.bench import processes, screen
from overcommit.bench.fleet_books import Watch, drop_page_cache, index_of, tree_bytes
from overcommit.bench.killer import Killer
from overcommit.bench.loadgen import Load, Plan
from overcommit.bench.models_repo import ALLOW_CODE
from overcommit.bench.popularity import ByUniform, ByZipf, Popularity
from overcommit.bench.prepare import Options, run_folder
from overcommit.bench.report import Figure, Report
from overcommit.bench.server import Server
from overcommit.bench.small_models import (
    COLUMNS,
    SmallModelsPlan,
    answer,
    make_models,
    name_of,
    weights_of,
)
from overcommit.bench.tally import Tally

MODELS: Final = 20_000
QUICK_MODELS: Final = 2_000
ASKED: Final = 2_000  # distinct models of the load
ASKED_SHARE_MAX: Final = 0.5
EXPONENT: Final = 0.9
COLD_S_MAX: Final = 10.0
WARM_S_MAX: Final = 3.0
MODEL_BYTES_MAX: Final = 2048  # of the supervisor's memory
TREE_BYTES_MAX: Final = 2_000_000_000
IDLE_S: Final = 6.0
IDLE_CORES_MAX: Final = 0.08  # of the supervisor, while nothing is asked
PACK_LIMIT_S: Final = 900.0
SECONDS: Final = 20.0
QUICK_SECONDS: Final = 6.0
FILL_S: Final = 8.0  # for one request to every model of the load
PROBES: Final = 16
PAGE_ROWS: Final = 500
WORKERS: Final = 2
KILL_INTERVAL_S: Final = (1.0, 2.0)
KILLED: Final = (("worker", 0), ("worker", 1), ("mover", 0))
DEVICE_MEMORY: Final = 96 << 20  # about half of what 2,000 models take
HOST_MEMORY: Final = 320 << 20
_INPUT: Final = (np.arange(COLUMNS, dtype=np.float32) - 8).reshape(1, COLUMNS)
_BODY: Final = msgspec.json.encode(
    {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": _INPUT.shape, "data": _INPUT[0].tolist()}
        ]
    }
)
_MAPPINGS_MAX: Final = Path("/proc/sys/vm/max_map_count")


class FleetRun:
    """One run of the scenario."""

    def __init__(self, options: Options, report: Report, folder: Path, count: int) -> None:
        self.options = options
        self.report = report
        self.folder = folder
        self.count = count
        self.root = options.work / f"small-{count}"
        self.cache = options.work / f"small-{count}-cache"
        self.asked = random.Random(options.seed).sample(
            range(count), min(ASKED, int(count * ASKED_SHARE_MAX))
        )
        self._random = random.Random(options.seed)
        self.base_bytes = 0
        self._loads = 0

    def server(self, name: str, root: Path | None = None, host_memory: int = HOST_MEMORY) -> Server:
        """Make a server that is not started yet."""
        flags = [ALLOW_CODE, "--workers", str(WORKERS), "--front-ends", "1"]
        flags += ["--device-memory", str(DEVICE_MEMORY), "--host-memory", str(host_memory)]
        cache = self.cache if root is None else self.folder / "cache"
        return Server(root or self.root, cache, self.folder, flags, name)

    def load(self, server: Server, seconds: float, popularity: Popularity) -> Load:
        """Start a load on the chosen models."""
        self._loads += 1
        plan = Plan(
            workload=SmallModelsPlan(numbers=tuple(self.asked), popularity=popularity),
            port=server.port,
            connections=self.options.connections,
            seconds=seconds,
            seed=self.options.seed + self._loads,
        )
        return Load(plan, self.folder / "load.log", self.options.load_processes)

    # --- phases ---------------------------------------------------------------------------------
    def empty(self) -> None:
        """Phase 1."""
        root = self.folder / "empty"
        root.mkdir()
        with self.server("empty", root) as server:
            time.sleep(1.0)
            self.base_bytes = processes.own_bytes(server.pid)
            tree = sum(tree_bytes(server).values())
            self.report.add(
                "no models",
                Figure(
                    "supervisor's own memory", self.base_bytes / 1e6, "MB", note="private, written"
                ),
                Figure("process tree", tree / 1e6, "MB", note="PSS"),
            )

    def cold(self) -> None:
        """Phase 2."""
        report = self.report
        shutil.rmtree(self.cache, ignore_errors=True)
        dropped = drop_page_cache()
        if not dropped:
            report.notes.append("the page cache could not be dropped: the cold start is too warm")
        with self.server("cold") as server:
            listed = len(index_of(server))
            began = time.monotonic()
            probe = self._probe(server)
            report.add(
                "cold start",
                Figure("ready", server.ready_s, "s", COLD_S_MAX, "the limit is the condition"),
                Figure("versions listed then", listed),
                Figure("median answer of a random one", probe * 1e3, "ms", note="packed on demand"),
            )
            report.expect(
                f"cold: ready in {COLD_S_MAX:g} s with all {self.count:,} versions registered",
                server.ready_s < COLD_S_MAX and listed == self.count,
                f"{server.ready_s:.2f} s, {listed:,} versions, page cache "
                f"{'dropped' if dropped else 'NOT dropped'}",
            )
            self._wait_packed(server)
            took_s = time.monotonic() - began
            report.add(
                "packing", Figure("all images", took_s, "s", note=f"{self.count / took_s:,.0f}/s")
            )
            states = [row["state"] for row in index_of(server)]
            report.expect(
                "cold: every version gets its image",
                states.count("READY") == self.count,
                f"{states.count('READY'):,} of {self.count:,}",
            )

    def warm(self, server: Server) -> None:
        """Phase 3."""
        report = self.report
        listed = [row["state"] for row in index_of(server)]
        probe = self._probe(server)
        report.expect(
            f"warm: ready in {WARM_S_MAX:g} s with all {self.count:,} versions registered",
            server.ready_s < WARM_S_MAX and listed.count("READY") == self.count,
            f"{server.ready_s:.2f} s, {listed.count('READY'):,} versions ready",
        )
        used = processes.own_bytes(server.pid)
        each = (used - self.base_bytes) / self.count
        report.expect(
            f"warm: less than {MODEL_BYTES_MAX} bytes of the supervisor's memory for each model",
            each < MODEL_BYTES_MAX,
            f"{each:,.0f} bytes",
        )
        cpu = processes.cpu_s(server.pid)
        time.sleep(IDLE_S)
        cores = (processes.cpu_s(server.pid) - cpu) / IDLE_S
        report.expect(
            f"warm: watching the repository costs at most {IDLE_CORES_MAX:.0%} of a core",
            cores <= IDLE_CORES_MAX,
            f"{cores:.1%}",
        )
        report.add(
            "warm start",
            Figure("ready", server.ready_s, "s", WARM_S_MAX, "the limit is the condition"),
            Figure("median answer of a random one", probe * 1e3, "ms", note="from disk"),
            Figure("supervisor's own memory", used / 1e6, "MB", note=f"{each:,.0f} bytes a model"),
            Figure("supervisor while idle", cores, "cores"),
            *(
                Figure(f"tree: {kind}", nbytes / 1e6, "MB")
                for kind, nbytes in tree_bytes(server).items()
            ),
        )

    def zipf(self, server: Server, seconds: float) -> None:
        """Phase 4."""
        watch = Watch(server)
        with self.load(server, seconds, ByZipf(exponent=EXPONENT)) as load:
            tally = screen.watch(self.report.console, "Zipf load", load, watch.tick)
        self._judge("load", tally)
        report = self.report
        records = server.status()["activations"]
        for source in ("disk", "host"):
            times = sorted(row["total_ns"] for row in records if row["source"] == source)
            if times:
                report.add(
                    "load: activations",
                    Figure(f"from {source}, median", times[len(times) // 2] / 1e6, "ms"),
                    Figure(
                        *(f"from {source}, p99", times[len(times) * 99 // 100] / 1e6, "ms"),
                        note=f"of the last {len(times):,}",
                    ),
                )
        report.add(
            "load: memory",
            Figure("process tree at most", watch.largest_bytes / 1e6, "MB", TREE_BYTES_MAX / 1e6),
            *(Figure(kind, nbytes / 1e6, "MB") for kind, nbytes in watch.by_kind.items()),
        )
        report.expect(
            f"load: the process tree takes less than {TREE_BYTES_MAX / 1e9:g} GB",
            0 < watch.largest_bytes < TREE_BYTES_MAX,
            f"{watch.largest_bytes / 1e9:.2f} GB",
        )
        rows = server.status()["processes"]
        ranges = max(
            processes.mappings(row["pid"]) for row in rows if row["kind"] == "worker" and row["pid"]
        )
        allowed = int(_MAPPINGS_MAX.read_text())
        report.expect(
            "load: a worker has room for four times as many mappings",
            0 < 4 * ranges <= allowed,
            f"{ranges:,} of {allowed:,}",
        )
        self._listings(server)

    def kills(self, server: Server, seconds: float) -> None:
        """Phase 5."""
        report = self.report
        # Until nothing comes from disk any more, the probes of the phases before are displaced.
        for _ in range(5):
            start = server.status()["totals"]
            with self.load(server, FILL_S, ByUniform()) as load:
                screen.watch(report.console, "making models resident", load)
            if server.status()["totals"]["loads_from_disk"] == start["loads_from_disk"]:
                break
        start = server.status()["totals"]
        killer = Killer(server, KILLED, self.options.seed, KILL_INTERVAL_S)
        with self.load(server, seconds, ByZipf(exponent=EXPONENT)) as load:
            tally = screen.watch(report.console, "killing", load, killer.tick)
        end = server.status()["totals"]
        self._judge("kills", tally, workers_killed=killer.count("worker"))
        report.expect(
            "kills: a worker and the mover were killed",
            killer.count("worker") > 0 < killer.count("mover"),
            f"{killer.count('worker')} workers, {killer.count('mover')} movers",
        )
        loads = end["loads_from_disk"] - start["loads_from_disk"]
        read = end["bytes_read"] - start["bytes_read"]
        report.expect(
            "kills: no byte is read from disk again",
            loads == 0 == read,
            f"{loads:,} loads, {read:,} bytes; {end['loads_from_host'] - start['loads_from_host']:,}"
            f" loads from HOST",
        )

    # --- pieces ---------------------------------------------------------------------------------
    def _probe(self, server: Server) -> float:
        """Ask random models, check the answers; return the median time in seconds."""
        times = []
        for number in self._random.sample(range(self.count), PROBES):
            began = time.monotonic()
            status, body = server.request("POST", f"/v2/models/{name_of(number)}/infer", _BODY)
            times.append(time.monotonic() - began)
            if status != 200:
                raise server.blame(f"answered {name_of(number)} with {status}: {body[:300]!r}")
            got = np.array(msgspec.json.decode(body)["outputs"][0]["data"], np.float32)
            if got.tobytes() != answer(number, weights_of(number), _INPUT).tobytes():
                raise server.blame(f"gave a wrong answer of {name_of(number)}: {body[:300]!r}")
        return sorted(times)[PROBES // 2]

    def _wait_packed(self, server: Server) -> None:
        with screen.bar(self.report.console, "packing images") as advance:

            def is_done() -> bool:
                left = int(server.status()["packing"])
                advance(self.count - left, self.count)
                time.sleep(0.2)
                return left == 0

            if not processes.wait_for(is_done, PACK_LIMIT_S):
                raise server.blame(f"has not packed all models after {PACK_LIMIT_S:.0f} s")

    def _judge(self, phase: str, tally: Tally, workers_killed: int = 0) -> None:
        report = self.report
        times = tally.times()
        distinct = sum(1 for count in tally.targets.values() if count)
        report.add(
            f"{phase}: requests",
            Figure("throughput", tally.rate, "1/s", note=f"{tally.right:,} right answers"),
            Figure("p50", times.quantile(0.5) / 1e6, "ms"),
            Figure("p99", times.quantile(0.99) / 1e6, "ms"),
            Figure("distinct models", distinct),
        )
        # The server retries a request once: two workers that die with it are an honest 502.
        allowed = workers_killed // 2 * self.options.connections
        lost = tally.statuses.get("502", 0)
        others = {status: n for status, n in tally.statuses.items() if status != "502"}
        report.expect(
            f"{phase}: every answer is right",
            tally.wrong == 0 < tally.right and not others and not tally.broken and lost <= allowed,
            f"{tally.right:,} right, {tally.wrong} wrong, {tally.statuses} errors, {tally.broken} "
            f"broken",
        )
        report.notes += [f"{phase}: {text}" for text in tally.examples]

    def _listings(self, server: Server) -> None:
        """Listings come in pages, and metrics do not grow with the number of models."""
        report = self.report
        began = time.monotonic()
        whole = index_of(server)
        index_s = time.monotonic() - began
        pages: list[Any] = []
        while len(pages) < len(whole) and (page := index_of(server, len(pages), PAGE_ROWS)):
            pages += page
        report.expect("listings: the pages of the index are the index", pages == whole)
        began = time.monotonic()
        status, body = server.request("GET", "/metrics")
        scrape_s = time.monotonic() - began
        series = [line for line in body.decode().splitlines() if line and line[0] != "#"]
        report.add(
            "listings",
            Figure("index, whole", index_s * 1e3, "ms", note=f"{len(whole):,} rows"),
            Figure("scrape", scrape_s * 1e3, "ms", note=f"{len(body) / 1e3:.0f} KB"),
            Figure("series of a scrape", len(series)),
        )
        report.expect(
            "metrics: at most 1,000 series", status == 200 and len(series) <= 1000, f"{len(series)}"
        )
        name = name_of(self.asked[0])
        status, body = server.request("GET", f"/metrics?model={name}")
        report.expect(
            "metrics: any model on request",
            status == 200 and f'model="{name}"' in body.decode(),
            f"{status}, {len(body)} bytes",
        )


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    count = options.models or (QUICK_MODELS if options.quick else MODELS)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    report.settings = {
        "models": count,
        "asked": min(ASKED, int(count * ASKED_SHARE_MAX)),
        "Zipf": EXPONENT,
        "seconds": seconds,
        "workers": WORKERS,
        "connections": options.connections,
        "device memory": f"{DEVICE_MEMORY >> 20} MiB",
        "host memory": f"{HOST_MEMORY >> 20} MiB",
    }
    with screen.bar(report.console, "making models") as advance:
        make_models(options.work / f"small-{count}", count, advance)
    with run_folder(options, report) as folder:
        fleet = FleetRun(options, report, folder, count)
        report.step("phase 1: a server without models")
        fleet.empty()
        report.step(f"phase 2: {count:,} models, nothing known of them")
        fleet.cold()
        report.step("phase 3: everything known")
        with fleet.server("warm") as server:
            fleet.warm(server)
            report.step("phase 4: load")
            fleet.zipf(server, seconds)
            report.step("phase 5: the same, and workers and the mover are killed")
            fleet.kills(server, seconds)
