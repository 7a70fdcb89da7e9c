"""What `overcommit check` prints: a table of models, what is ignored or wrong, what will not be served."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from overcommit.runtime.config import TensorSpec
from overcommit.runtime.telemetry import show_bytes
from overcommit.server.check import Checker, ModelReport, Report
from overcommit.server.tables import ROWS_MAX

_STEP: Final = 64  # models between two steps of the bar


def check_repositories(
    roots: Sequence[str], cache_dir: str | None, allow_code: bool, as_json: bool, console: Console
) -> int:
    """Print what will be served; return 1 if something that is there will not be, or not as it is meant."""
    began_s = time.monotonic()
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True) as progress:
        task = progress.add_task("looking at models", total=None)

        def on_progress(done: int, total: int) -> None:
            if done % _STEP == 0:
                progress.update(task, completed=done, total=total)

        report = Checker(cache_dir, allow_code).check(roots, on_progress)
    good, bad = report.counts()
    faults = report.faults()
    if as_json:
        body: dict[str, Any] = msgspec.to_builtins(report)
        console.file.write(
            msgspec.json.encode(
                {**body, "served": good, "not_served": bad, "faults": faults}
            ).decode()
        )
        console.file.write("\n")
    else:
        _show(report, console)
        taken_s = time.monotonic() - began_s
        wrong = f", {faults} faults in what their files say" if faults else ""
        text = f"{good} versions will be served, {bad} will not{wrong} ({taken_s:.1f} s)"
        console.print(text, highlight=False)
    return 1 if bad or faults else 0


def _show(report: Report, console: Console) -> None:
    table = Table()
    for title in ("model", "version", "engine", "inputs", "outputs"):
        table.add_column(title, overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("result")
    rows = [(model, each) for model in report.models for each in model.versions]
    for model, each in rows[:ROWS_MAX]:
        result = "[green]packed[/]" if each.is_packed else "to be packed"
        cells = (
            model.name,
            each.version,
            f"{each.engine}, {each.sequences}" if each.sequences else each.engine,
            _tensors(each.inputs),
            _tensors(each.outputs),
        )
        size = show_bytes(each.nbytes) if each.nbytes else ""
        table.add_row(*map(escape, cells), size, "[red]not served[/]" if each.problem else result)
    if len(rows) > ROWS_MAX:
        table.caption = f"and {len(rows) - ROWS_MAX} more"
    console.print(table)
    for model in report.models:
        for line in _lines(model):
            console.print(line, highlight=False, soft_wrap=True)
    for remark in report.remarks:
        console.print(f"note: {escape(remark)}", highlight=False, soft_wrap=True)


def _lines(model: ModelReport) -> list[str]:
    name = escape(model.name)
    lines = [
        f"[red]{name} version {escape(version)}: {escape(problem)}[/]"
        for version, problem in model.problems
    ]
    lines += [f"[red]{name}: {escape(fault)}[/]" for fault in model.faults]
    lines += [f"{name}: ignored: {escape(note)}" for note in model.ignored]
    if model.left_out:
        lines.append(f"{name}: left out by its version policy: {', '.join(model.left_out)}")
    if model.aliases:
        names = (f"{key} (version {v})" if v else key for key, v in model.aliases.items())
        lines.append(f"{name}: also called {escape(', '.join(names))}")
    return lines


def _tensors(specs: Sequence[TensorSpec]) -> str:
    """Names, datatypes and shapes; nothing where trials will tell."""
    return "\n".join(
        f"{spec.name} {spec.datatype} {'x'.join('?' if n < 0 else str(n) for n in spec.shape)}"
        for spec in specs
    )
