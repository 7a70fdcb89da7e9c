"""Progress while a scenario runs: bars on a terminal, nothing but the steps in a log file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from overcommit.bench.loadgen import Load
from overcommit.bench.tally import Tally

TICK_S: Final = 0.02

Advance = Callable[[int, int], None]


def _progress(console: Console, columns: Iterable[ProgressColumn]) -> Progress:
    disable = not console.is_terminal
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=disable)


@contextlib.contextmanager
def bar(console: Console, what: str) -> Iterator[Advance]:
    """Show a bar; yields a function that takes (done, total)."""
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn())
    with _progress(console, columns) as progress:
        task = progress.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance


def watch(
    console: Console, what: str, load: Load, on_tick: Callable[[], None] = lambda: None
) -> Tally:
    """Show how a load goes until it ends, calling `on_tick` often; return what it counted."""
    columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    started = time.monotonic()
    with _progress(console, columns) as progress:
        task = progress.add_task(what, total=load.plan.seconds, text="")
        while load.is_running:
            state = load.progress
            text = f"{state.right:,} right"
            for name in ("wrong", "errors", "broken"):
                if count := getattr(state, name):
                    text += f", {count:,} {name}"
            progress.update(task, completed=time.monotonic() - started, text=text)
            on_tick()
            time.sleep(TICK_S)
    return load.wait()
