# %% [markdown]
# # Text embedding
# The server tokenizes, pools and scales: texts go in, vectors come out. Needs `overcommit demo`.

# %%
import os

import overcommit

client = overcommit.Client(os.environ.get("OVERCOMMIT_URL", "http://127.0.0.1:8000"))

# %%
texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose again."]
vectors = client.embed("minilm", texts)
print(vectors.shape)  # (3, 384)

# %% [markdown]
# Vectors have length 1, so their product is the cosine: cat and kitten are close, the bank is not.

# %%
cosines = vectors @ vectors.T
print(cosines.round(2))
assert cosines[0, 1] > 0.5 > cosines[0, 2]

# %% [markdown]
# The network itself, with tokens of your own, is `client.infer`.

# %%
result = client.infer(
    "minilm", {"input_ids": [[101, 7592, 2088, 102]], "attention_mask": [[1, 1, 1, 1]]}
)
print(result["last_hidden_state"].shape)  # (1, 4, 384)
client.close()
