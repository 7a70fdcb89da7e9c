# %% [markdown]
# # An ensemble: preprocessing and a model as one
# Pictures go in, classes come out; between the steps tensors stay inside the server. Needs
# `overcommit demo` and `--allow-code`.

# %%
import os
import time
from pathlib import Path

import numpy as np

import overcommit

client = overcommit.Client(os.environ.get("OVERCOMMIT_URL", "http://127.0.0.1:8000"))
MODELS = Path(os.environ.get("OVERCOMMIT_MODELS", "models"))  # the server serves this folder too
(image,) = client.model("efficientnet-lite0").inputs

# %% [markdown]
# The first step turns pictures of a camera into what the network takes.

# %%
folder = MODELS / "normalise"
folder.mkdir(parents=True, exist_ok=True)
(folder / "model.py").write_text(
    """
import numpy as np

class Model:
    def infer(self, inputs):
        scaled = (inputs["picture"].astype("float32") - 127) / 128
        return {"tensor": np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))}
"""
)
(folder / "model.toml").write_text(
    """
engine = "python"
entry = "model.py:Model"
allow_code = true
[batching]
max_batch_size = 16
[[input]]
name = "picture"
datatype = "UINT8"
shape = [-1, 224, 224, 3]
[[output]]
name = "tensor"
datatype = "FP32"
shape = [-1, 3, 224, 224]
"""
)

# %% [markdown]
# The ensemble is a `model.toml` and nothing else.

# %%
folder = MODELS / "camera"
folder.mkdir(parents=True, exist_ok=True)
(folder / "model.toml").write_text(
    f"""
[[input]]
name = "picture"
datatype = "UINT8"
shape = [-1, 224, 224, 3]
[[output]]
name = "logits"
datatype = "FP32"
shape = [-1, 1000]
[[ensemble.step]]
model = "normalise"
inputs = {{ picture = "picture" }}
outputs = {{ tensor = "clean" }}
[[ensemble.step]]
model = "efficientnet-lite0"
inputs = {{ {image.name} = "clean" }}
outputs = {{ logits = "logits" }}
"""
)
while not client.is_ready("camera"):  # the server looks every two seconds
    time.sleep(0.1)

# %%
picture = np.random.default_rng(0).integers(0, 255, (1, 224, 224, 3), np.uint8)
logits = client.infer("camera", {"picture": picture})["logits"]
direct = ((picture.astype("float32") - 127) / 128).transpose(0, 3, 1, 2)
np.testing.assert_allclose(
    logits, client.infer("efficientnet-lite0", {image.name: direct})["logits"], atol=1e-3
)
print(logits.shape)  # (1, 1000)
client.close()
