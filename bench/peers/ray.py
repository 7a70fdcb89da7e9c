"""Ray Serve: a proxy and replicas as actors; models of a replica are multiplexed.

`RAY_SERVE_THROUGHPUT_OPTIMIZED` is what its documentation recommends for production throughput.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Final

from overcommit.bench.dialect import PlainJson
from overcommit.bench.peers.environments import Environment
from overcommit.bench.peers.peer import Job, Kind, Launch, Peer, Requirements, only

APP: Final = Path(__file__).parent / "apps" / "ray_app.py"
MODEL_HEADER: Final = "serve_multiplexed_model_id"
SETTINGS: Final = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # needs a load balancer of one's own in front
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def launch(job: Job, environment: Environment, port: int) -> Launch:
    """Start a node of our own with one replica."""
    only(
        "ray",
        job,
        Kind.ECHO,
        Kind.MULTIPLEXED,
        because="what it serves here is written for echo and multiplexing alone",
    )
    # A socket's path has at most 107 bytes, and Ray adds 60 of its own.
    temporary = tempfile.mkdtemp(prefix="oc-ray-", dir="/tmp")
    content = {
        "kind": job.kind.value,
        "scale": job.scales.get("echo", 0.0),
        "batch_max": job.batch_max,
        "weights": str(job.weights),
        "room": job.room,
        "temporary": temporary,
    }
    file = job.folder / "ray-job.json"
    file.write_text(json.dumps(content))
    is_echo = job.kind is Kind.ECHO
    return Launch(
        (str(environment.python), str(APP), str(port), str(file)),
        PlainJson(path="/", model_header="" if is_echo else MODEL_HEADER),
        SETTINGS,
        notes=(
            f"serve.batch of up to {job.batch_max}, one replica"
            if is_echo
            else f"max_num_models_per_replica {job.room}, one replica; np.load in a thread",
        ),
        leftovers=(Path(temporary),),
    )


PEER: Final = Peer("ray", Requirements("2.60.0", (("numpy==2.4.6", "ray[serve]==2.60.0"),)), launch)
