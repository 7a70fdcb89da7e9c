"""Scenario `sharing`: 50 models over one frozen trunk cost the trunk and 50 heads, in every tier.

Phases, each with a server of its own:

 1. roomy   DEVICE and HOST have room for two trunks, not for three: all 50 models are resident.
            Bytes on disk, in HOST and in DEVICE are held against trunk + 50 heads, to the byte in
            both tiers; then workers and the mover are killed under load, and nothing is read again
 2. tight   DEVICE has room for the trunk and about half of the heads, HOST for all: heads come and
            go while the trunk stays, under the same kills; nothing but heads is moved

The unit of a trunk is a chunk of 2 MiB, that of a small head a page of 4 KiB.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from overcommit.bench import headed, processes, screen, snapshot
from overcommit.bench.chaos_books import OTHER_READS_BYTES
from overcommit.bench.histogram import Histogram
from overcommit.bench.killer import Killer
from overcommit.bench.loadgen import Load, Plan
from overcommit.bench.models_repo import ALLOW_CODE
from overcommit.bench.popularity import ByUniform, InTurn, Popularity
from overcommit.bench.prepare import Options, run_folder
from overcommit.bench.processes import Io
from overcommit.bench.report import Figure, Report
from overcommit.bench.server import Server
from overcommit.bench.snapshot import Snapshot
from overcommit.bench.tally import Tally
from overcommit.runtime.config import KIB, MIB, SMALL_CHUNK_BYTES
from overcommit.runtime.image import read_header
from overcommit.runtime.parts import path_of, round_up

MODELS: Final = 50
ROOMY: Final = 160 * MIB  # two trunks, and the heads
HEADS_IN_TIGHT: Final = 8 * MIB  # beside the trunk
HEADER_BYTES: Final = 16 * KIB  # of an image or a part, at most
KILLED: Final = (("worker", 0), ("worker", 1), ("mover", 0))
LOOK_S: Final = 0.1
WARM_UP_S: Final = 4.0
SECONDS: Final = 15.0
QUICK_SECONDS: Final = 6.0


@dataclass(slots=True, frozen=True)
class Sizes:
    """What the images say, in bytes."""

    trunk: int
    trunk_chunks: int  # the same in whole chunks
    heads: int
    files: int  # headers included

    @classmethod
    def of(cls, images: Iterable[Path]) -> Sizes:
        """Read the headers; the cache folder may hold more, of other releases."""
        parts: dict[str, int] = {}
        heads = files = 0
        for image in images:
            header, _ = read_header(image)
            heads += header.stored_bytes
            files += image.stat().st_size
            for part in header.parts:
                if part.digest not in parts:
                    files += path_of(image, part.digest).stat().st_size
                parts[part.digest] = part.nbytes
        chunks = sum(round_up(nbytes, SMALL_CHUNK_BYTES) for nbytes in parts.values())
        return cls(sum(parts.values()), chunks, heads, files)


class MoverReads:
    """What the kernel saw each mover read from when it was first seen to serve.

    What it reads before that are its own libraries, from the disk where memory was short.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._first: dict[int, Io] = {}
        self._last: dict[int, Io] = {}
        self._next_s = 0.0

    def tick(self) -> None:
        """Look, if it is time."""
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + LOOK_S
        for row in self._server.status()["processes"]:
            seen = processes.read_io(row["pid"]) if row["kind"] == "mover" else None
            if seen is not None and row["state"] == "LIVE":
                self._first.setdefault(row["pid"], seen)
                self._last[row["pid"]] = seen

    def worst(self) -> int:
        """Return the most that one mover has read."""
        self._next_s = 0.0
        self.tick()
        pairs = [(first, self._last[pid]) for pid, first in self._first.items()]
        calls = [last.call_bytes - first.call_bytes for first, last in pairs]
        blocks = [last.device_bytes - first.device_bytes for first, last in pairs]
        return max([*calls, *blocks], default=-1)


class Sharing:
    """One run of the scenario."""

    def __init__(self, options: Options, report: Report, folder: Path) -> None:
        self.options = options
        self.report = report
        self.folder = folder
        self.root = options.work / f"headed-{MODELS}" / "repository"
        self.cache = options.work / f"headed-{MODELS}" / "cache"
        self.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
        with screen.bar(report.console, "making models") as advance:
            self.seeds = headed.make_headed(self.root, MODELS, on_progress=advance)
        self._loads = 0

    def server(self, name: str, device: int, host: int) -> Server:
        """Make a server that is not started yet."""
        flags = [ALLOW_CODE, "--workers", "2", "--front-ends", "1"]
        flags += ["--device-memory", str(device), "--host-memory", str(host)]
        return Server(self.root, self.cache, self.folder, flags, name)

    def load(
        self,
        server: Server,
        seconds: float,
        what: str,
        popularity: Popularity,
        on_tick: Callable[[], None] = lambda: None,
    ) -> Tally:
        """Run a load on all models to its end."""
        self._loads += 1
        plan = Plan(
            workload=headed.plan_of(self.seeds, popularity),
            port=server.port,
            connections=self.options.connections,
            seconds=seconds,
            seed=self.options.seed + self._loads,
        )
        with Load(plan, self.folder / "load.log", self.options.load_processes) as load:
            return screen.watch(self.report.console, what, load, on_tick)

    # --- phases ---------------------------------------------------------------------------------
    def pack(self) -> Sizes:
        """Make the images with a server of its own: no packer may run while things are counted."""
        with (
            self.server("packing", ROOMY, ROOMY) as server,
            screen.bar(self.report.console, "packing images") as advance,
        ):
            server.wait_packed(list(self.seeds), advance)
            return Sizes.of([server.image_of(name) for name in self.seeds])

    def roomy(self, sizes: Sizes) -> None:
        """Phase 1."""
        with self.server("roomy", ROOMY, ROOMY) as server:
            start = snapshot.settle(server)
            warm = self.load(server, WARM_UP_S, "making all resident", InTurn())
            filled = snapshot.settle(server)
            self._check_answers("roomy, filling", warm)
            self._check_bytes(sizes, start, filled)
            whole = max(snapshot.new_activations(start, filled), key=lambda row: row["nbytes"])
            figure = Figure("trunk and head, from disk", whole["total_ns"] / 1e6, "ms")
            self.report.add("activations", figure)
            killer = Killer(server, KILLED, self.options.seed)
            tally, seen = self._kill(server, killer)
            after = snapshot.settle(server)
            self._check_kills("roomy", tally, killer, seen, filled, after)
            evictions = after.total("evictions_device")
            self.report.expect("roomy: nothing was evicted", not evictions, f"{evictions}")

    def tight(self, sizes: Sizes) -> None:
        """Phase 2."""
        device = sizes.trunk_chunks + HEADS_IN_TIGHT
        with self.server("tight", device, ROOMY) as server:
            start = snapshot.settle(server)
            warm = self.load(server, WARM_UP_S, "filling HOST", InTurn())
            filled = snapshot.settle(server)
            self._check_answers("tight, filling", warm)
            read = filled.total("bytes_read") - start.total("bytes_read")
            self.report.expect(
                "tight: trunk and heads were read once",
                read == sizes.trunk + sizes.heads,
                f"{read:,} bytes",
            )
            killer = Killer(server, KILLED, self.options.seed + 1)
            tally, seen = self._kill(server, killer)
            after = snapshot.settle(server)
            self._check_kills("tight", tally, killer, seen, filled, after)
        loads = after.total("loads_from_host") - filled.total("loads_from_host")
        moved = after.total("bytes_loaded") - filled.total("bytes_loaded")
        head = sizes.heads // MODELS
        self.report.expect("tight: heads came and went", loads > 0, f"{loads} loads from HOST")
        self.report.expect(
            "tight: an activation moves the head alone",
            moved == loads * head,
            f"{moved:,} bytes in {loads} loads of {head:,}",
        )
        self._activations(filled, after, head)

    def _kill(self, server: Server, killer: Killer) -> tuple[Tally, int]:
        """Run a load with kills; also return the most that a mover has read."""
        reads = MoverReads(server)

        def tick() -> None:
            killer.tick()
            reads.tick()

        tally = self.load(server, self.seconds, "killing", ByUniform(), tick)
        return tally, reads.worst()

    # --- judging --------------------------------------------------------------------------------
    def _check_bytes(self, sizes: Sizes, start: Snapshot, filled: Snapshot) -> None:
        report, total = self.report, sizes.trunk_chunks + sizes.heads
        alone = MODELS * sizes.trunk_chunks + sizes.heads
        report.add(
            "bytes of 50 models",
            Figure("trunk", sizes.trunk / 1e6, "MB", note=f"{sizes.trunk_chunks:,} in chunks"),
            Figure("50 heads", sizes.heads / 1e6, "MB"),
            Figure("disk: images and parts", sizes.files / 1e6, "MB", note=f"{sizes.files:,}"),
        )
        headers = sizes.files - sizes.trunk - sizes.heads
        report.expect(
            "disk holds trunk + 50 heads, and headers",
            0 < headers <= (MODELS + 16) * HEADER_BYTES,
            f"{sizes.files:,} bytes, {headers:,} of them headers",
        )
        for tier in ("host", "device"):
            used, saved = (filled.status[tier][name] for name in ("used", "saved"))
            name = tier.upper()
            report.add(
                "bytes of 50 models",
                Figure(name, used / 1e6, "MB", note=f"{alone / used:.1f} times less than alone"),
            )
            report.expect(f"{name} holds trunk + 50 heads", used == total, f"{used:,}, {total:,}")
            report.expect(f"{name} says what sharing saves", used + saved == alone, f"{saved:,}")
        tiers = {row["tier"] for row in filled.models.values()}
        report.expect("all 50 models are on DEVICE", tiers == {"DEVICE"}, f"{sorted(tiers)}")
        read = filled.total("bytes_read") - start.total("bytes_read")
        report.expect(
            "trunk and heads were read once", read == sizes.trunk + sizes.heads, f"{read:,} bytes"
        )
        used = filled.status["device"]["used"]
        report.headlines.append(
            ("50 models over one trunk of 64 MiB", f"{used / 1e6:.1f} MB", f"{alone / 1e6:.0f} MB")
        )

    def _check_answers(self, phase: str, tally: Tally) -> None:
        self.report.expect(
            f"{phase}: every answer is exact",
            tally.right == tally.sent > 0 and len(tally.targets) == MODELS,
            f"{tally.right:,} of {tally.sent:,} from {len(tally.targets)} models",
        )
        self.report.notes += [f"{phase}: {text}" for text in tally.examples]

    def _check_kills(
        self,
        phase: str,
        tally: Tally,
        killer: Killer,
        seen: int,
        before: Snapshot,
        after: Snapshot,
    ) -> None:
        report = self.report
        workers, movers = killer.count("worker"), killer.count("mover")
        times = tally.times()
        report.add(
            f"{phase}, with kills",
            Figure("killed", len(killer.kills), note=f"{workers} workers, {movers} movers"),
            Figure("throughput", tally.rate, "1/s", note=f"{tally.right:,} exact answers"),
            Figure("p50", times.quantile(0.5) / 1e6, "ms"),
            Figure("p99", times.quantile(0.99) / 1e6, "ms"),
        )
        report.expect(f"{phase}: both were killed", workers > 0 < movers, f"{workers}, {movers}")
        report.expect(
            f"{phase}: no wrong answer", tally.wrong == 0 < tally.right, f"{tally.wrong} wrong"
        )
        others = {status: count for status, count in tally.statuses.items() if status != "502"}
        lost = tally.statuses.get("502", 0)
        report.expect(
            f"{phase}: no error but 502 where two workers died with a request",
            not others and lost <= workers // 2 * self.options.connections,
            f"{tally.statuses}",
        )
        read = after.total("bytes_read") - before.total("bytes_read")
        loads = after.total("loads_from_disk") - before.total("loads_from_disk")
        report.expect(
            f"{phase}: not a byte was read again", read == 0 == loads, f"{read:,} bytes, {loads}"
        )
        if seen < 0:
            report.notes.append("/proc does not tell what the mover reads")
        else:
            report.expect(
                f"{phase}: the kernel saw no mover read weights",
                seen < OTHER_READS_BYTES,
                f"{seen:,} bytes by one of them",
            )

    def _activations(self, filled: Snapshot, after: Snapshot, head: int) -> None:
        times = Histogram()
        for row in snapshot.new_activations(filled, after):
            if row["nbytes"] == head and row["source"] == "host":
                times.record(row["total_ns"])
        if times.count:
            self.report.add(
                "activations",
                Figure("head alone, from HOST, p50", times.quantile(0.5) / 1e6, "ms"),
                Figure("head alone, from HOST, p99", times.quantile(0.99) / 1e6, "ms"),
            )


def run(options: Options, report: Report) -> None:
    """Run the scenario."""
    report.settings = {
        "models": MODELS,
        "layers of the trunk": headed.LAYERS,
        "workers": 2,
        "connections": options.connections,
        "seed": options.seed,
    }
    with run_folder(options, report) as folder:
        sharing = Sharing(options, report, folder)
        sizes = sharing.pack()
        report.step("phase 1: all models are resident; workers and the mover are killed")
        sharing.roomy(sizes)
        report.step("phase 2: heads come and go; workers and the mover are killed")
        sharing.tight(sizes)
