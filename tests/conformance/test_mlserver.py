"""A repository of MLServer's as it is, asked as its clients ask.

What is expected was recorded from MLServer 1.7.1 with its runtimes for scikit-learn and LightGBM: status,
names, datatypes, shapes.  Numbers are the libraries' own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import lightgbm
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
import xgboost
from serving import Server
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression, LogisticRegression

RNG = np.random.default_rng(5)
X = RNG.standard_normal((200, 4))
Y = (X[:, 0] + X[:, 1] * X[:, 2] > 0).astype(int) + (X[:, 3] > 1)
ROWS = [[0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]]
FLAT = [number for row in ROWS for number in row]


def settings(folder: Path, kind: str, file: str, **more: Any) -> None:
    text = {
        "name": folder.name,
        "implementation": kind,
        "parameters": {"uri": f"./{file}", "version": "v0.1.0"},
        **more,
    }
    (folder / "model-settings.json").write_text(json.dumps(text))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    training = lightgbm.Dataset(X, Y)
    softmax = {"objective": "multiclass", "num_class": 3, "verbose": -1, "num_threads": 1}
    return {
        "iris": LogisticRegression().fit(X, Y),
        "house": LinearRegression().fit(X, X @ [1.0, 2.0, 3.0, 4.0]),
        "axes": PCA(2).fit(X),
        "leaves": lightgbm.train(softmax, training, 8),
        "classes": xgboost.XGBClassifier(n_estimators=8, n_jobs=1).fit(X, Y),
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Any]) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("mlserver")
    for name in models:
        (root / name).mkdir()
    for name in ("iris", "house", "axes"):
        joblib.dump(models[name], root / name / "model.joblib")
        settings(root / name, "mlserver_sklearn.SKLearnModel", "model.joblib")
    declared = [
        {"name": "predict", "datatype": "FP32", "shape": [4]}
    ]  # which decides nothing there
    settings(root / "iris", "mlserver_sklearn.SKLearnModel", "model.joblib", inputs=declared)
    models["leaves"].save_model(root / "leaves" / "model.bst")
    settings(root / "leaves", "mlserver_lightgbm.LightGBMModel", "model.bst")
    models["classes"].save_model(root / "classes" / "model.ubj")
    settings(root / "classes", "mlserver_xgboost.XGBoostModel", "model.ubj")
    cache = tmp_path_factory.mktemp("cache")
    with Server(root, cache=cache, flags=("--allow-code",)) as running:
        running.wait_until(
            lambda: not any(row["state"] == "PACKING" for row in running.models().values())
        )
        reasons = {name: row["reason"] for name, row in running.models().items()}
        assert not any(reasons.values()), reasons
        yield running


def tensor(name: str = "predict", datatype: str = "FP32", **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [2, 4], "data": FLAT, **more}


def ask(server: Server, name: str, *inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = server.post(f"/v2/models/{name}/infer", {"inputs": inputs, **more})
    assert answer.status == 200, answer.body
    outputs = answer.json()["outputs"]
    return {each["name"]: (each["datatype"], each["shape"], each["data"]) for each in outputs}


@pytest.mark.parametrize(
    "given",
    [
        tensor(),
        tensor("input-0", "FP64"),
        tensor("whatever", data=ROWS),
        tensor(parameters={"content_type": "np"}),
    ],
)
def test_a_tensor_of_any_name_and_kind_is_taken(
    server: Server, models: dict[str, Any], given: dict[str, Any]
) -> None:
    for _ in range(4):  # the first ones teach the server what the later ones look like
        outputs = ask(server, "iris", given)
        assert outputs["predict"] == ("INT64", [2, 1], models["iris"].predict(ROWS).tolist())
    datatype, shape, data = outputs["predict_proba"]
    assert (datatype, shape) == ("FP64", [2, 3])
    np.testing.assert_allclose(
        np.reshape(data, (2, 3)), models["iris"].predict_proba(ROWS), rtol=1e-5
    )


def test_whole_numbers_are_numbers_and_other_numbers_later_are_others(
    server: Server, models: dict[str, Any]
) -> None:
    for start in range(6):
        whole = np.arange(start, start + 8).reshape(2, 4)
        given = tensor("n", "INT64", data=whole.reshape(-1).tolist())
        _, shape, data = ask(server, "house", given)["predict"]
        assert shape == [2, 1]
        np.testing.assert_allclose(data, models["house"].predict(whole))


def test_outputs_may_be_chosen_and_numbers_are_as_exact_as_they_came(
    server: Server, models: dict[str, Any]
) -> None:
    chosen = ask(server, "iris", tensor(datatype="FP64"), outputs=[{"name": "predict_proba"}])
    assert list(chosen) == ["predict_proba"]
    wanted = models["iris"].predict_proba(ROWS)
    np.testing.assert_allclose(np.reshape(chosen["predict_proba"][2], (2, 3)), wanted, rtol=1e-12)
    assert ask(server, "axes", tensor())["transform"][1] == [2, 2]


def test_libraries_of_trees_answer_as_there(server: Server, models: dict[str, Any]) -> None:
    datatype, shape, data = ask(server, "leaves", tensor("x", "FP64"))["predict"]
    assert (datatype, shape) == ("FP64", [2, 3])
    np.testing.assert_allclose(np.reshape(data, (2, 3)), models["leaves"].predict(ROWS))
    # What XGBClassifier has saved predicts classes.
    answer = ask(server, "classes", tensor())
    assert answer["predict"][1:] == ([2, 1], models["classes"].predict(ROWS).tolist())
    assert answer["predict_proba"][1] == [2, 3]


def test_a_version_is_found_by_what_its_settings_call_it(server: Server) -> None:
    path = "/v2/models/iris/versions/v0.1.0"
    assert server.request("GET", path).status == 200
    assert server.request("GET", f"{path}/ready").status == 200
    answer = server.post(f"{path}/infer", {"inputs": [tensor()]})
    assert answer.json()["model_version"] == "1"
    assert server.request("GET", "/v2/models/iris/versions/v0.2.0").status == 400


def test_what_its_codec_refuses_is_refused(server: Server) -> None:
    for inputs in (
        [tensor(shape=[8])],
        [tensor(shape=[2, 3], data=FLAT[:6])],
        [tensor("a", shape=[2, 2], data=FLAT[:4]), tensor("b", shape=[2, 2], data=FLAT[:4])],
        [tensor(datatype="BYTES", data=[str(number) for number in FLAT])],
        [tensor(datatype="INT64", data=[0.5] * 8)],
    ):
        answer = server.post("/v2/models/iris/infer", {"inputs": inputs})
        assert answer.status == 400
        assert "iris" in answer.json()["error"]


@pytest.mark.parametrize("datatype", ["FP32", "FP64", "INT64"])
def test_binary_tensors_and_grpc_are_adapted_as_well(
    server: Server, models: dict[str, Any], datatype: str
) -> None:
    rows = np.arange(8).reshape(2, 4)
    wanted = models["house"].predict(rows)
    types = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64}
    for module, url in (
        (triton, f"127.0.0.1:{server.port}"),
        (triton_grpc, f"127.0.0.1:{server.grpc_port}"),
    ):
        with module.InferenceServerClient(url) as client:
            for shift in range(3):
                given = module.InferInput("any", [2, 4], datatype)
                given.set_data_from_numpy((rows + shift).astype(types[datatype]))
                found = client.infer("house", [given]).as_numpy("predict")
                np.testing.assert_allclose(found[:, 0], wanted + 10 * shift)
