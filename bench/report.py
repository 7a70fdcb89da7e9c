"""What a scenario found: figures with the physical limit beside them, and conditions met or missed.

The same content is printed as tables and written as JSON.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import overcommit

_PACKAGES: Final = ("torch", "transformers", "uvicorn", "uvloop", "numpy")
_DIGITS: Final = {
    "cores": 2,
    "1/s": 1,
    "ms": 2,
    "s": 2,
    "GB/s": 2,
    "GFLOP/s": 1,
    "GB": 2,
    "MB": 1,
    "x": 3,
    "us": 1,
    "share": 3,
}


@dataclass(slots=True, frozen=True)
class Figure:
    """One measured value; `limit` is what the machine can do, in the same unit."""

    name: str
    value: float
    unit: str = ""
    limit: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The value as a share of the limit."""
        return self.value / self.limit if self.limit else None


@dataclass(slots=True, frozen=True)
class Condition:
    """Something that must hold."""

    name: str
    is_met: bool
    detail: str = ""


def machine() -> dict[str, str]:
    """Describe the machine and the software."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{len(os.sched_getaffinity(0))} x {model}",
        "memory": f"{_memory_bytes() / 2**30:.1f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "overcommit": overcommit.__version__,
    }
    for package in _PACKAGES:
        facts[package] = importlib.metadata.version(package)
    return facts


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Report:
    """Filled by a scenario while it runs."""

    scenario: str
    console: Console
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=machine)
    sections: dict[str, list[Figure]] = field(default_factory=dict)
    conditions: list[Condition] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    headlines: list[tuple[str, str, str]] = field(default_factory=list)  # figure, value, limit
    plots: dict[str, Callable[[Path], None]] = field(default_factory=dict)  # name -> makes a PNG
    took_s: float = 0.0  # to run it, where it was one of a group

    def step(self, text: str) -> None:
        """Say what is being done now."""
        self.console.print(f"[dim]-[/dim] {escape(text)}", highlight=False)

    def add(self, section: str, *figures: Figure) -> None:
        """Put figures under a heading."""
        self.sections.setdefault(section, []).extend(figures)

    def expect(self, name: str, is_met: bool, detail: str = "") -> None:
        """Note whether a condition holds."""
        self.conditions.append(Condition(name, is_met, detail))

    def missed(self) -> list[Condition]:
        """Return the conditions that do not hold."""
        return [condition for condition in self.conditions if not condition.is_met]

    def draw(self, folder: Path) -> list[Path]:
        """Make every plot, as FOLDER/SCENARIO-NAME.png; return the files."""
        paths = []
        for name, plot in self.plots.items():
            paths.append(folder / f"{self.scenario}-{name}.png")
            plot(paths[-1])
        return paths

    # --- output ---------------------------------------------------------------------------------
    def show(self) -> None:
        """Print everything."""
        console = self.console
        about = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        console.print(f"\n[bold]{self.scenario}[/bold]  {about}", highlight=False)
        if self.settings:
            text = ", ".join(f"{name} {value}" for name, value in self.settings.items())
            console.print(f"[dim]{text}[/dim]", highlight=False)
        for title, figures in self.sections.items():
            console.print(_table(title, figures))
        for note in self.notes:
            console.print(f"note: {escape(note)}", highlight=False)
        for condition in self.conditions:
            mark = "[green]holds [/green]" if condition.is_met else "[red]MISSED[/red]"
            detail = f" [dim]({escape(condition.detail)})[/dim]" if condition.detail else ""
            console.print(f"{mark} {condition.name}{detail}", highlight=False)

    def to_json(self) -> bytes:
        """Return everything as JSON."""
        sections = {
            title: {
                figure.name: {
                    "value": figure.value,
                    "unit": figure.unit,
                    "limit": figure.limit,
                    "ratio": figure.ratio,
                    "note": figure.note,
                }
                for figure in figures
            }
            for title, figures in self.sections.items()
        }
        content = {
            "scenario": self.scenario,
            "machine": self.facts,
            "settings": self.settings,
            "figures": sections,
            "conditions": self.conditions,
            "notes": self.notes,
        }
        return msgspec.json.format(msgspec.json.encode(content), indent=2)


def _table(title: str, figures: list[Figure]) -> Table:
    has_limits = any(figure.limit is not None for figure in figures)
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        show_header=has_limits,
    )
    table.add_column("")
    table.add_column("", justify="right")
    if has_limits:
        table.add_column("limit", justify="right")
        table.add_column("ratio", justify="right")
    table.add_column("", style="dim")
    for figure in figures:
        cells = [figure.name, _text(figure.value, figure.unit)]
        if has_limits:
            ratio = figure.ratio
            cells.append("" if figure.limit is None else _text(figure.limit, figure.unit))
            cells.append("" if ratio is None else f"{ratio:.0%}")
        table.add_row(*cells, figure.note)
    return table


def _text(value: float, unit: str) -> str:
    digits = _DIGITS.get(unit, 0)
    return f"{value:,.{digits}f}{' ' + unit if unit else ''}"
