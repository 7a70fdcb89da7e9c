# %% [markdown]
# # Embeddings in OpenAI's form
# Whatever speaks to OpenAI's API takes this server by its base URL:
# `OpenAI(base_url=URL + "/v1", api_key="-")`.
# Here it is by hand, without a package.

# %%
import json
import os
import urllib.request

URL = os.environ.get("OVERCOMMIT_URL", "http://127.0.0.1:8000")

# %%
request = urllib.request.Request(
    f"{URL}/v1/embeddings",
    json.dumps({"model": "minilm", "input": ["hello world", "good night"]}).encode(),
    {"Content-Type": "application/json", "Authorization": "Bearer -"},
)
with urllib.request.urlopen(request) as response:
    answer = json.load(response)
print(answer["model"], answer["usage"], [len(row["embedding"]) for row in answer["data"]])
assert [row["index"] for row in answer["data"]] == [0, 1]

# %%
with urllib.request.urlopen(f"{URL}/v1/models") as response:
    names = [row["id"] for row in json.load(response)["data"]]
print(names)
assert "minilm" in names
