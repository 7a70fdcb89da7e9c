"""Ours beside others in one run: A B C A B C ..., so that a slow minute of the machine hits all.

Invariants
 1. One server is asked at a time, and while it is, no other uses the processor: a server is kept
    between its turns only when it was seen to be idle (`IDLE_CORES_MAX`); else it is stopped, and
    started again for its next turn.
 2. Every measurement follows a warm-up of the same load.
 3. A measurement during which others used the machine is made again, a few times; the least
    disturbed one counts, and how much it was disturbed is reported.
 4. A ratio is of two measurements of the same round; what is reported is the median of the rounds'
    ratios, with the lowest and the highest beside it.

Called by the scenarios `small_requests` and `overcommit`.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from overcommit.bench import cpu, plots, screen
from overcommit.bench.loadgen import Load, Plan
from overcommit.bench.peers import CannotDo, Target
from overcommit.bench.report import Figure, Report
from overcommit.bench.tally import Tally

OURS: Final = "overcommit"
IDLE_CORES_MAX: Final = 0.01
IDLE_WATCH_S: Final = 1.0
OTHERS_CORES_MAX: Final = 0.15  # the kernel's own work and a shell's are below that
TRIES_MAX: Final = 3


@dataclass(slots=True, frozen=True)
class Contestant:
    """A server and how to run it."""

    name: str
    serve: Callable[[], AbstractContextManager[Target]]


@dataclass(slots=True, frozen=True)
class Case:
    """One load that every contestant gets."""

    name: str
    plan: Callable[[Target], Plan]


@dataclass(slots=True, frozen=True)
class Measurement:
    """What one contestant did in one case of one round."""

    contestant: str
    case: str
    round: int
    rate: float
    p50_ms: float
    p99_ms: float
    errors: int
    wrong: int
    cpu_us: float  # of the server's processes, per right answer
    load_us: float = 0.0  # of the load generator, per request
    others: float = 0.0  # cores that neither the server nor the harness used
    by_role: Mapping[str, float] = field(default_factory=dict)  # CPU, us per right answer


@dataclass(slots=True, frozen=True)
class Spread:
    """A median over rounds, with the extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise; values must not be empty."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 1) -> str:
        """Return `median (low..high)`."""
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}..{self.high:,.{digits}f})"


@dataclass(slots=True)
class Comparison:
    """Everything that was measured."""

    measurements: list[Measurement] = field(default_factory=list)
    cannot: dict[str, str] = field(default_factory=dict)  # why, by contestant
    examples: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """The contestants that were measured, in their order."""
        return list(dict.fromkeys(m.contestant for m in self.measurements))

    def cases(self) -> list[str]:
        """The cases, in their order."""
        return list(dict.fromkeys(m.case for m in self.measurements))

    def values(self, contestant: str, case: str, what: str) -> dict[int, float]:
        """Return a field of the measurements, by round."""
        return {
            m.round: float(getattr(m, what))
            for m in self.measurements
            if m.contestant == contestant and m.case == case
        }

    def spread(self, contestant: str, case: str, what: str) -> Spread:
        """Return a field's median over rounds."""
        return Spread.of(list(self.values(contestant, case, what).values()))

    def ratio(self, peer: str, case: str, what: str) -> Spread:
        """Return ours / peer, round by round.

        Where only the peer's value is 0 the ratio is infinite: it got nothing done.
        """
        ours, theirs = self.values(OURS, case, what), self.values(peer, case, what)
        both = sorted(ours.keys() & theirs.keys())
        return Spread.of([_divide(ours[n], theirs[n]) for n in both])


def _divide(ours: float, theirs: float) -> float:
    if theirs:
        return ours / theirs
    return float("inf") if ours else 1.0


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Return whose turn it is, from first to last."""
    for number in range(rounds):
        for name in names:
            yield number, name


class Keeper:
    """Keeps idle servers between their turns and stops the others; use as a context manager."""

    def __init__(
        self,
        contestants: Sequence[Contestant],
        say: Callable[[str], None],
        idle_cores: Callable[[Target], float] = lambda target: cpu.idle_share(
            target.family, IDLE_WATCH_S
        ),
    ) -> None:
        self._contestants = {contestant.name: contestant for contestant in contestants}
        self._say = say
        self._idle_cores = idle_cores
        self._kept = contextlib.ExitStack()
        self._running: dict[str, Target] = {}
        self._is_idle: dict[str, bool] = {}

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *error: object) -> None:
        self._kept.close()

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[Target]:
        """Yield the server, running; raises what its `serve` raises."""
        if name in self._running:
            yield self._running[name]
            return
        with contextlib.ExitStack() as stack:
            target = stack.enter_context(self._contestants[name].serve())
            yield target
            if name not in self._is_idle:
                cores = self._idle_cores(target)
                self._is_idle[name] = cores < IDLE_CORES_MAX
                kept = "stays" if self._is_idle[name] else "is stopped between its turns"
                self._say(f"{name} uses {cores:.1%} of a core when idle: it {kept}")
            if self._is_idle[name]:
                self._running[name] = target
                self._kept.push(stack.pop_all())


def least_disturbed(measure: Callable[[], Measurement]) -> Measurement:
    """Measure until others leave the machine alone, or `TRIES_MAX` times; return the best."""
    found: list[Measurement] = []
    while len(found) < TRIES_MAX and not (found and found[-1].others <= OTHERS_CORES_MAX):
        found.append(measure())
    return min(found, key=lambda one: one.others)


@dataclass(slots=True)
class Comparing:
    """A comparison under way."""

    report: Report
    rounds: int
    warm_up_s: float
    log: Path
    load_processes: int = 1
    comparison: Comparison = field(default_factory=Comparison)

    def run(self, contestants: Sequence[Contestant], cases: Sequence[Case]) -> Comparison:
        """Measure everything; what a contestant cannot do is noted, and the others go on."""
        comparison = self.comparison
        names = [contestant.name for contestant in contestants]
        with Keeper(contestants, self.report.step) as keeper:
            for number, name in turns(names, self.rounds):
                if name in comparison.cannot:
                    continue
                try:
                    with keeper.turn(name) as target:
                        if number == 0:
                            self.report.notes += [f"{name}: {note}" for note in target.notes]
                        for case in cases:
                            self._case(target, case, number)
                except CannotDo as error:
                    comparison.cannot[name] = error.message
        return comparison

    def _case(self, target: Target, case: Case, number: int) -> None:
        what = f"round {number + 1} of {self.rounds}: {target.name}, {case.name}"
        found = least_disturbed(lambda: self._measure(target, case, number, what))
        self.comparison.measurements.append(found)
        text = f"{what}: {found.rate:,.0f}/s, p99 {found.p99_ms:.2f} ms"
        if found.others > OTHERS_CORES_MAX:
            text += f"; disturbed: others used {found.others:.2f} cores"
        self.report.step(text)

    def _measure(self, target: Target, case: Case, number: int, what: str) -> Measurement:
        plan = case.plan(target)
        warm_up = msgspec.structs.replace(plan, seconds=self.warm_up_s)
        self._load(warm_up, f"{what}: warming up")
        before, started = _Used.now(target), time.monotonic()
        tally = self._load(plan, what)
        used = _Used.now(target).since(before)
        others = (used.machine_s - used.server_s - used.own_s) / (time.monotonic() - started)
        self.comparison.examples += [f"{target.name}: {text}" for text in tally.examples]
        times = tally.times()
        return Measurement(
            contestant=target.name,
            case=case.name,
            round=number,
            rate=tally.rate,
            p50_ms=times.quantile(0.5) / 1e6,
            p99_ms=times.quantile(0.99) / 1e6,
            errors=tally.errors + tally.broken + tally.unanswered + tally.connect_errors,
            wrong=tally.wrong + tally.unexpected,
            cpu_us=used.server_s * 1e6 / max(1, tally.right),
            load_us=tally.cpu_us_per_request,
            others=max(0.0, others),
            by_role={
                role: seconds * 1e6 / max(1, tally.right) for role, seconds in used.roles_s.items()
            },
        )

    def _load(self, plan: Plan, what: str) -> Tally:
        with Load(plan, self.log, min(self.load_processes, plan.connections)) as load:
            return screen.watch(self.report.console, what, load)


@dataclass(slots=True, frozen=True)
class _Used:
    """CPU time so far."""

    machine_s: float
    server_s: float
    own_s: float
    roles_s: Mapping[str, float]

    @classmethod
    def now(cls, target: Target) -> _Used:
        rows = target.family()
        roles = dict.fromkeys(target.roles.values(), 0.0)
        for row in rows:
            if row.pid in target.roles:
                roles[target.roles[row.pid]] += cpu.seconds_of([row])
        return cls(cpu.machine_seconds(), cpu.seconds_of(rows), cpu.own_seconds(), roles)

    def since(self, before: _Used) -> _Used:
        return _Used(
            self.machine_s - before.machine_s,
            self.server_s - before.server_s,
            self.own_s - before.own_s,
            {role: seconds - before.roles_s[role] for role, seconds in self.roles_s.items()},
        )


def add(report: Report, comparison: Comparison, limits: dict[str, float] | None = None) -> None:
    """Put rows into the report: one section per case, one group of rows per contestant."""
    for case in comparison.cases():
        for name in comparison.names():
            rate = comparison.spread(name, case, "rate")
            note = f"{rate.low:,.0f}..{rate.high:,.0f}"
            if name != OURS and OURS in comparison.names():
                note += f"; ours / it: {comparison.ratio(name, case, 'rate').text(2)}"
            limit = (limits or {}).get(case)
            report.add(case, Figure(f"{name}: requests", rate.median, "1/s", limit, note))
            for what, label, unit in (
                ("p50_ms", "p50", "ms"),
                ("p99_ms", "p99", "ms"),
                ("cpu_us", "server CPU a request", "us"),
                ("load_us", "load generator's CPU", "us"),
                ("others", "disturbed by others", "cores"),
            ):
                spread = comparison.spread(name, case, what)
                text = f"{spread.low:,.2f}..{spread.high:,.2f}"
                report.add(case, Figure(f"{name}: {label}", spread.median, unit, note=text))
            faults = {
                what: sum(comparison.values(name, case, what).values())
                for what in ("errors", "wrong")
            }
            report.add(case, *(Figure(f"{name}: {what}", n) for what, n in faults.items() if n))
        report.headlines.append(_headline(comparison, case))
    report.plots["throughput"] = functools.partial(plots.throughput, _points(comparison))
    for name, reason in comparison.cannot.items():
        report.notes.append(f"{name} was not measured: {reason}")
    report.notes += comparison.examples[:12]


def _headline(comparison: Comparison, case: str) -> tuple[str, str, str]:
    def said(name: str) -> str:
        rate, p99 = (comparison.spread(name, case, what).median for what in ("rate", "p99_ms"))
        return f"{rate:,.0f}/s, p99 {p99:.2f} ms"

    names = comparison.names()
    peers = [
        f"{name} {said(name)} (ours {comparison.ratio(name, case, 'rate').median:.1f} x)"
        for name in names
        if name != OURS
    ]
    return case, said(OURS) if OURS in names else "", "; ".join(peers)


def _points(comparison: Comparison) -> dict[str, list[plots.LoadPoint]]:
    return {
        name: [
            plots.LoadPoint(
                comparison.spread(name, case, "rate").median,
                comparison.spread(name, case, "p99_ms").median,
                case,
            )
            for case in comparison.cases()
            if comparison.values(name, case, "rate")
        ]
        for name in comparison.names()
    }
