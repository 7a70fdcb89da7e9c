"""Echo as a model of MLServer; copied into the model's folder."""

from __future__ import annotations

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Echo(MLModel):
    """y = x * scale; MLServer batches and takes apart."""

    async def load(self):
        """Read the scale from model-settings.json."""
        self.scale = np.float32(self.settings.parameters.extra["scale"])
        return True

    async def predict(self, payload):
        """One multiplication for the whole batch."""
        x = NumpyCodec.decode_input(payload.inputs[0])
        y = NumpyCodec.encode_output("y", x * self.scale)
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=[y])
