"""Echo under Mosec: the arguments are Mosec's own; SCALE, BATCH_MAX and WAIT_MS are variables."""

from __future__ import annotations

import os

import numpy as np
from mosec import Server, Worker

SCALE = np.float32(os.environ["SCALE"])


class Echo(Worker):
    """Gets the JSON bodies of a batch, returns their answers."""

    def forward(self, data):
        """One multiplication for the whole batch."""
        batch = np.array([request["x"] for request in data], np.float32) * SCALE
        return [{"y": row} for row in batch.tolist()]


if __name__ == "__main__":
    server = Server()
    batch_max, wait_ms = int(os.environ["BATCH_MAX"]), int(os.environ["WAIT_MS"])
    server.append_worker(Echo, num=1, max_batch_size=batch_max, max_wait_time=wait_ms)
    server.run()
