"""Other servers, each in an environment of its own and set up as its makers recommend.

    with peers.serve("triton", job, work, say) as target: ...

The peers are listed here; nobody else needs to know their modules.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from overcommit.bench import grpc_wire
from overcommit.bench.dialect import Dialect, Grpc
from overcommit.bench.peers import environments, grpc_aio, litserve, mlserver, mosec, ray, triton
from overcommit.bench.peers.peer import CannotDo, Job, Kind, Launch, Peer
from overcommit.bench.peers.ports import free_port
from overcommit.bench.peers.process import PeerProcess
from overcommit.bench.processes import Row

__all__ = ["PEERS", "CannotDo", "Job", "Kind", "Target", "serve"]

PEERS: Final[dict[str, Peer]] = {
    peer.name: peer
    for peer in (
        *(triton.PEER, mosec.PEER, litserve.PEER, ray.PEER, ray.WITH_HAPROXY),
        mlserver.PEER,
        grpc_aio.PEER,
    )
}
PROBE_LIMIT_S: Final = 5.0


@dataclass(slots=True, frozen=True)
class Target:
    """A server that runs: ours or a peer's."""

    name: str
    host: str
    port: int
    dialect: Dialect
    family: Callable[[], list[Row]]
    notes: tuple[str, ...] = ()
    roles: Mapping[int, str] = field(default_factory=dict)  # of processes whose CPU is told apart


@contextlib.contextmanager
def serve(
    name: str, job: Job, work: Path, say: Callable[[str], None] = lambda text: None
) -> Iterator[Target]:
    """Run a peer until the block ends; it has answered a first inference when the block begins.

    Raises CannotDo when the peer cannot do this job, BenchError when it does not start.
    """
    peer = PEERS[name]
    environment = environments.ensure(work, peer.installed_as or name, peer.requirements, say)
    job.folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    launch = peer.launch(job, environment, port)
    if isinstance(launch.dialect, Grpc) != (job.protocol == "grpc"):
        raise CannotDo(f"{name} does not speak {job.protocol}")
    process = PeerProcess(
        name,
        launch.argv,
        job.folder / f"{name}.log",
        launch.environment,
        lambda: _answers(job, launch, port),
    )
    try:
        with process:
            yield Target(name, "127.0.0.1", port, launch.dialect, process.family, launch.notes)
    finally:
        for folder in launch.leftovers:
            shutil.rmtree(folder, ignore_errors=True)


def _answers(job: Job, launch: Launch, port: int) -> bool:
    """Whether a first inference is answered; health checks of some say yes before that."""
    model = next(iter(job.scales))
    request = launch.dialect.request(model, np.zeros((1, job.width), np.float32))
    try:
        with socket.create_connection(("127.0.0.1", port), PROBE_LIMIT_S) as connection:
            if isinstance(launch.dialect, Grpc):
                return grpc_wire.ask(connection, request) is not None
            connection.sendall(request)
            response = http.client.HTTPResponse(connection, method="POST")
            response.begin()
            return response.status == 200
    except (OSError, http.client.HTTPException):
        return False
