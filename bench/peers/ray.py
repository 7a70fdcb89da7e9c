"""Ray Serve: a proxy and replicas as actors; models of a replica are multiplexed.

Two peers: `ray` is the release with its own proxy and `RAY_SERVE_THROUGHPUT_OPTIMIZED`; `ray-haproxy`
is the high-throughput mode that its documentation describes for 2.55 and later, off unless asked for,
with HAProxy in place of the proxy.  With 200 models and room for 40 they gave 284 and 1,155
requests/s when first measured, and 258 without either setting.
"""

from __future__ import annotations

import functools
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
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def launch(job: Job, environment: Environment, port: int, *, haproxy: bool = False) -> Launch:
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
    proxy = "HAProxy" if haproxy else "its own proxy"
    return Launch(
        (str(environment.python), str(APP), str(port), str(file)),
        PlainJson(path="/", model_header="" if is_echo else MODEL_HEADER),
        {**SETTINGS, "RAY_SERVE_ENABLE_HA_PROXY": "1" if haproxy else "0"},
        notes=(
            f"{proxy}, serve.batch of up to {job.batch_max}, one replica"
            if is_echo
            else f"{proxy}, max_num_models_per_replica {job.room}, one replica; np.load in a thread",
        ),
        leftovers=(Path(temporary),),
    )


_NEEDS: Final = Requirements("2.60.0", (("numpy==2.4.6", "ray[serve]==2.60.0"),))
PEER: Final = Peer("ray", _NEEDS, launch)
WITH_HAPROXY: Final = Peer(
    "ray-haproxy", _NEEDS, functools.partial(launch, haproxy=True), installed_as="ray"
)
