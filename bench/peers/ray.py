"""Ray Serve: a proxy and replicas as actors; models of a replica are multiplexed.

Measured with 200 models, room for 40, in requests/s: 258 as it comes, 284 with
`RAY_SERVE_THROUGHPUT_OPTIMIZED`, 1,155 with HAProxy in place of its Python proxy as well; so with both.
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
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
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
            f"HAProxy, serve.batch of up to {job.batch_max}, one replica"
            if is_echo
            else f"HAProxy, max_num_models_per_replica {job.room}, one replica; np.load in a thread",
        ),
        leftovers=(Path(temporary),),
    )


PEER: Final = Peer("ray", Requirements("2.60.0", (("numpy==2.4.6", "ray[serve]==2.60.0"),)), launch)
