"""What the command line shows: tables of models, of packed versions, of an answer's tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from overcommit.runtime.telemetry import show_bytes

_STATE_STYLE: Final = {"READY": "green", "PACKING": "yellow", "UNAVAILABLE": "red"}
_TIER_STYLE: Final = {"DEVICE": "green", "HOST": "cyan", "DISK": "dim"}
_CHROME_ROWS: Final = 7  # header, footer and frame of the table
_PREVIEW_VALUES: Final = 8
ROWS_MAX: Final = 200

Page = dict[str, Any]


def models_table(page: Page) -> RenderableType:
    """Show one page of a server's models and how full its tiers are."""
    rows = page["models"]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("model", no_wrap=True, overflow="ellipsis")
    for title in ("version", "state", "tier"):
        table.add_column(title, no_wrap=True)
    for title in ("size", "requests", "idle"):
        table.add_column(title, justify="right", no_wrap=True)
    # Columns that are mostly empty would push the others off a narrow terminal.
    extras = {
        "terms": [_terms(row) for row in rows],
        "reason": [str(row.get("reason", "")) for row in rows],
    }
    extras = {title: cells for title, cells in extras.items() if any(cells)}
    for title in extras:
        table.add_column(title, overflow="fold")
    for at, row in enumerate(rows):
        state = str(row["state"])
        table.add_row(
            escape(str(row["name"])),
            escape(str(row["version"])),
            _styled(state.lower(), _STATE_STYLE.get(state)),
            _tiers(row),
            _size(row["bytes"]),
            str(row["requests"]),
            _idle(row["last_used_s"]),
            *(escape(cells[at]) for cells in extras.values()),
        )
    lines = [f"{len(page['models'])} of {page['total']} versions"]
    states = page.get("states", {})  # a server from before this has none
    if set(states) - {"READY"}:
        lines += [f"{count} {state.lower()}" for state, count in sorted(states.items())]
    for tier in ("device", "host"):
        capacity, used = page[tier]["capacity"], page[tier]["used"]
        if capacity:
            share = f"{used / capacity:.0%}"
            lines.append(f"{tier} {_size(used) or '0'} of {_size(capacity)} ({share})")
    return Group(table, Text("   ".join(lines)))


def watch(console: Console, fetch: Callable[[int], Page], limit: int, interval_s: float) -> None:
    """Show the table again and again until Ctrl-C."""

    def draw() -> RenderableType:
        rows = max(1, min(limit, console.height - _CHROME_ROWS))
        return models_table(fetch(rows))

    with Live(draw(), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval_s)
                live.update(draw(), refresh=True)
        except KeyboardInterrupt:
            return


def answer_table(answer: dict[str, Any]) -> RenderableType:
    """Show the outputs of an inference answer."""
    table = Table(title=escape(f"{answer.get('model_name')} {answer.get('model_version', '')}"))
    for title in ("output", "datatype", "shape", "data"):
        table.add_column(title, overflow="fold")
    for output in answer.get("outputs", []):
        shape = "x".join(str(size) for size in output.get("shape", [])) or "scalar"
        row = (output.get("name"), output.get("datatype"), shape, _preview(output.get("data")))
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


@dataclass(slots=True, frozen=True)
class PackRow:
    """The outcome of packing one version."""

    name: str
    version: str
    engine: str
    nbytes: int
    seconds: float | None  # None: its image was there already
    error: str


def pack_table(rows: Sequence[PackRow]) -> Table:
    """Show what `overcommit pack` did."""
    table = Table()
    for title in ("model", "version", "engine"):
        table.add_column(title)
    for title in ("size", "seconds"):
        table.add_column(title, justify="right")
    table.add_column("result")
    for row in rows[:ROWS_MAX]:
        seconds = "" if row.seconds is None else f"{row.seconds:.2f}"
        result = "[green]packed[/]" if row.seconds is not None else "[dim]was packed[/]"
        result = "[red]broken[/]" if row.error else result
        cells = (escape(row.name), escape(row.version), escape(row.engine))
        table.add_row(*cells, _size(row.nbytes), seconds, result)
    if len(rows) > ROWS_MAX:
        table.caption = f"and {len(rows) - ROWS_MAX} more"
    return table


def _preview(data: object) -> str:
    while isinstance(data, list) and data and isinstance(data[0], list):
        data = data[0]
    if not isinstance(data, list):
        return ""
    shown = [f"{v:.5g}" if isinstance(v, float) else str(v) for v in data[:_PREVIEW_VALUES]]
    return ", ".join(shown) + (", ..." if len(data) > _PREVIEW_VALUES else "")


def _size(nbytes: int) -> str:
    return show_bytes(nbytes) if nbytes else ""


def _tiers(row: dict[str, Any]) -> str:
    """Every tier that holds the weights, the fastest first."""
    held = [tier for tier in ("DEVICE", "HOST") if row[f"{tier.lower()}_bytes"]]
    tiers = held or [str(row["tier"])]
    text = "+".join(tier.lower() for tier in tiers)
    return _styled("loading" if row.get("loading") else text, _TIER_STYLE.get(tiers[0]))


def _styled(text: str, style: str | None) -> str:
    return f"[{style}]{escape(text)}[/]" if style else escape(text)


def _terms(row: dict[str, Any]) -> str:
    """What keeps the model in memory, or ends its stay, other than its use."""
    terms = ["pinned"] if row["pinned"] else []
    if row["priority"]:
        terms.append(f"priority {row['priority']}")
    if row["min_resident_s"] and not row["pinned"]:
        terms.append(f"stays {_idle(row['min_resident_s'])}")
    if row["ttl_s"] and not row["pinned"]:
        terms.append(f"ttl {_idle(row['ttl_s'])}")
    return ", ".join(terms)


def _idle(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s"
