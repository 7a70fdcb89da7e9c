# %% [markdown]
# # Text classification: a head over embeddings
# A few labelled sentences, MiniLM's vectors, and a linear layer: the layer becomes a model of its own
# (3 KB), in the folder that the server watches. Serve with `--allow-code`, for `model.py` is code.

# %%
import os
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import overcommit

client = overcommit.Client(os.environ.get("OVERCOMMIT_URL", "http://127.0.0.1:8000"))
MODELS = Path(os.environ.get("OVERCOMMIT_MODELS", "models"))  # the server serves this folder too
LABELS = ["complaint", "praise"]

# %%
complaints = [
    "The parcel came late and was broken.",
    "Nobody answers my calls, this is terrible.",
    "I want my money back.",
    "The app crashes all the time.",
]
praises = [
    "Great service, thank you!",
    "I love this product.",
    "Everything arrived early and works well.",
    "The best purchase of this year.",
]
vectors = client.embed("minilm", complaints + praises)
wanted = np.repeat([[1.0, -1.0], [-1.0, 1.0]], 4, axis=0)
# Ridge regression on the labels: good enough for a head.
weight = np.linalg.solve(vectors.T @ vectors + 0.1 * np.eye(vectors.shape[1]), vectors.T @ wanted)

# %%
folder = MODELS / "mood"
folder.mkdir(parents=True, exist_ok=True)
save_file({"head.weight": np.ascontiguousarray(weight.T, "float32")}, folder / "model.safetensors")
(folder / "model.py").write_text(
    f"""
import torch

class Mood(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear({vectors.shape[1]}, {len(LABELS)}, bias=False)

    def forward(self, vector):
        return {{"score": self.head(vector)}}
"""
)
(folder / "model.toml").write_text(
    f"""
allow_code = true
[batching]
max_batch_size = 32
[[input]]
name = "vector"
datatype = "FP32"
shape = [-1, {vectors.shape[1]}]
[[output]]
name = "score"
datatype = "FP32"
shape = [-1, {len(LABELS)}]
"""
)
while not client.is_ready("mood"):  # the server looks every two seconds
    time.sleep(0.1)

# %%
new = ["It is broken and nobody helps me.", "Wonderful, I love it, thank you!"]
scores = client.infer("mood", {"vector": client.embed("minilm", new)})["score"]
found = [LABELS[row.argmax()] for row in scores]
print(dict(zip(new, found, strict=True)))
assert found == ["complaint", "praise"]
client.close()
