"""grpc.aio, the usual way to serve gRPC from Python: the echo alone, in its handler.

No batching, no worker, no model server behind it: the bytes of the one tensor are found, multiplied
and put back.  So it is not a peer, but the most that a front end made of it could reach.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from overcommit.bench.dialect import Grpc
from overcommit.bench.peers.environments import Environment
from overcommit.bench.peers.peer import CannotDo, Job, Kind, Launch, Peer, Requirements, only

APP: Final = Path(__file__).parent / "apps" / "grpc_aio_app.py"


def launch(job: Job, environment: Environment, port: int) -> Launch:
    """Start one process with uvloop."""
    only("grpc_aio", job, Kind.ECHO, because="it is the echo and nothing else")
    if job.protocol != "grpc":
        raise CannotDo("grpc_aio speaks gRPC alone")
    return Launch(
        (str(environment.python), str(APP), str(port)),
        Grpc(),
        {"SCALE": str(job.scales["echo"]), "WIDTH": str(job.width)},
        notes=("the echo in the handler of a grpc.aio server, uvloop, one process, no batching",),
    )


PEER: Final = Peer(
    "grpc_aio",
    Requirements("1.81", (("numpy==2.4.6", "uvloop>=0.21"), ("grpcio==1.81.1",))),
    launch,
)
