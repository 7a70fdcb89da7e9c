"""What a scenario needs before the server starts: models, references, and folders to work in."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from overcommit.bench import references, screen
from overcommit.bench.references import References
from overcommit.bench.report import Report
from overcommit.bench.variants_repo import make_repository

VOCABULARY: Final = 30_522  # of MiniLM
RUNS_KEPT_MAX: Final = 10  # folders of failed runs


@dataclass(slots=True, frozen=True)
class ReplayPlan:
    """What the scenario `replay` is to do; empty: its own choice."""

    trace: Path | None = None
    policies: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()  # names of laws, or files
    caches: tuple[str, ...] = ()  # shares of all bytes ("6%"), or bytes ("40GB")


@dataclass(slots=True, frozen=True)
class Options:
    """What the command line said."""

    work: Path
    quick: bool = False
    seconds: float | None = None
    seed: int = 1
    connections: int = 16
    workers: int = 2
    load_processes: int = 1
    against: tuple[str, ...] = ()  # peers, for the scenarios that compare
    rounds: int | None = None
    protocol: str = "http"  # small_requests: or grpc
    replay: ReplayPlan = ReplayPlan()
    models: int | None = None  # how many, for the scenarios that may choose


@dataclass(slots=True, frozen=True)
class Fleet:
    """Models with known answers."""

    repository: Path
    cache: Path
    references: References

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names."""
        return self.references.names

    def images(self) -> list[Path]:
        """The files with weights that the server has made: parts and images."""
        parts = sorted((self.cache / "parts").glob("*.part"))
        return [*parts, *sorted((self.cache / "images").glob("*.image"))]


def minilm_variants(options: Options, report: Report, count: int) -> Fleet:
    """Return a repository of `count` variants, and their references."""
    report.step(f"{count} variants of all-MiniLM-L6-v2 in {options.work}")
    with screen.bar(report.console, "making variants") as advance:
        folders = make_repository(options.work, count, advance)
    return fleet_of(options, report, folders, VOCABULARY)


def fleet_of(
    options: Options,
    report: Report,
    folders: dict[str, Path],
    vocabulary: int,
    lengths: Sequence[int] = references.LENGTHS,
) -> Fleet:
    """Compute the references of model folders and check that they can be told apart."""
    root = next(iter(folders.values())).parent
    report.step("reference answers, by transformers alone")
    inputs = references.fixed_inputs(vocabulary, lengths)
    with screen.bar(report.console, "computing references") as advance:
        known = references.compute(folders, inputs, options.work / "references", advance)
    smallest = known.check_distinct()
    report.step(
        f"the answers of any two variants differ by {smallest:.2g} or more "
        f"(tolerance {references.TOLERANCE:g})"
    )
    return Fleet(root, options.work / "cache", known)


@contextlib.contextmanager
def run_folder(options: Options, report: Report) -> Iterator[Path]:
    """Yield a fresh folder for logs; it is kept when the run fails, and old ones go."""
    runs = options.work / "runs"
    folder = runs / f"{report.scenario}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder.mkdir(parents=True)
    for old in sorted(runs.iterdir(), key=lambda path: path.stat().st_mtime)[:-RUNS_KEPT_MAX]:
        shutil.rmtree(old, ignore_errors=True)
    kept = True
    try:
        yield folder
        kept = bool(report.missed())
    finally:
        if kept:
            report.step(f"logs are kept in {folder}")
        else:
            shutil.rmtree(folder)
