"""Models under Ray Serve: `ray_app.py PORT JOB.json`, one replica.

The job: {"kind": "echo" | "multiplexed", "scale", "batch_max", "weights": folder, "room"}.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import ray
from ray import serve
from starlette.requests import Request

PORT = int(sys.argv[1])
JOB = json.loads(Path(sys.argv[2]).read_text())
ONGOING_MAX = 1024  # the default of 5 would queue everything at the proxy


@serve.deployment(num_replicas=1, max_ongoing_requests=ONGOING_MAX)
class Echo:
    """y = x * scale, batched by Ray."""

    def __init__(self, scale):
        self.scale = np.float32(scale)

    @serve.batch(max_batch_size=JOB["batch_max"], batch_wait_timeout_s=0.0)
    async def multiply(self, rows):
        """One multiplication for the whole batch."""
        return list(np.stack(rows) * self.scale)

    async def __call__(self, request: Request):
        """Answer one request."""
        body = await request.json()
        row = await self.multiply(np.asarray(body["x"], np.float32))
        return {"y": row.tolist()}


@serve.deployment(num_replicas=1, max_ongoing_requests=ONGOING_MAX)
class Multiplexed:
    """y = x * the row of the model's table that x[0] names; tables come and go."""

    def __init__(self, weights):
        self.weights = Path(weights)

    @serve.multiplexed(max_num_models_per_replica=max(1, JOB["room"]))
    async def load(self, name: str):
        """Load a model; in a thread, so that others are answered meanwhile."""
        return await asyncio.to_thread(np.load, self.weights / f"{name}.npy")

    async def __call__(self, request: Request):
        """Answer one request."""
        table = await self.load(serve.get_multiplexed_model_id())
        body = await request.json()
        x = np.asarray(body["x"], np.float32)
        return {"y": (x * table[int(x[0]) % len(table)]).tolist()}


if __name__ == "__main__":
    ray.init(
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=256 << 20,
        _temp_dir=JOB["temporary"],
    )
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    is_echo = JOB["kind"] == "echo"
    application = Echo.bind(JOB["scale"]) if is_echo else Multiplexed.bind(JOB["weights"])
    serve.run(application, route_prefix="/")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    while not ended.wait(1.0):
        pass
    serve.shutdown()
    ray.shutdown()
