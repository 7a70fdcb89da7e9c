"""All scenarios: by name, one after the other, and their results together.

`all` is what `make bench` runs: every scenario with the peers that it is usually compared with.  One
that cannot run (a peer that does not install) is a missed condition of its own, and the others go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console

from overcommit.bench import (
    chaos,
    churn,
    encoder,
    fleet,
    front_ends,
    large_payload,
    many_models,
    micro,
    overcommit,
    replay,
    small_requests,
    variants,
)
from overcommit.bench.errors import BenchError
from overcommit.bench.prepare import Options
from overcommit.bench.report import Report, machine

ALL: Final = "all"
SCENARIOS: Final[dict[str, Callable[[Options, Report], None]]] = {
    "micro": micro.run,
    "small_requests": small_requests.run,
    "front_ends": front_ends.run,
    "many_models": many_models.run,
    "large_payload": large_payload.run,
    "embedding": encoder.run,
    "overcommit": overcommit.run,
    "replay": replay.run,
    "churn": churn.run,
    "variants": variants.run,
    "fleet": fleet.run,
    "chaos": chaos.run,
}
AGAINST: Final = {"small_requests": ("triton", "mosec"), "overcommit": ("ray", "ray-haproxy")}
BEGIN: Final = "<!-- bench:begin -->"
END: Final = "<!-- bench:end -->"


def run(name: str, options: Options, console: Console) -> list[Report]:
    """Run one scenario, or all of them; each is shown as soon as it is done.

    Raises BenchError when the only one fails.
    """
    if name != ALL:
        report = Report(name, console)
        SCENARIOS[name](options, report)
        report.show()
        return [report]
    reports: list[Report] = []
    for each, scenario in SCENARIOS.items():
        report = Report(each, console)
        reports.append(report)
        against = options.against or AGAINST.get(each, ())
        try:
            scenario(dataclasses.replace(options, against=against), report)
        except BenchError as error:
            report.expect("it runs", False, error.message)
        report.show()
    return reports


def to_json(reports: Sequence[Report]) -> bytes:
    """Return the reports as JSON: one as itself, several by name, with one description of it all."""
    if len(reports) == 1:
        return reports[0].to_json()
    content: dict[str, Any] = {"machine": machine(), "scenarios": {}}
    for report in reports:
        found = msgspec.json.decode(report.to_json())
        del found["scenario"], found["machine"]
        content["scenarios"][report.scenario] = found
    return msgspec.json.format(msgspec.json.encode(content), indent=2)


def write_table(path: Path, reports: Sequence[Report]) -> None:
    """Put the reports' headlines between the marks of a Markdown file.

    Raises BenchError when it has no such marks.
    """
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{path} has no lines {BEGIN} and {END} to write between")
    path.write_text(f"{before}{BEGIN}\n{table(reports)}{END}{after}")


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
