"""Scenario `chaos`: SIGKILL at random under load, then everything is counted.

Phases, on one server with two front ends and two workers, and too many models for its memory:

 1. kill       any model; workers and one of the two front ends are killed every 0.2 to 1 s
 2. resident   only models that fit DEVICE; the same kills: not a byte may be read from disk
 3. books      nothing runs: blocks, chunks and descriptors are back; unloading everything frees all
 4. drain      SIGTERM under load: every request that was accepted is answered; exit status 0
 5. orphans    a second server; SIGKILL of its supervisor under load: nothing is left of it

A front end that dies takes its connections with it: that is a connection error to the client, which
connects again.  A request may be answered 502 when two workers died with it (the server retries
once); any other status but 200 is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from overcommit.bench import chaos_books as books
from overcommit.bench import processes, screen, snapshot
from overcommit.bench.killer import Killer
from overcommit.bench.loadgen import Load, Plan
from overcommit.bench.prepare import Fleet, Options, minilm_variants, run_folder
from overcommit.bench.processes import Residue
from overcommit.bench.report import Figure, Report
from overcommit.bench.server import Server
from overcommit.bench.tally import LOST, Tally
from overcommit.bench.workload import EmbeddingPlan

VARIANTS: Final = 12
RESIDENT: Final = 4  # models of the second phase; they fit DEVICE together
DEVICE_MEMORY: Final = "540MiB"  # six of them
HOST_MEMORY: Final = "360MiB"  # four
FRONT_ENDS: Final = 2
WORKERS: Final = 2
KILLED: Final = (("front_end", 1), ("worker", 0), ("worker", 1))
MOVER: Final = ("mover", 0)  # where nothing is to be loaded: a load that begins anew reads twice
WARM_UP_S: Final = 5.0
KILL_S: Final = 20.0
RESIDENT_S: Final = 10.0
QUICK_KILL_S: Final = 12.0
QUICK_RESIDENT_S: Final = 6.0
AGAIN_S: Final = 1.0
DRAIN_AFTER_S: Final = 1.5
ORPHANS_AFTER_S: Final = 1.5
ANSWERS_LIMIT_S: Final = 90.0  # for the first ones, of a server that has just started
END_LIMIT_S: Final = 15.0  # for orphans to be gone
LOAD_S_MAX: Final = 120.0  # of a load that a phase ends itself


class Chaos:
    """One run of the scenario."""

    def __init__(
        self, options: Options, report: Report, fleet: Fleet, folder: Path, flags: Sequence[str]
    ) -> None:
        self.options = options
        self.report = report
        self.fleet = fleet
        self.folder = folder
        self.flags = [*flags, "--workers", str(WORKERS), "--front-ends", str(FRONT_ENDS)]
        self._loads = 0
        fleet.references.save(folder / "all.npz")
        fleet.references.subset(fleet.names[:RESIDENT]).save(folder / "resident.npz")

    # --- pieces ---------------------------------------------------------------------------------
    def server(self, name: str) -> Server:
        """Make a server that is not started yet; its log is named so."""
        return Server(self.fleet.repository, self.fleet.cache, self.folder, self.flags, name)

    def load(
        self, server: Server, seconds: float, models: str = "all", *, reconnect: bool = True
    ) -> Load:
        """Start a load on all models, or on the resident ones."""
        self._loads += 1
        plan = Plan(
            workload=EmbeddingPlan(references=str(self.folder / f"{models}.npz")),
            port=server.port,
            connections=self.options.connections,
            seconds=seconds,
            seed=self.options.seed + self._loads,
            reconnect=reconnect,
        )
        return Load(plan, self.folder / "load.log", self.options.load_processes)

    def run_load(
        self,
        server: Server,
        seconds: float,
        what: str,
        models: str = "all",
        on_tick: Callable[[], None] = lambda: None,
    ) -> Tally:
        """Run a load to its end."""
        with self.load(server, seconds, models) as load:
            return screen.watch(self.report.console, what, load, on_tick)

    def until(self, load: Load, seconds: float) -> None:
        """Let a load run until it has got answers for a while."""
        wanted = 4 * self.options.connections
        processes.wait_for(lambda: load.progress.right >= wanted, ANSWERS_LIMIT_S)
        processes.wait_for(lambda: False, seconds)

    # --- phases ---------------------------------------------------------------------------------
    def pack(self) -> None:
        """Make the images with a server of its own: no packer may run while things are counted."""
        with self.server("packing") as server:
            with screen.bar(self.report.console, "packing images") as advance:
                server.wait_packed(self.fleet.names, advance)
            server.terminate()
            server.wait_end()

    def kill(self, server: Server, seconds: float) -> None:
        """Phase 1."""
        baseline = snapshot.settle(server)
        before = books.Books.read(server)
        killer = Killer(server, KILLED, self.options.seed)
        tally = self.run_load(server, seconds, "killing", on_tick=killer.tick)
        after = snapshot.settle(server)
        self._judge("kill", tally, killer)
        self.report.add("kill: tiers", *snapshot.tier_figures(baseline, after, tally.accounted))
        books.check_reads(self.report, server, before, baseline, after)

    def resident(self, server: Server, seconds: float) -> None:
        """Phase 2."""
        # Until nothing is loaded any more, the models of this phase displace the others.
        baseline = snapshot.take(server)
        for _ in range(5):
            start = snapshot.take(server)
            self.run_load(server, 1.0, "making models resident", "resident")
            baseline = snapshot.settle(server)
            if baseline.total("loads_from_disk") == start.total("loads_from_disk"):
                break
        before = books.Books.read(server)
        killer = Killer(server, (*KILLED, MOVER), self.options.seed + 1)
        tally = self.run_load(server, seconds, "killing", "resident", killer.tick)
        # Everybody at once, and then all is asked: with `--verify always` it is digested in DEVICE.
        snapshot.settle(server)
        last = Killer(server, (*KILLED, MOVER), self.options.seed)
        last.kill_all()
        snapshot.settle(server)
        again = self.run_load(server, AGAIN_S, "asking for all that was resident", "resident")
        after = snapshot.settle(server)
        self._judge("resident", tally, killer)
        self.report.expect(
            "resident: all of it answers right after workers and mover were killed at once",
            last.count("worker") == WORKERS and not again.wrong + again.errors + again.unanswered,
            f"{last.count('worker')} workers killed; {again.right} right of {again.sent}",
        )
        books.check_no_reads(self.report, server, before, baseline, after)

    def drain(self, server: Server) -> None:
        """Phase 4."""
        with self.load(server, LOAD_S_MAX, "resident", reconnect=False) as load:
            self.until(load, DRAIN_AFTER_S)
            server.terminate()
            status = server.wait_end()
            load.stop()
            tally = load.wait()
        report = self.report
        lost = tally.broken + tally.unanswered + tally.wrong + tally.unexpected
        report.expect(
            "drain: SIGTERM under load loses no accepted request",
            lost == 0 < tally.right,
            f"{tally.right} right, {tally.broken} broken, {tally.unanswered} unanswered, "
            f"{tally.wrong} wrong",
        )
        # 503 is a fair answer to a request that came after SIGTERM; nothing else is.
        others = {status: n for status, n in tally.statuses.items() if status != "503"}
        report.expect("drain: no error but 503", not others, f"{tally.statuses}")
        report.expect("drain: exit status 0", status == 0, f"{status}")
        self._explain("drain", tally)
        left = server.family()
        report.expect(
            "drain: no process is left", not left, ", ".join(processes.command(r.pid) for r in left)
        )

    def orphans(self) -> None:
        """Phase 5."""
        with self.server("orphans") as server:
            self.report.add("start", Figure("second start, nothing to pack", server.ready_s, "s"))
            with self.load(server, LOAD_S_MAX) as load:
                self.until(load, ORPHANS_AFTER_S)
                rows = server.family()
                server.kill_supervisor()
                gone = processes.wait_for(
                    lambda: not any(processes.is_same(row) for row in rows), END_LIMIT_S
                )
                load.stop()
                tally = load.wait()
            left = [row for row in rows if processes.is_same(row)] + server.family()
        text = ", ".join(processes.command(row.pid) for row in left)
        self.report.expect(
            "orphans: SIGKILL of the supervisor leaves no process", gone and not left, text
        )
        bad = tally.wrong + tally.unexpected
        self.report.expect(
            "orphans: no wrong answer",
            bad == 0 < tally.right,
            f"{tally.right} right, {bad} wrong; {tally.statuses}",
        )

    # --- judging --------------------------------------------------------------------------------
    def _judge(self, phase: str, tally: Tally, killer: Killer) -> None:
        """Every request: exactly one answer, never a wrong one."""
        report = self.report
        fronts, workers = killer.count("front_end"), killer.count("worker")
        times = tally.times()
        lost = tally.statuses.get("502", 0)
        report.add(
            f"{phase}: requests",
            Figure("killed", len(killer.kills), note=f"{workers} workers, {fronts} front ends"),
            Figure("throughput", tally.rate, "1/s", note=f"{tally.right:,} right answers"),
            Figure("p50", times.quantile(0.5) / 1e6, "ms"),
            Figure("p99", times.quantile(0.99) / 1e6, "ms"),
            Figure("longest silence", tally.silence_ns / 1e6, "ms", note="no answer to anybody"),
            Figure("connections lost", tally.broken, note="with a front end"),
            Figure("answered 502", lost, note="two workers died with the request"),
        )
        report.expect(
            f"{phase}: something was killed", workers > 0 < fronts, f"{workers}, {fronts}"
        )
        report.expect(
            f"{phase}: no wrong answer", tally.wrong == 0 < tally.right, f"{tally.wrong} wrong"
        )
        exact = tally.sent == tally.accounted and not tally.unanswered and not tally.unexpected
        report.expect(
            f"{phase}: every request has exactly one answer",
            exact,
            f"{tally.sent} sent, {tally.accounted} ended, {tally.unanswered} unanswered, "
            f"{tally.unexpected} answers to nothing",
        )
        allowed = fronts * self.options.connections
        report.expect(
            f"{phase}: connections are lost with a front end only",
            tally.broken <= allowed,
            f"{tally.broken} lost, {fronts} front ends killed",
        )
        report.expect(
            f"{phase}: no connection is refused",
            not tally.connect_errors,
            f"{tally.connect_errors}",
        )
        others = {status: count for status, count in tally.statuses.items() if status != "502"}
        report.expect(f"{phase}: no error but 502", not others, f"{tally.statuses}")
        report.expect(
            f"{phase}: 502 only where two kills can have met",
            lost <= workers // 2 * self.options.connections,
            f"{lost} with {workers} workers killed",
        )
        tally.examples = [text for text in tally.examples if LOST not in text]  # as it should be
        self._explain(phase, tally)

    def _explain(self, phase: str, tally: Tally) -> None:
        self.report.notes += [f"{phase}: {text}" for text in tally.examples]


def run(options: Options, report: Report, flags: Sequence[str] = ()) -> None:
    """Run the scenario with its own models; `flags`: more of the server's."""
    fleet = minilm_variants(options, report, VARIANTS)
    run_fleet(options, report, fleet, DEVICE_MEMORY, HOST_MEMORY, flags)


def run_fleet(
    options: Options,
    report: Report,
    fleet: Fleet,
    device_memory: str,
    host_memory: str,
    flags: Sequence[str] = (),
) -> None:
    """Run the scenario with these models and budgets; the first RESIDENT models must fit DEVICE."""
    kill_s = options.seconds or (QUICK_KILL_S if options.quick else KILL_S)
    resident_s = options.seconds or (QUICK_RESIDENT_S if options.quick else RESIDENT_S)
    report.settings = {
        "models": len(fleet.names),
        "device memory": device_memory,
        "host memory": host_memory,
        "front ends": FRONT_ENDS,
        "workers": WORKERS,
        "connections": options.connections,
        "seconds": f"{kill_s:g} + {resident_s:g}",
        "seed": options.seed,
    }
    with run_folder(options, report) as folder:
        budgets = ("--device-memory", device_memory, "--host-memory", host_memory)
        chaos = Chaos(options, report, fleet, folder, (*budgets, *flags))
        report.step("packing")
        chaos.pack()
        (folder / "tmp").mkdir(exist_ok=True)
        folders = ("images", "parts", "programs")
        watched = [folder / "tmp", *(fleet.cache / name for name in folders)]
        residue = Residue(*watched)
        with chaos.server("chaos") as server:
            report.step(f"ready after {server.ready_s:.1f} s; warming up")
            warm = chaos.run_load(server, WARM_UP_S, "warming up")
            report.expect("warm-up: no failure", warm.right == warm.sent, f"{warm.examples}")
            snapshot.settle(server)
            before = books.Books.read(server)
            report.step("phase 1: workers and a front end are killed; models come and go")
            chaos.kill(server, kill_s)
            report.step("phase 2: the same kills; every model asked for is resident")
            chaos.resident(server, resident_s)
            report.step("phase 3: the books")
            books.check_descriptors(report, server, before)
            books.check_tiers(report, server, fleet.names)
            report.step("phase 4: SIGTERM under load")
            chaos.drain(server)
        _check_residue(report, "after SIGTERM", residue)
        residue = Residue(*watched)
        report.step("phase 5: SIGKILL of the supervisor")
        chaos.orphans()
        _check_residue(report, "after SIGKILL of the supervisor", residue)


def _check_residue(report: Report, when: str, residue: Residue) -> None:
    new = residue.new()
    report.expect(f"{when}: no file is left behind", not new, ", ".join(new[:8]))
