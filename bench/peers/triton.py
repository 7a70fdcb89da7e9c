"""Triton Inference Server: the binary and Python backend that the package nvidia-pytriton carries.

Nothing of pytriton itself runs: `tritonserver` is started on a model repository, as in Triton's own
container, with dynamic batching as its optimization guide recommends (no queue delay).
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Final

from overcommit.bench.dialect import V2, Grpc
from overcommit.bench.peers.environments import Environment, python_version
from overcommit.bench.peers.peer import CannotDo, Job, Kind, Launch, Peer, Requirements, only

MODEL: Final = Path(__file__).parent / "apps" / "triton_model.py"
CONFIG: Final = """\
name: "{name}"
backend: "python"
max_batch_size: {batch_max}
input [{{ name: "x" data_type: TYPE_FP32 dims: [{width}] }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: [{width}] }}]
dynamic_batching {{ }}
instance_group [{{ count: 1 kind: KIND_CPU }}]
parameters {{ key: "scale" value: {{ string_value: "{scale}" }} }}
"""


def launch(job: Job, environment: Environment, port: int) -> Launch:
    """Write a model repository and start the server on it."""
    only(
        "triton",
        job,
        Kind.ECHO,
        Kind.PAYLOAD,
        Kind.MANY,
        because="it never evicts, and its environment has no torch",
    )
    repository = job.folder / "triton-repository"
    shutil.rmtree(repository, ignore_errors=True)
    width = -1 if job.kind is Kind.PAYLOAD else job.width
    for name, scale in job.scales.items():
        folder = repository / name
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(
            CONFIG.format(name=name, batch_max=job.batch_max, width=width, scale=scale)
        )
        shutil.copy(MODEL, folder / "1" / "model.py")
    spoken, silent = ("grpc", "http") if job.protocol == "grpc" else ("http", "grpc")
    argv, variables = command(environment, repository)
    argv += [f"--{spoken}-address", "127.0.0.1", f"--{spoken}-port", str(port)]
    argv += [f"--allow-{silent}", "false", "--log-info", "false"]
    return Launch(
        tuple(argv),
        Grpc() if job.protocol == "grpc" else V2(),
        variables,
        notes=(
            f"Python backend, dynamic batching up to {job.batch_max}, one instance, no metrics",
        ),
    )


def command(environment: Environment, repository: Path) -> tuple[list[str], dict[str, str]]:
    """Return what starts the server on a repository, without its ports, and what it needs for that.

    Raises CannotDo when there is no Python backend for this Python.
    """
    root = environment.packages / "pytriton" / "tritonserver"
    stub = root / "python_backend_stubs" / python_version() / "triton_python_backend_stub"
    if not stub.exists():
        raise CannotDo(f"triton has no Python backend for Python {python_version()}")
    _put_stub(stub, root / "backends" / "python" / stub.name)
    server = root / "bin" / "tritonserver"
    server.chmod(0o755)
    argv = [str(server), "--model-repository", str(repository), "--allow-metrics", "false"]
    argv += ["--backend-directory", str(root / "backends")]
    libraries = [str(environment.packages / "nvidia_pytriton.libs"), _python_library()]
    return argv, {
        "LD_LIBRARY_PATH": ":".join(libraries),
        # The stub is a Python of its own: it finds our packages through these.
        "PATH": f"{environment.folder / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        "VIRTUAL_ENV": str(environment.folder),
        "PYTHONPATH": str(environment.packages),
    }


def _put_stub(stub: Path, place: Path) -> None:
    """Put the stub where the backend looks for it; the package has one for each Python."""
    if not place.exists():
        aside = place.with_name(f".{place.name}.{os.getpid()}")
        shutil.copy(stub, aside)
        aside.chmod(0o755)
        aside.rename(place)


def _python_library() -> str:
    return str(sysconfig.get_config_var("LIBDIR"))


PEER: Final = Peer(
    "triton",
    Requirements(
        "2.51",
        (("numpy==1.26.4",), ("--no-deps", "nvidia-pytriton==0.7.0")),
        frozenset({"3.11", "3.12", "3.13"}),
    ),
    launch,
)
