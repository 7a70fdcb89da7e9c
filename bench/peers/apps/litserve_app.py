"""Echo under LitServe: `litserve_app.py PORT SCALE BATCH_MAX WAIT_S`."""

from __future__ import annotations

import sys

import litserve as ls
import numpy as np


class Echo(ls.LitAPI):
    """Decodes, multiplies a whole batch, encodes."""

    def setup(self, device):
        """Nothing to load."""
        self.scale = np.float32(sys.argv[2])

    def decode_request(self, request):
        """Return one row."""
        return np.asarray(request["x"], np.float32)

    def batch(self, inputs):
        """Stack rows."""
        return np.stack(inputs)

    def predict(self, x):
        """One multiplication for the whole batch."""
        return x * self.scale

    def unbatch(self, output):
        """Take rows apart."""
        return list(output)

    def encode_response(self, output):
        """Return what becomes JSON."""
        return {"y": output.tolist()}


if __name__ == "__main__":
    api = Echo(max_batch_size=int(sys.argv[3]), batch_timeout=float(sys.argv[4]))
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
    )
