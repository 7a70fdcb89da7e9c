"""LitServe: FastAPI in front, a worker process behind queues; here its faster ZeroMQ queue."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from overcommit.bench.dialect import PlainJson
from overcommit.bench.peers.environments import Environment
from overcommit.bench.peers.peer import Job, Kind, Launch, Peer, Requirements, only

APP: Final = Path(__file__).parent / "apps" / "litserve_app.py"
WAIT_S: Final = 0.0005


def launch(job: Job, environment: Environment, port: int) -> Launch:
    """Start one API server and one worker."""
    only("litserve", job, Kind.ECHO, because="it has a process per model, and bodies in JSON here")
    argv = [str(environment.python), str(APP), str(port)]
    argv += [str(job.scales["echo"]), str(job.batch_max), str(WAIT_S)]
    return Launch(
        tuple(argv),
        PlainJson(path="/predict"),
        notes=(
            f"batches of up to {job.batch_max}, wait {WAIT_S * 1e3:g} ms, fast_queue, one worker",
        ),
    )


PEER: Final = Peer(
    "litserve", Requirements("0.2.19", (("numpy==2.4.6",), ("litserve==0.2.19",))), launch
)
