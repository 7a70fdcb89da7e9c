# %% [markdown]
# # Image classification
# EfficientNet-Lite0 of the demo takes pictures of 224 x 224, channels first, scaled to about -1 to 1.

# %%
import os

import numpy as np

import overcommit

client = overcommit.Client(os.environ.get("OVERCOMMIT_URL", "http://127.0.0.1:8000"))
info = client.model("efficientnet-lite0")
print(info.inputs, info.outputs)

# %% [markdown]
# A picture that needs no file: a red disc on white. With Pillow it is
# `np.asarray(Image.open(...).resize((224, 224)))`.

# %%
rows, columns = np.mgrid[:224, :224]
picture = np.full((224, 224, 3), 255, np.uint8)
picture[(rows - 112) ** 2 + (columns - 112) ** 2 < 80**2] = (220, 30, 30)
batch = ((picture.astype("float32") - 127) / 128).transpose(2, 0, 1)[None]

# %%
logits = client.infer("efficientnet-lite0", {info.inputs[0].name: batch})["logits"][0]
shares = np.exp(logits - logits.max())
shares /= shares.sum()
best = shares.argsort()[::-1][:5]
print([(int(each), round(float(shares[each]), 3)) for each in best])  # classes of ImageNet
assert logits.shape == (1000,)

# %% [markdown]
# Pictures in one request are a batch, and answers do not depend on the company.

# %%
four = client.infer("efficientnet-lite0", {info.inputs[0].name: np.repeat(batch, 4, axis=0)})
np.testing.assert_allclose(four["logits"][3], logits, atol=1e-3)
client.close()
