"""Scenario `activation`: how long weights take from where they are to where a batch can use them.

Models of 1 MiB to 2 GiB, one worker, real processes.  DEVICE holds the largest one or all the others,
so asking for each in turn, the largest first, loads each once a round.

 * warm   HOST -> DEVICE, in turns with a raw copy of the same bytes between the same places
 * cold   DISK -> DEVICE through HOST, which keeps its copy, in turns with a raw read of the same file
          into the same places
 * attach a fresh worker, whose predecessor was killed, maps what DEVICE has
 * kills  of the mover and the worker, between and during activations: nothing is read again
 * others `torch.load` and three other loaders, for a file as long

Loads are judged as t = a + n / B: B, the bandwidth that is left once the fixed cost `a` is paid, against
that of a raw copy of the same bytes right after each load, and `a` for itself.  The shares of the whole time
are shown, for each size.

A time is from the worker's wish until the weights are mapped and can be leased.  The first touch of
each page by a fresh worker comes later, in its first batch; it is measured, and added where ours is
compared with loaders whose tensors have been touched.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from overcommit.bench import activation_rows, loader_rows, plots, processes, successors
from overcommit.bench.activation_samples import STAGES, Sample, fit, median, pair, samples_of
from overcommit.bench.errors import BenchError
from overcommit.bench.models_repo import ALLOW_CODE, make_long_table
from overcommit.bench.prepare import Options, run_folder
from overcommit.bench.raw import Raw, Reading
from overcommit.bench.report import Figure, Report
from overcommit.bench.server import Server
from overcommit.bench.tables import COLUMNS, ROW_BYTES, rows_of
from overcommit.runtime.config import MIB
from overcommit.runtime.image import read_header
from overcommit.runtime.parts import path_of

SIZES: Final = tuple(size * MIB for size in (1, 8, 64, 256, 1024, 2048))
QUICK_SIZES: Final = tuple(size * MIB for size in (1, 8, 64, 256, 1024))
SLACK_BYTES: Final = 128 * MIB  # HOST beyond the models
JUDGED_FROM: Final = 256 * MIB
WARM_SHARE: Final = 0.95
COLD_SHARE: Final = 0.92
FIXED_S_MAX: Final = 1e-3
ATTACH_S_MAX: Final = 2e-3
LIVE_LIMIT_S: Final = 30.0
HEARTBEAT_S: Final = 1.2  # until a worker has told what it mapped


@dataclass(slots=True, frozen=True)
class Extent:
    """How much of everything."""

    sizes: tuple[int, ...]
    warm: int
    cold: int
    attach: int
    kills: int
    repeats: int
    compared: int  # bytes of the file that other loaders get


FULL: Final = Extent(SIZES, 15, 7, 5, 6, 5, 1024 * MIB)
QUICK: Final = Extent(QUICK_SIZES, 7, 3, 3, 3, 2, 256 * MIB)


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    extent = QUICK if options.quick else FULL
    report.settings = {"sizes, MiB": ", ".join(f"{size // MIB}" for size in extent.sizes)}
    root = options.work / "activation"
    files = {}
    for seed, size in enumerate(extent.sizes):
        report.step(f"a table of {size // MIB} MiB")
        files[size] = make_long_table(root, _name(size), seed, size)
    with run_folder(options, report) as folder:
        device, host = max(files), sum(files) + SLACK_BYTES
        flags = [ALLOW_CODE, "--workers", "1", "--front-ends", "1"]
        flags += ["--device-memory", str(device), "--host-memory", str(host)]
        flags += ["--no-prefetch"]  # the rounds are regular: what is asked next would be there
        with Server(root, options.work / "cache", folder, flags) as server:
            server.wait_packed([_name(size) for size in files])
            with Raw(server.pid) as raw:
                bed = Bed(server, files, raw, report)
                bed.warm_up()
                warm = bed.warm(extent.warm)
                cold = bed.cold(extent.cold)
                touch_s = statistics.median(raw.touch() for _ in range(3))
            bed.attach(extent.attach)
            bed.kills(extent.kills)
    size = extent.compared
    ours = (warm[size], cold[size], touch_s)
    loader_rows.compare(options, report, size, files[size], extent.repeats, ours)
    report.plots["times"] = lambda path: plots.activations(
        [
            plots.Activation(sample.nbytes, sample.seconds, sample.source)
            for sample in bed.samples
            if sample.source != "device"
        ],
        bed.limits,
        path,
    )


def _name(size: int) -> str:
    return f"table-{size // MIB}mib"


def _file_of(server: Server, name: str) -> Path:
    """Return the file that holds a table: its image's only part, or the image where it has none."""
    image = server.image_of(name)
    header, _ = read_header(image)
    if len(header.parts) > 1:
        raise BenchError(f"{image} has {len(header.parts)} parts, the table should be in one")
    return path_of(image, header.parts[0].digest) if header.parts else image


class Bed:
    """The server, the models, and what was measured with them."""

    def __init__(
        self,
        server: Server,
        files: dict[int, Path],
        raw: Raw,
        report: Report,
    ) -> None:
        self.server = server
        self.files = files
        self.raw = raw
        self.report = report
        self.sizes = sorted(files, reverse=True)
        self.samples: list[Sample] = []
        self.limits: dict[str, float] = {}
        self._seeds = {size: seed for seed, size in enumerate(files)}
        self._stored = {size: _file_of(server, _name(size)) for size in files}
        self._row = 0
        self.wrong = 0
        self.asked = 0

    # --- asking ---------------------------------------------------------------------------------
    def ask(self, size: int, server: Server | None = None) -> bool:
        """Send one request; whether the answer was right."""
        self._row = (self._row + 7919) % min(size // ROW_BYTES, 1 << 24)
        x = np.linspace(0.5, 8, COLUMNS, dtype=np.float32)
        x[0] = self._row
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, COLUMNS], "data": x.tolist()}
        path = f"/v2/models/{_name(size)}/infer"
        status, body = (server or self.server).request(
            "POST", path, msgspec.json.encode({"inputs": [tensor]})
        )
        self.asked += 1
        if status == 200:
            data = np.array(msgspec.json.decode(body)["outputs"][0]["data"], np.float32)
            row = rows_of(self._seeds[size], np.array([int(x[0])]))[0]
            if np.array_equal(data, x * row):
                return True
        self.wrong += 1
        self.report.notes.append(f"{_name(size)}: {status} {body[:160]!r}")
        return False

    def activate(self, size: int, source: str) -> dict[str, Any]:
        """Ask for what is not on DEVICE; return the server's record of how it came there."""
        self.ask(size)
        record: dict[str, Any] = {}

        def is_told() -> bool:
            # The answer does not wait for the supervisor to hear that the weights are there.
            record.update(self.server.status()["activations"][-1])
            is_it = record["nbytes"] == size and record["source"] == source
            return is_it and bool(record["host"])

        if not processes.wait_for(is_told, LIVE_LIMIT_S):
            raise self.server.blame(f"did not load {_name(size)} from {source} through HOST")
        return record

    def new_samples(self) -> list[Sample]:
        """Return what was mapped since the last time, once every worker has told."""
        processes.wait_for(lambda: False, HEARTBEAT_S)
        samples = samples_of(self.server.status())
        new = samples[len(self.samples) :]
        self.samples = samples
        return new

    def total(self, name: str) -> int:
        """One of the server's totals."""
        return int(self.server.status()["totals"][name])

    # --- phases ---------------------------------------------------------------------------------
    def warm_up(self) -> None:
        """Wait until memory is there, and load everything into HOST."""
        self.report.step("every model once, from disk: digests are checked")
        log = self.server.log
        if not processes.wait_for(lambda: "arenas are warm" in log.read_text(), LIVE_LIMIT_S * 4):
            raise self.server.blame("does not get its memory")
        for size in self.sizes:
            self.ask(size)
        first = self.new_samples()
        for sample in first:
            rate = sample.nbytes / sample.seconds / 1e9
            name = f"{sample.nbytes // MIB} MiB, digests checked"
            self.report.add("cold, the first load of each", Figure(name, rate, "GB/s"))

    def warm(self, rounds: int) -> dict[int, float]:
        """HOST -> DEVICE.  Returns the median seconds of each size."""
        report = self.report
        report.step(f"warm: {rounds} rounds")
        before = self.total("bytes_read")
        raw: dict[tuple[int, int], float] = {}
        for _ in range(rounds):
            for size in self.sizes:
                record = self.activate(size, "host")
                both = self.raw.copy(record), self.raw.copy(record)
                raw[record["slot"], record["generation"]] = statistics.mean(both)
        found = self._by_size([s for s in self.new_samples() if s.source == "host"])
        pairs = {size: pair(size, found[size], raw) for size in self.sizes}
        limit = self.limits["host"] = activation_rows.show(
            report, "warm", "host", pairs, JUDGED_FROM
        )
        fixed_s, share = fit([(one.raw_s, one.seconds) for one in pairs.values()])
        rate = share * limit
        report.add(
            "warm: t = a + bytes / B",
            Figure("a, the fixed cost", fixed_s * 1e3, "ms"),
            Figure("B", rate / 1e9, "GB/s", limit / 1e9),
        )
        report.headlines.append(
            (
                "activation HOST -> DEVICE",
                f"{rate / 1e9:.1f} GB/s + {fixed_s * 1e3:.2f} ms",
                f"copy {limit / 1e9:.1f} GB/s",
            )
        )
        report.expect(
            f"warm: B is {WARM_SHARE:.0%} of the raw copy", share >= WARM_SHARE, f"{share:.1%}"
        )
        shown = (min(self.sizes), JUDGED_FROM, max(self.sizes))
        for name, first, last in STAGES:
            us = [
                median(found[size], lambda x: x.between(first, last)) * 1e6  # noqa: B023
                for size in shown
            ]
            note = ", ".join(f"{us[n]:,.0f} us with {shown[n] // MIB} MiB" for n in (1, 2))
            report.add(
                f"warm, by stage, {shown[0] // MIB} MiB", Figure(name, us[0], "us", note=note)
            )
        report.expect(
            "warm: a fixed cost of at most 1 ms", fixed_s <= FIXED_S_MAX, f"{fixed_s * 1e3:.2f} ms"
        )
        read = self.total("bytes_read") - before
        report.expect("warm: nothing is read from disk", read == 0, f"{read:,} bytes")
        return {size: one.seconds for size, one in pairs.items()}

    def cold(self, rounds: int) -> dict[int, float]:
        """DISK -> DEVICE.  Returns the median seconds of each size."""
        report = self.report
        report.step(f"cold: {rounds} rounds")
        how: Reading | None = None
        raw: dict[tuple[int, int], float] = {}
        lost = 0
        for _ in range(rounds):
            for size in self.sizes:
                self._forget(size)
                record = self.activate(size, "disk")
                if how is None:  # the largest comes first
                    how = self.raw.best_reading(self._stored[size], record)
                    report.settings["raw read"] = f"{how.block // MIB} MiB, {how.depth} in flight"
                raw_s = self.raw.read(self._stored[size], record, how)
                raw[record["slot"], record["generation"]] = raw_s
                row = self.server.models()[_name(size)]
                lost += row["host_bytes"] < size or row["loads_from_disk"] != 1
        found = self._by_size([s for s in self.new_samples() if s.source == "disk"])
        pairs = {size: pair(size, found[size], raw) for size in self.sizes}
        limit = self.limits["disk"] = activation_rows.show(
            report, "cold", "disk", pairs, JUDGED_FROM
        )
        activation_rows.judge(report, "cold", pairs, JUDGED_FROM, COLD_SHARE)
        report.expect("cold: HOST keeps its copy", lost == 0, f"{lost} times not")
        rate = max(size / one.seconds for size, one in pairs.items())
        report.headlines.append(
            (
                "activation DISK -> DEVICE",
                f"{rate / 1e9:.2f} GB/s",
                f"O_DIRECT {limit / 1e9:.2f} GB/s",
            )
        )
        return {size: one.seconds for size, one in pairs.items()}

    def attach(self, rounds: int) -> None:
        """Fresh workers map what DEVICE has."""
        report = self.report
        report.step(f"attach: {rounds} workers are killed, twice")
        largest, others = self.sizes[0], self.sizes[1:]
        before = self.total("bytes_read"), self.total("bytes_copied")
        copied = 0
        for sizes in ((largest,), others):
            start = self.total("bytes_copied")
            for size in sizes:
                self.ask(size)
            copied += self.total("bytes_copied") - start
            for _ in range(rounds):
                successors.kill(self.server, "worker")
                for size in sizes:
                    self.ask(size)
                processes.wait_for(lambda: False, HEARTBEAT_S)
        found = self._by_size([s for s in self.new_samples() if s.source == "device"])
        slowest = 0.0
        for size in sorted(self.sizes):
            maps = [sample.between("placed_ns", "mapped_ns") for sample in found[size]]
            ask = median(found[size], lambda s: s.between("asked_ns", "placed_ns"))
            bind = median(found[size], lambda s: s.between("mapped_ns", "ready_ns"))
            slowest = max(slowest, statistics.median(maps))
            note = (
                f"at most {max(maps) * 1e6:,.0f} us; Placed came after {ask * 1e6:,.0f} us, "
                f"program loaded and bound {bind * 1e3:,.1f} ms later"
            )
            figure = Figure(f"{size // MIB} MiB", statistics.median(maps) * 1e6, "us", note=note)
            report.add("attach in a fresh worker: Placed to mapped", figure)
        report.expect(
            "attach: less than 2 ms whatever the size",
            slowest < ATTACH_S_MAX,
            f"at most {slowest * 1e3:.2f} ms in the median of a size",
        )
        report.headlines.append(("attach of what DEVICE has", f"{slowest * 1e3:.2f} ms", "2 ms"))
        moved = (
            self.total("bytes_read") - before[0],
            self.total("bytes_copied") - before[1] - copied,
        )
        report.expect("attach: no byte is moved", moved == (0, 0), f"{moved} read and copied")

    def kills(self, rounds: int) -> None:
        """Kill the mover and the worker before and while weights move."""
        report = self.report
        report.step(f"kills: {rounds} of the mover, {rounds} of the worker, while weights move")
        before = self.total("bytes_read")
        wrong = self.wrong
        for number in range(2 * rounds):
            # The two largest displace each other: each time it is a load from HOST.
            kind = ("mover", "worker")[number // 2 % 2]
            size = self.sizes[number % 2]
            delay_s = number / (2 * rounds) * size / self.limits["host"]
            with successors.kill_after(self.server, kind, delay_s):
                self.ask(size)
        for kind in ("mover", "worker"):
            successors.kill(self.server, kind)
            for size in self.sizes:
                self.ask(size)
        read = self.total("bytes_read") - before
        report.expect("kills: nothing is read again", read == 0, f"{read:,} bytes")
        report.expect("every answer was right", not self.wrong, f"{self.wrong} of {self.asked}")
        report.add("kills", Figure("answers that were wrong", self.wrong - wrong))

    # --- pieces ---------------------------------------------------------------------------------
    def _by_size(self, samples: list[Sample]) -> dict[int, list[Sample]]:
        found: dict[int, list[Sample]] = {size: [] for size in self.sizes}
        for sample in samples:
            found[sample.nbytes].append(sample)
        missing = [f"{size // MIB} MiB" for size, known in found.items() if not known]
        if missing:
            raise self.server.blame(f"says nothing of activations of {', '.join(missing)}")
        return found

    def _forget(self, size: int) -> None:
        """Have the weights leave both tiers, and the model served again."""
        name = _name(size)
        before = self._in_host()
        self.server.request("POST", f"/v2/repository/models/{name}/unload")
        # What was accepted before is answered first, so weights leave a while after the answer.
        if not processes.wait_for(lambda: self._in_host() <= before - size, LIVE_LIMIT_S):
            raise self.server.blame(f"does not let the weights of {name} go")
        self.server.request("POST", f"/v2/repository/models/{name}/load")

        def is_ready() -> bool:
            return self.server.request("GET", f"/v2/models/{name}/ready")[0] == 200

        if not processes.wait_for(is_ready, LIVE_LIMIT_S):
            raise self.server.blame(f"does not get {name} ready")

    def _in_host(self) -> int:
        return int(self.server.status()["host"]["used"])
