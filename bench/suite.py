"""All scenarios: by name, or a group of them one after the other, and their results together.

`serving` is what `make bench` runs, `memory` what `make bench-memory` does, `all` is both: each scenario
with the peers that it is usually compared with.  One that cannot run (a peer that does not install) is a
missed condition of its own, and the others go on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console

from overcommit.bench import (
    activation,
    chaos,
    churn,
    encoder,
    fleet,
    front_ends,
    gpu,
    large_payload,
    many_models,
    micro,
    overcommit,
    packing,
    pressure,
    replay,
    same_host,
    sharing,
    small_requests,
    variants,
)
from overcommit.bench.errors import BenchError
from overcommit.bench.prepare import Options
from overcommit.bench.report import Report, machine

SCENARIOS: Final[dict[str, Callable[[Options, Report], None]]] = {
    "micro": micro.run,
    "small_requests": small_requests.run,
    "front_ends": front_ends.run,
    "many_models": many_models.run,
    "large_payload": large_payload.run,
    "same_host": same_host.run,
    "embedding": encoder.run,
    "overcommit": overcommit.run,
    "pressure": pressure.run,
    "activation": activation.run,
    "replay": replay.run,
    "churn": churn.run,
    "variants": variants.run,
    "fleet": fleet.run,
    "sharing": sharing.run,
    "packing": packing.run,
    "chaos": chaos.run,
    "gpu": gpu.run,
}
SERVING: Final = (  # how requests are served; the others are about where models are
    *("micro", "small_requests", "front_ends", "many_models", "large_payload", "same_host"),
    *("embedding", "overcommit", "variants", "chaos"),
)
GROUPS: Final = ("serving", "memory", "all")
AGAINST: Final = {"small_requests": ("triton", "mosec"), "overcommit": ("ray", "ray-haproxy")}
BEGIN: Final = "<!-- bench:{group}:begin -->"
END: Final = "<!-- bench:{group}:end -->"


def members(group: str) -> list[str]:
    """Return the scenarios of a group, in their order."""
    is_member: Callable[[str], bool] = {
        "serving": lambda name: name in SERVING,
        "memory": lambda name: name not in SERVING,
        "all": lambda name: True,
    }[group]
    return [name for name in SCENARIOS if is_member(name)]


def run(name: str, options: Options, console: Console) -> list[Report]:
    """Run one scenario or a group of them; each is shown as soon as it is done.

    How long each of a group took is said at the end.  Raises BenchError when the only one fails.
    """
    if name not in GROUPS:
        report = Report(name, console)
        SCENARIOS[name](options, report)
        report.show()
        return [report]
    reports: list[Report] = []
    for each in members(name):
        report = Report(each, console)
        reports.append(report)
        against = options.against or AGAINST.get(each, ())
        started_s = time.monotonic()
        try:
            SCENARIOS[each](dataclasses.replace(options, against=against), report)
        except BenchError as error:
            report.expect("it runs", False, error.message)
        report.show()
        report.took_s = time.monotonic() - started_s
    console.print(f"\ntook {times(reports)}", highlight=False)
    return reports


def times(reports: Sequence[Report]) -> str:
    """Return how long each scenario took, and all of them."""
    each = ", ".join(f"{report.scenario} {report.took_s:.0f} s" for report in reports)
    minutes, seconds = divmod(round(sum(report.took_s for report in reports)), 60)
    return f"{each}; all {minutes} min {seconds} s"


def to_json(reports: Sequence[Report]) -> bytes:
    """Return the reports as JSON: one as itself, several by name, with one description of it all."""
    if len(reports) == 1:
        return reports[0].to_json()
    content: dict[str, Any] = {"machine": machine(), "scenarios": {}}
    for report in reports:
        found = msgspec.json.decode(report.to_json())
        del found["scenario"], found["machine"]
        found["took_s"] = round(report.took_s, 1)
        content["scenarios"][report.scenario] = found
    return msgspec.json.format(msgspec.json.encode(content), indent=2)


def write_table(path: Path, reports: Sequence[Report]) -> None:
    """Put the reports' headlines between the marks of their groups in a Markdown file.

    Raises BenchError when it has no such marks.
    """
    text = path.read_text()
    for group in ("serving", "memory"):
        mine = [report for report in reports if report.scenario in members(group)]
        if not mine:
            continue
        begin, end = BEGIN.format(group=group), END.format(group=group)
        before, found, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found or not found_end:
            raise BenchError(f"{path} has no lines {begin} and {end} to write between")
        text = f"{before}{begin}\n{table(mine)}{end}{after}"
    path.write_text(text)


def table(reports: Sequence[Report]) -> str:
    """Return a Markdown table of what each report is remembered for."""
    facts = machine()
    about = (
        f"Measured {facts['date']} on {facts['processor']}, {facts['memory']}, Linux "
        f"{facts['kernel'].split('-')[0]}, Python {facts['python']}, torch {facts['torch']}; the "
        f"clients run on the same cores."
    )
    lines = [
        about,
        "",
        "| scenario | figure | value | limit or peer in the same run |",
        "|---|---|---|---|",
    ]
    for report in reports:
        for headline in report.headlines:
            lines.append(f"| `{report.scenario}` | {' | '.join(headline)} |")
        if not report.conditions:
            continue
        missed = len(report.missed())
        held = f"{len(report.conditions) - missed} of {len(report.conditions)} conditions hold"
        lines.append(f"| `{report.scenario}` | {held} | | |")
    return "\n".join(lines) + "\n"
