"""Scenario `pressure`: three times as many models in use as DEVICE has room for, and deadlines.

Overload: 24 tables of 32 MB, room for 8, 64 clients that ask for any of them with a deadline of a few
loads from disk.  What cannot be answered in time should be refused at once, with a time that is true;
beside it the same server without admission, and without damping.  The limit of loads is the machine's
own reading of the same files.

A giant: 48 tables of 8 MB that all fit and are asked all the time, and one table of 384 MB that one
client asks for without a pause: what is left to the others, with damping and without, beside alone.

Conditions are on ratios of the same run and on counts, not on times.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from overcommit.bench import limits, screen
from overcommit.bench.dialect import V2
from overcommit.bench.models_repo import ALLOW_CODE, make_tables
from overcommit.bench.patient import Book, Group, measure
from overcommit.bench.popularity import ByUniform, ByZipf, Popularity
from overcommit.bench.prepare import Options, run_folder
from overcommit.bench.report import Figure, Report
from overcommit.bench.server import Server
from overcommit.bench.tables import ROW_BYTES, TablePlan, TableWorkload
from overcommit.server.limits import SWEEP_S

MODELS: Final = 24
MODEL_BYTES: Final = 32_000_000
SLOT_BYTES: Final = 32 << 20  # what such an image takes in DEVICE, at most
ROOM: Final = 8
CLIENTS: Final = 64
DEADLINE_LOADS: Final = 6  # a deadline, in loads
HOT: Final = 48
HOT_BYTES: Final = 8_000_000
HOT_SLOT_BYTES: Final = 8 << 20
HOT_CLIENTS: Final = 8
GIANT_BYTES: Final = 384_000_000
GIANT_SLOT_BYTES: Final = 384 << 20
SPARE_BYTES: Final = 16 << 20
WARM_UP_S: Final = 2.0
SECONDS: Final = 8.0
QUICK_SECONDS: Final = 4.0
ROUNDS: Final = 3
QUICK_ROUNDS: Final = 2
TRUE_MIN: Final = 0.9
GOOD_MIN: Final = 0.8  # of the goodput alone that a cold giant leaves the hot ones

FULL: Final = "as it is"
NO_ADMISSION: Final = "no admission"
NO_DAMPING: Final = "no damping"
FLAGS: Final[dict[str, tuple[str, ...]]] = {
    FULL: (),
    NO_ADMISSION: ("--no-admission",),
    NO_DAMPING: ("--no-damping",),
}


def run(options: Options, report: Report) -> None:
    """Run both parts."""
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    report.settings = {"rounds": rounds, "seconds": seconds, "workers": 1, "clients": CLIENTS}
    with run_folder(options, report) as folder:
        _overload(options, report, folder, seconds, rounds)
        _giant(options, report, folder, seconds, rounds)


# --- overload -----------------------------------------------------------------------------------
@dataclass(slots=True)
class _Turn:
    book: Book
    loads: int
    deadline_ns: int
    load_ns: int
    thrashing: bool


def _overload(options: Options, report: Report, folder: Path, seconds: float, rounds: int) -> None:
    seeds = _tables(options, report, f"pressure-{MODELS}", MODELS, MODEL_BYTES)
    turns: dict[str, list[_Turn]] = {name: [] for name in FLAGS}
    for number in range(rounds):
        for name, flags in FLAGS.items():
            report.step(f"round {number + 1}: {MODELS} models, room for {ROOM}, {name}")
            memory = (ROOM * SLOT_BYTES, 0)
            with _serve(options, report, folder, f"pressure-{MODELS}", seeds, memory, flags) as it:
                turns[name].append(_turn(options, it, seeds, seconds, number))
    files = [
        *(options.work / "cache").glob("*/*.part"),
        *(options.work / "cache").glob("*/*.image"),
    ]
    read, _ = limits.measure_read(
        [file for file in files if 0.9 < file.stat().st_size / MODEL_BYTES < 1.1]
    )
    for name, taken in turns.items():
        books = [turn.book for turn in taken]
        goodput = statistics.median(book.goodput for book in books)
        report.add(
            f"overload, {name}",
            Figure("answers within their deadline", goodput, "1/s"),
            Figure(
                "loads",
                statistics.median(turn.loads / turn.book.seconds for turn in taken),
                "1/s",
                read / MODEL_BYTES,
                "limit: reads of such files, 8 MiB each",
            ),
            Figure("refused at once", _share(books, "refused"), "share"),
            Figure("answered 504", _share(books, "expired"), "share"),
            Figure("came back as told", sum(book.came_back for book in books)),
            Figure("of these served in time", _truth(books), "share"),
            Figure("deadline", statistics.median(t.deadline_ns for t in taken) / 1e6, "ms"),
            Figure("p99 of answers", max(b.times.quantile(0.99) for b in books) / 1e6, "ms"),
            Figure("p99 until refused", max(b.refusals.quantile(0.99) for b in books) / 1e6, "ms"),
        )
    _judge_overload(report, turns)


def _turn(
    options: Options, server: Server, seeds: Mapping[str, int], seconds: float, number: int
) -> _Turn:
    """Measure the time of a load, then load the server."""
    _ask_all(server, seeds, MODEL_BYTES, 2)
    records = [row for row in server.status()["activations"] if row["source"] == "disk"]
    load_ns = int(statistics.median(row["total_ns"] for row in records))
    limit_ns = DEADLINE_LOADS * load_ns
    seed = options.seed + number

    def groups(seed: int) -> list[Group]:
        workload = _workload(seeds, MODEL_BYTES, ByUniform(), seed, limit_ns // 1000)
        return [Group("clients", workload, CLIENTS, limit_ns)]

    measure(server.port, groups(seed + 1000), WARM_UP_S)
    before = server.status()["totals"]
    (book,) = measure(server.port, groups(seed), seconds)
    status = server.status()
    loads = status["totals"]["loads_from_disk"] - before["loads_from_disk"]
    return _Turn(book, loads, limit_ns, load_ns, status["thrashing"]["active"])


def _judge_overload(report: Report, turns: Mapping[str, list[_Turn]]) -> None:
    everything = [turn.book for taken in turns.values() for turn in taken]
    ours = [turn.book for turn in turns[FULL]]
    faults = sum(book.wrong + book.failed for book in everything)
    examples = [example for book in everything for example in book.examples]
    report.expect("no answer is wrong, none fails otherwise", not faults, f"{examples[:2]}")
    fates = all(book.sent == book.accounted for book in everything)
    report.expect("every attempt has one fate", fates)
    report.expect(
        f"who comes back when told is served in time, in {TRUE_MIN:.0%} of the cases",
        _truth(ours) >= TRUE_MIN,
        f"{_truth(ours):.1%} of {sum(book.came_back for book in ours):,}",
    )
    refused = sum(book.refused for book in ours)
    report.expect("some requests are refused", refused > 0, f"{refused:,}")
    # A front end looks at deadlines once in SWEEP_S; a batch is far shorter here.
    late = [turn for turn in turns[FULL] if turn.book.late and turn.book.lateness_ns > _slack(turn)]
    worst = max(turn.book.lateness_ns for turn in turns[FULL]) / 1e6
    report.expect(
        "no answer later than its deadline and a batch", not late, f"at most {worst:.0f} ms late"
    )
    pairs = zip(turns[FULL], turns[NO_ADMISSION], strict=True)
    ratios = [one.book.goodput / max(1e-9, other.book.goodput) for one, other in pairs]
    report.expect(
        "more answers within their deadline than without admission",
        statistics.median(ratios) > 1,
        _spread(ratios),
    )
    pairs = zip(turns[FULL], turns[NO_DAMPING], strict=True)
    damped = [one.book.goodput / max(1e-9, other.book.goodput) for one, other in pairs]
    report.notes.append(f"answers within their deadline, damped / not: {_spread(damped)}")
    report.expect(
        "thrashing is seen", all(turn.thrashing for turn in turns[FULL]), "status during the load"
    )
    name = f"{MODELS} models of 32 MB, room for {ROOM}, {CLIENTS} clients with deadlines"
    rate = statistics.median(book.goodput for book in ours)
    said = f"{rate:,.0f}/s in time, Retry-After true in {_truth(ours):.1%}"
    beside = f"without admission {1 / statistics.median(ratios):.0%} of that"
    report.headlines.append((name, said, beside))


def _slack(turn: _Turn) -> int:
    return max(turn.load_ns, int(SWEEP_S * 1e9))


# --- a giant ------------------------------------------------------------------------------------
def _giant(options: Options, report: Report, folder: Path, seconds: float, rounds: int) -> None:
    name = "pressure-giant"
    hot = _tables(options, report, name, HOT, HOT_BYTES)
    giant = _tables(options, report, name, 1, GIANT_BYTES)
    alone: list[Book] = []
    beside: dict[str, list[Book]] = {FULL: [], NO_DAMPING: []}
    giants: dict[str, list[Book]] = {FULL: [], NO_DAMPING: []}
    memory = (HOT * HOT_SLOT_BYTES + SPARE_BYTES, HOT * HOT_SLOT_BYTES + GIANT_SLOT_BYTES)
    for number in range(rounds):
        for mode in beside:
            report.step(f"round {number + 1}: {HOT} hot models and a cold giant, {mode}")
            names = {**hot, **giant}
            flags = FLAGS[mode]
            with _serve(options, report, folder, name, names, memory, flags) as server:
                _ask_all(server, giant, GIANT_BYTES, 3)
                _ask_all(server, hot, HOT_BYTES, 2)
                seed = options.seed + number

                def hot_group(seed: int) -> Group:
                    workload = _workload(hot, HOT_BYTES, ByZipf(exponent=0.5), seed)
                    return Group("hot", workload, HOT_CLIENTS)

                measure(server.port, [hot_group(seed + 1000)], WARM_UP_S)
                alone += measure(server.port, [hot_group(seed)], seconds)
                cold = Group("giant", _workload(giant, GIANT_BYTES, ByUniform(), seed), 1)
                books = measure(server.port, [hot_group(seed + 1), cold], seconds)
                beside[mode].append(books[0])
                giants[mode].append(books[1])
    report.add("hot models alone", *_latency(alone))
    for mode, books in beside.items():
        loads = sum(book.in_time for book in giants[mode])
        report.add(
            f"hot models beside a cold giant, {mode}",
            *_latency(books, statistics.median(book.goodput for book in alone)),
            Figure("answers of the giant", loads),
        )
    _judge_giant(report, alone, beside, giants)


def _judge_giant(
    report: Report,
    alone: list[Book],
    beside: Mapping[str, list[Book]],
    giants: Mapping[str, list[Book]],
) -> None:
    everything = [*alone, *beside[FULL], *beside[NO_DAMPING], *giants[FULL], *giants[NO_DAMPING]]
    faults = sum(b.wrong + b.failed + b.expired + b.refused for b in everything)
    report.expect("beside a giant nobody fails", not faults, f"{faults}")
    bases = alone[:: len(beside)]  # of the rounds with damping
    left = [a.goodput / b.goodput for a, b in zip(beside[FULL], bases, strict=True)]
    report.expect(
        f"a cold giant leaves the hot ones {GOOD_MIN:.0%} of their requests/s",
        statistics.median(left) >= GOOD_MIN,
        _spread(left),
    )
    pairs = list(zip(beside[FULL], beside[NO_DAMPING], strict=True))
    gain = [one.goodput / max(1e-9, other.goodput) for one, other in pairs]
    report.expect("more than without damping", statistics.median(gain) > 1, _spread(gain))
    mean = [one.times.mean / max(1.0, other.times.mean) for one, other in pairs]
    report.notes.append(f"mean time of the hot ones, damped / not: {_spread(mean)}")
    late = [one.times.quantile(0.99) / max(1, other.times.quantile(0.99)) for one, other in pairs]
    report.notes.append(f"p99 of the hot ones, damped / not: {_spread(late)}")
    served = [book.in_time for book in giants[FULL]]
    report.expect("the giant gets on all the same", min(served) > 0, f"{served} answers")
    report.headlines.append(
        (
            f"{HOT} hot models beside a cold one of 384 MB",
            f"{statistics.median(left):.0%} of their requests/s alone",
            f"{statistics.median(left) / statistics.median(gain):.0%} without damping",
        )
    )


def _latency(books: list[Book], base: float | None = None) -> list[Figure]:
    return [
        Figure("answers", statistics.median(book.goodput for book in books), "1/s", base),
        Figure("mean", statistics.median(book.times.mean for book in books) / 1e6, "ms"),
        Figure("p50", statistics.median(b.times.quantile(0.5) for b in books) / 1e6, "ms"),
        Figure("p99", statistics.median(b.times.quantile(0.99) for b in books) / 1e6, "ms"),
    ]


# --- common -------------------------------------------------------------------------------------
def _tables(
    options: Options, report: Report, folder: str, count: int, nbytes: int
) -> dict[str, int]:
    with screen.bar(report.console, "making models") as advance:
        return make_tables(
            options.work / folder, count, rows=nbytes // ROW_BYTES, on_progress=advance
        )


def _workload(
    seeds: Mapping[str, int], nbytes: int, popularity: Popularity, seed: int, timeout_us: int = 0
) -> TableWorkload:
    plan = TablePlan(
        models=tuple(seeds),
        seeds=tuple(seeds.values()),
        rows=nbytes // ROW_BYTES,
        inputs=8,
        dialect=V2(timeout_us=timeout_us),
        popularity=popularity,
    )
    return TableWorkload(plan, seed)


def _ask_all(server: Server, seeds: Mapping[str, int], nbytes: int, times: int) -> None:
    """Ask every model in turn, so that each is bound, in HOST, and its loads are known."""
    workload = _workload(seeds, nbytes, ByUniform(), 1)
    for _ in range(times):
        for number, name in enumerate(seeds):
            body = workload.request(number, 0).payload.partition(b"\r\n\r\n")[2]
            status, answer = server.request("POST", f"/v2/models/{name}/infer", body)
            if status != 200:
                raise server.blame(f"answered {name} with {status}: {answer[:300]!r}")


@contextlib.contextmanager
def _serve(
    options: Options,
    report: Report,
    folder: Path,
    repository: str,
    names: Mapping[str, int],
    memory: tuple[int, int],
    flags: tuple[str, ...],
) -> Iterator[Server]:
    settings = [ALLOW_CODE, "--workers", "1", "--front-ends", "1", *flags]
    settings += ["--device-memory", str(memory[0]), "--host-memory", str(memory[1])]
    cache = options.work / "cache"
    with Server(options.work / repository, cache, folder, settings, repository) as server:
        with screen.bar(report.console, "packing images") as advance:
            server.wait_packed(list(names), advance)
        yield server


def _share(books: list[Book], name: str) -> float:
    counted: int = sum(getattr(book, name) for book in books)
    return counted / max(1, sum(book.sent for book in books))


def _truth(books: list[Book]) -> float:
    came_back = sum(book.came_back for book in books)
    return sum(book.kept for book in books) / came_back if came_back else 0.0


def _spread(values: list[float]) -> str:
    middle = statistics.median(values)
    return f"{middle:.2f} ({min(values):.2f} .. {max(values):.2f})"
