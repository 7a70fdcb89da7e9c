# %% [markdown]
# # A Python class with pre- and postprocessing
# `engine = "python"` runs a class of yours: here texts come in, are measured, and texts go out. Serve
# with `--allow-code`.

# %%
import os
import time
from pathlib import Path

import numpy as np

import overcommit

client = overcommit.Client(os.environ.get("OVERCOMMIT_URL", "http://127.0.0.1:8000"))
MODELS = Path(os.environ.get("OVERCOMMIT_MODELS", "models"))  # the server serves this folder too

# %%
folder = MODELS / "readability"
folder.mkdir(parents=True, exist_ok=True)
(folder / "model.py").write_text(
    """
import numpy as np

class Model:
    def load(self, folder, parameters):
        self.limit = float(parameters["limit"])

    def preprocess(self, inputs):  # BYTES are objects: one text a row
        texts = [row.decode() for row in inputs["text"].reshape(-1)]
        words = [text.split() for text in texts]
        return {"length": np.array([[np.mean([len(w) for w in each] or [0])] for each in words])}

    def infer(self, inputs):
        return {"hard": inputs["length"] > self.limit, "length": inputs["length"]}

    def postprocess(self, outputs):
        verdict = np.where(outputs["hard"], b"hard", b"easy").astype(object)
        return {"verdict": verdict, "length": outputs["length"].astype("float32")}
"""
)
(folder / "model.toml").write_text(
    """
engine = "python"
entry = "model.py:Model"
allow_code = true
parameters.limit = 6
[batching]
max_batch_size = 16
[[input]]
name = "text"
datatype = "BYTES"
shape = [-1, 1]
[[output]]
name = "verdict"
datatype = "BYTES"
shape = [-1, 1]
[[output]]
name = "length"
datatype = "FP32"
shape = [-1, 1]
"""
)
while not client.is_ready("readability"):  # the server looks every two seconds
    time.sleep(0.1)

# %%
texts = [["the cat sat on the mat"], ["multidimensional parallelisation considerations"]]
result = client.infer("readability", {"text": np.array(texts, object)})
print(result["verdict"].tolist(), result["length"].tolist())
assert result["verdict"].reshape(-1).tolist() == [b"easy", b"hard"]
client.close()
