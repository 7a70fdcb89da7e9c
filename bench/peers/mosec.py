"""Mosec: a Rust front end, Python workers behind it, batching by size and time."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from overcommit.bench.dialect import PlainJson
from overcommit.bench.peers.environments import Environment
from overcommit.bench.peers.peer import Job, Kind, Launch, Peer, Requirements, only

APP: Final = Path(__file__).parent / "apps" / "mosec_app.py"
# The shortest that Mosec takes; its own default of 10 ms would add 10 ms to every lone request.
WAIT_MS: Final = 1


def launch(job: Job, environment: Environment, port: int) -> Launch:
    """Start one stage with one worker."""
    only("mosec", job, Kind.ECHO, because="it has a process per model, and bodies in JSON here")
    argv = [str(environment.python), str(APP), "--address", "127.0.0.1", "--port", str(port)]
    argv += ["--timeout", "30000", "--capacity", "4096", "--log-level", "warning"]
    given = {
        "SCALE": str(job.scales["echo"]),
        "BATCH_MAX": str(job.batch_max),
        "WAIT_MS": str(WAIT_MS),
    }
    return Launch(
        tuple(argv),
        PlainJson(path="/inference"),
        given,
        notes=(f"batches of up to {job.batch_max}, wait {WAIT_MS} ms, one worker",),
    )


PEER: Final = Peer("mosec", Requirements("0.9.8", (("numpy==2.4.6",), ("mosec==0.9.8",))), launch)
