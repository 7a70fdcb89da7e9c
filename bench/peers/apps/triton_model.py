"""Echo as a model of Triton's Python backend; copied into the model repository."""

from __future__ import annotations

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """y = x * scale."""

    def initialize(self, args):
        """Read the scale from config.pbtxt."""
        parameters = json.loads(args["model_config"])["parameters"]
        self.scale = np.float32(parameters["scale"]["string_value"])

    def execute(self, requests):
        """One multiplication for the whole batch."""
        rows = [pb_utils.get_input_tensor_by_name(r, "x").as_numpy() for r in requests]
        if len(rows) == 1:
            parts = [rows[0] * self.scale]
        else:
            ends = np.cumsum([len(row) for row in rows])[:-1]
            parts = np.split(np.concatenate(rows) * self.scale, ends)
        return [
            pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("y", part)])
            for part in parts
        ]
