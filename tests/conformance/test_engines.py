"""Models of every engine through one running server, by Triton's client; answers are the libraries' own.

DEVICE holds one of the two large models: each comes back right after it was evicted.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http as triton
from serving import Server

lightgbm = pytest.importorskip("lightgbm")
xgboost = pytest.importorskip("xgboost")
ensemble = pytest.importorskip("sklearn.ensemble")
joblib = pytest.importorskip("joblib")

HAS_COMPILER = any(map(shutil.which, ("g++", "clang++")))
RNG = np.random.default_rng(5)
X = RNG.standard_normal((200, 6)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] * X[:, 2] > 0).astype(int) + (X[:, 3] > 1)
ROWS = X[:5]
WIDE = RNG.standard_normal((2, 1024)).astype(np.float32)
PBTXT = """
platform: "pytorch_libtorch"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 32, 32 ] reshape { shape: [ 1024 ] } }
output { name: "y" data_type: TYPE_FP32 dims: [ 2, 2 ] reshape { shape: [ 4 ] } }
"""


class Net(torch.nn.Module):
    """4 MiB of weights: with its bias three chunks of the eight MiB that DEVICE has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.linear = torch.nn.Linear(1024, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


class Short(Net):
    """Names its output."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"y": super().forward(x)}


def export(folder: Path, module: torch.nn.Module) -> None:
    folder.mkdir()
    rows = torch.export.Dim("rows", min=1, max=16)
    shapes = {"x": {0: rows}}
    exported = torch.export.export(module.eval(), (torch.randn(2, 1024),), dynamic_shapes=shapes)
    torch.export.save(exported, folder / "model.pt2")


@pytest.fixture(scope="module")
def boosters() -> dict[str, Any]:
    settings = {"objective": "multiclass", "num_class": 3, "verbose": -1, "num_threads": 1}
    labels = np.array(["cold", "warm", "hot"])[Y]
    softprob = {"objective": "multi:softprob", "num_class": 3, "nthread": 1}
    return {
        "lightgbm": lightgbm.train(settings, lightgbm.Dataset(X, Y), 8),
        "xgboost": xgboost.train(softprob, xgboost.DMatrix(X, Y), 8),
        "sklearn": ensemble.RandomForestClassifier(8, random_state=0).fit(X, labels),
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, boosters: dict[str, Any]) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("engines")
    for name in ("lightgbm", "xgboost", "sklearn", "script"):
        (root / name).mkdir()
    (root / "group" / "nested").mkdir(parents=True)
    for folder in (root / "lightgbm", root / "group" / "nested"):
        boosters["lightgbm"].save_model(folder / "model.lgb")
    (root / "group" / "nested" / "model-settings.json").write_text(
        '{"name": "of-mlserver", "implementation": "mlserver_lightgbm.LightGBMModel"}'
    )
    boosters["xgboost"].save_model(root / "xgboost" / "model.ubj")
    joblib.dump(boosters["sklearn"], root / "sklearn" / "model.joblib")
    (root / "sklearn" / "model.toml").write_text("allow_code = true\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted: Any = torch.jit.script(Net(1000).eval())
        torch.jit.save(scripted, str(root / "script" / "model.pt"))
    (root / "script" / "model.toml").write_text(
        '[[input]]\nname = "x"\ndatatype = "FP32"\nshape = [-1, 1024]\n'
    )
    export(root / "reshaped", Short(4))
    (root / "reshaped" / "config.pbtxt").write_text(PBTXT)
    if HAS_COMPILER:
        export(root / "compiled", Short(1001))
        (root / "compiled" / "model.toml").write_text('engine = "aoti"\n')
    flags = ("--allow-code", "--device-memory", "8MiB", "--host-memory", "32MiB")
    with Server(root, cache=tmp_path_factory.mktemp("cache"), flags=flags) as running:
        running.wait_until(
            lambda: not {"PACKING"} & {row["state"] for row in running.models().values()}
        )
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}", network_timeout=60) as made:
        yield made


def ask(client: triton.InferenceServerClient, model: str, name: str, rows: Any) -> Any:
    given = triton.InferInput(name, list(rows.shape), "FP32")
    given.set_data_from_numpy(rows)
    return client.infer(model, [given])


def wanted(width: int) -> Any:
    with torch.inference_mode():
        return Net(width)(torch.tensor(WIDE)).numpy()


def test_every_model_is_ready_under_its_engine(server: Server) -> None:
    engines = {name: (row["state"], row["engine"]) for name, row in server.models().items()}
    assert engines == {
        "lightgbm/1": ("READY", "lightgbm"),
        "nested/1": ("READY", "lightgbm"),
        "xgboost/1": ("READY", "xgboost"),
        "sklearn/1": ("READY", "sklearn"),
        "script/1": ("READY", "torchscript"),
        "reshaped/1": ("READY", "torch_export"),
        **({"compiled/1": ("READY", "aoti")} if HAS_COMPILER else {}),
    }


@pytest.mark.parametrize("model", ["lightgbm", "nested", "of-mlserver"])
def test_lightgbm_predicts_as_it_does_itself(
    client: triton.InferenceServerClient, boosters: dict[str, Any], model: str
) -> None:
    got = ask(client, model, "input", ROWS).as_numpy("predict")
    np.testing.assert_array_equal(got, boosters["lightgbm"].predict(ROWS))


def test_xgboost_predicts_as_it_does_itself(
    client: triton.InferenceServerClient, boosters: dict[str, Any]
) -> None:
    got = ask(client, "xgboost", "input", ROWS).as_numpy("predict")
    np.testing.assert_allclose(got, boosters["xgboost"].predict(xgboost.DMatrix(ROWS)), atol=1e-6)


def test_scikit_learn_gives_classes_and_probabilities(
    client: triton.InferenceServerClient, boosters: dict[str, Any]
) -> None:
    forest = boosters["sklearn"]
    got = ask(client, "sklearn", "input", ROWS)
    assert got.as_numpy("predict").astype(str).tolist() == forest.predict(ROWS).tolist()
    np.testing.assert_allclose(got.as_numpy("predict_proba"), forest.predict_proba(ROWS))


def test_a_reshaped_model_is_what_its_clients_see(
    server: Server, client: triton.InferenceServerClient
) -> None:
    described = client.get_model_metadata("reshaped")
    assert described["inputs"][0]["shape"] == [-1, 32, 32]
    assert described["outputs"][0]["shape"] == [-1, 2, 2]
    config = client.get_model_config("reshaped")
    assert (config["input"][0]["dims"], config["input"][0]["reshape"]) == (
        [32, 32],
        {"shape": [1024]},
    )
    got = ask(client, "reshaped", "x", WIDE.reshape(2, 32, 32)).as_numpy("y")
    np.testing.assert_allclose(got, wanted(4).reshape(2, 2, 2), atol=1e-6)
    wrong = {"name": "x", "datatype": "FP32", "shape": [1, 1024], "data": [0.0] * 1024}
    assert server.post("/v2/models/reshaped/infer", {"inputs": [wrong]}).status == 400


def test_large_models_are_right_again_after_each_eviction(
    server: Server, client: triton.InferenceServerClient
) -> None:
    models = {"script": (1000, "output")}
    if HAS_COMPILER:
        models["compiled"] = (1001, "y")
    for _ in range(3):
        for model, (width, output) in models.items():
            got = ask(client, model, "x", WIDE).as_numpy(output)
            np.testing.assert_allclose(got, wanted(width), atol=1e-5)
    rows = server.models()
    if HAS_COMPILER:
        assert all(rows[f"{model}/1"]["evictions"] >= 2 for model in models)
