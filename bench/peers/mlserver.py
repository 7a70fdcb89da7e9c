"""MLServer: FastAPI in front, one inference process behind it, adaptive batching."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

from overcommit.bench.dialect import V2
from overcommit.bench.peers.environments import Environment
from overcommit.bench.peers.peer import Job, Kind, Launch, Peer, Requirements, only
from overcommit.bench.peers.ports import free_port

MODEL: Final = Path(__file__).parent / "apps" / "mlserver_model.py"
BATCH_S: Final = 0.0005


def launch(job: Job, environment: Environment, port: int) -> Launch:
    """Write the models' folders and start the server on them."""
    only(
        "mlserver",
        job,
        Kind.ECHO,
        Kind.PAYLOAD,
        Kind.MANY,
        because="it never evicts, and its environment has no torch",
    )
    root = job.folder / "mlserver"
    shutil.rmtree(root, ignore_errors=True)
    for name, scale in job.scales.items():
        folder = root / name
        folder.mkdir(parents=True)
        shutil.copy(MODEL, folder / "model.py")
        settings = {
            "name": name,
            "implementation": "model.Echo",
            "max_batch_size": job.batch_max,
            "max_batch_time": BATCH_S,
            "parameters": {"extra": {"scale": scale}},
        }
        (folder / "model-settings.json").write_text(json.dumps(settings))
    server = {
        "debug": False,
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": free_port(),
        "metrics_endpoint": None,
        "parallel_workers": 1,
    }
    (root / "settings.json").write_text(json.dumps(server))
    batching = f"adaptive batching up to {job.batch_max} within {BATCH_S * 1e3:g} ms"
    return Launch(
        (str(environment.folder / "bin" / "mlserver"), "start", str(root)),
        V2(),
        notes=(f"{batching}, one parallel worker, no metrics",),
    )


PEER: Final = Peer(
    "mlserver",
    # Its workers want the event loop that uvloop made by itself until 0.21.
    Requirements("1.7.1", (("mlserver==1.7.1", "uvloop==0.21.0"),), frozenset({"3.11", "3.12"})),
    launch,
)
