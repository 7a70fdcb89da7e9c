"""`python -m overcommit.bench SCENARIO`: run a scenario, print what it found, check it."""

from __future__ import annotations

import enum
import signal
import sys
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape

from overcommit.bench import peers, plots, suite
from overcommit.bench.errors import BenchError
from overcommit.bench.prepare import Options, ReplayPlan


class Scenario(enum.Enum):
    """What can be run."""

    micro = "micro"
    small_requests = "small_requests"
    front_ends = "front_ends"
    many_models = "many_models"
    large_payload = "large_payload"
    same_host = "same_host"
    embedding = "embedding"
    overcommit = "overcommit"
    pressure = "pressure"
    activation = "activation"
    replay = "replay"
    churn = "churn"
    variants = "variants"
    fleet = "fleet"
    sharing = "sharing"
    packing = "packing"
    chaos = "chaos"
    gpu = "gpu"
    serving = "serving"
    memory = "memory"
    all = "all"


class Protocol(enum.Enum):
    """What the clients speak."""

    http = "http"
    grpc = "grpc"


CHECK_FAILED: Final = 1
RUN_FAILED: Final = 2
TERMINATED: Final = 128 + signal.SIGTERM
WORK: Final = Path("~/.cache/overcommit/bench")

app = typer.Typer(add_completion=False)


@app.command()
def main(
    scenario: Annotated[Scenario, typer.Argument(help="What to run.")],
    trace: Annotated[
        Path | None,
        typer.Argument(help="replay: a CSV or JSONL file with time_s, model and maybe bytes."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Shorter times, the same conditions.")] = False,
    check: Annotated[
        bool, typer.Option(help="Exit with status 1 when a condition is missed.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what was found into this folder (matplotlib).")
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Write the table of results into this Markdown file.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Where models, images and logs are kept.")] = WORK,
    seconds: Annotated[float | None, typer.Option(min=1.0, help="Time of the load.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 1,
    connections: Annotated[int, typer.Option(min=1, max=4096, help="Clients at once.")] = 16,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")] = 2,
    load_processes: Annotated[
        int, typer.Option(min=1, max=64, help="Processes of the load generator.")
    ] = 1,
    against: Annotated[
        str, typer.Option(help=f"Other servers to compare with: {','.join(peers.PEERS)}.")
    ] = "",
    rounds: Annotated[
        int | None, typer.Option(min=1, max=100, help="Turns of each server that is compared.")
    ] = None,
    protocol: Annotated[
        Protocol, typer.Option(help="small_requests: what is spoken.")
    ] = Protocol.http,
    policies: Annotated[
        str, typer.Option(help="replay: policies; cost_aware:24 has a half-life of 24 h.")
    ] = "",
    sizes: Annotated[
        str, typer.Option(help="replay: laws of sizes, as equal,drawn, or files with model,bytes.")
    ] = "",
    caches: Annotated[str, typer.Option(help="replay: caches, as 6%,13%,40GB.")] = "",
    models: Annotated[
        int | None, typer.Option(min=100, max=60_000, help="Models of the scenario fleet.")
    ] = None,
) -> None:
    """Measure and check the real server."""
    # So that every `with` block ends its processes; the default action would end us alone.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
    console = Console()
    plan = ReplayPlan(trace, _words(policies), _words(sizes), _words(caches))
    if plan != ReplayPlan() and scenario is not Scenario.replay:
        raise typer.BadParameter("a trace, policies, sizes and caches are for the scenario replay")
    options = Options(
        replay=plan,
        work=work.expanduser().resolve(),
        quick=quick,
        seconds=seconds,
        seed=seed,
        connections=connections,
        workers=workers,
        load_processes=min(load_processes, connections),
        against=_peers(against),
        rounds=rounds,
        protocol=protocol.value,
        models=models,
    )
    try:
        if plot is not None:
            plots.require()  # now, not after the run
        reports = suite.run(scenario.value, options, console)
    except BenchError as error:
        console.print(f"[red]the run failed[/red]: {escape(error.message)}", highlight=False)
        raise typer.Exit(RUN_FAILED) from error
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_bytes(suite.to_json(reports))
    if plot is not None:
        for path in [path for report in reports for path in report.draw(plot)]:
            console.print(f"drawn: {path}", highlight=False)
    if readme is not None:
        suite.write_table(readme, reports)
    missed = [condition for report in reports for condition in report.missed()]
    if check and missed:
        names = "; ".join(condition.name for condition in missed)
        console.print(f"[red]{len(missed)} conditions missed[/red]: {names}", highlight=False)
        raise typer.Exit(CHECK_FAILED)


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _peers(against: str) -> tuple[str, ...]:
    names = _words(against)
    for name in names:
        if name not in peers.PEERS:
            known = ", ".join(peers.PEERS)
            raise typer.BadParameter(f"'{name}' is not one of {known}", param_hint="--against")
    return names


if __name__ == "__main__":
    app()
