# %% [markdown]
# # Tabular data
# A LightGBM model is served as its library writes it (`pip install 'overcommit[trees]'`); XGBoost
# (`model.ubj`) and scikit-learn are alike. Nothing has to be written but the file.

# %%
import os
import time
from pathlib import Path

import lightgbm
import numpy as np

import overcommit

client = overcommit.Client(os.environ.get("OVERCOMMIT_URL", "http://127.0.0.1:8000"))
MODELS = Path(os.environ.get("OVERCOMMIT_MODELS", "models"))  # the server serves this folder too

# %%
random = np.random.default_rng(0)
rows = random.random((500, 4)).astype("float32")  # age, months, calls, invoices
left = (rows[:, 1] < 0.3) & (rows[:, 2] > 0.5)
settings = {"objective": "binary", "verbose": -1, "num_threads": 1}
booster = lightgbm.train(settings, lightgbm.Dataset(rows, left), 20)

# %%
folder = MODELS / "churn"
folder.mkdir(parents=True, exist_ok=True)
booster.save_model(folder / "model.lgb")
while not client.is_ready("churn"):  # the server looks every two seconds
    time.sleep(0.1)

# %%
customers = np.array([[0.4, 0.1, 0.9, 0.5], [0.4, 0.9, 0.1, 0.5]], "float32")
risk = client.infer("churn", {"input": customers})["predict"]
print(risk)
np.testing.assert_allclose(risk.reshape(-1), booster.predict(customers))
assert risk.reshape(-1)[0] > 0.5 > risk.reshape(-1)[1]
client.close()
