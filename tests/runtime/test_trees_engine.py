"""Models that their own libraries read: the answers are the libraries'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_rig import Opened, packed, refused

RNG = np.random.default_rng(3)
X = RNG.standard_normal((200, 6)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] * X[:, 2] > 0).astype(int) + (X[:, 3] > 1)
ROWS = X[:5]


def opened(folder: Path, cache: Path, **config: Any) -> Opened:
    done = packed(folder, cache, **config)
    assert done.config.inputs[0].shape == (-1, 6)
    assert done.config.batching.max_batch_size > 1
    return Opened(done, allow_code=True)


@pytest.mark.parametrize("name", ["model.lgb", "model.txt"])
def test_lightgbm_answers_as_it_does_itself(tmp_path: Path, name: str) -> None:
    lightgbm = pytest.importorskip("lightgbm")
    settings = {"objective": "multiclass", "num_class": 3, "verbose": -1, "num_threads": 1}
    booster = lightgbm.train(settings, lightgbm.Dataset(X, Y), 8)
    (tmp_path / "m").mkdir()
    booster.save_model(tmp_path / "m" / name)
    engine = "lightgbm" if name.endswith("txt") else None
    subject = opened(tmp_path / "m", tmp_path / "cache", engine=engine)
    file = (tmp_path / "m" / name).read_bytes()
    assert subject.header.nbytes >= len(file)
    assert bytes(subject.payload[: len(file)]) == file
    np.testing.assert_array_equal(
        subject.model.run({"input": ROWS})["predict"], booster.predict(ROWS)
    )


@pytest.mark.parametrize("suffix", ["ubj", "json"])
def test_xgboost_answers_as_it_does_itself(tmp_path: Path, suffix: str) -> None:
    xgboost = pytest.importorskip("xgboost")
    data = xgboost.DMatrix(X, Y)
    booster = xgboost.train({"objective": "multi:softprob", "num_class": 3, "nthread": 1}, data, 8)
    (tmp_path / "m").mkdir()
    booster.save_model(tmp_path / "m" / f"model.{suffix}")
    engine = "xgboost" if suffix == "json" else None
    subject = opened(tmp_path / "m", tmp_path / "cache", engine=engine)
    wanted = booster.predict(xgboost.DMatrix(ROWS))
    np.testing.assert_allclose(subject.model.run({"input": ROWS})["predict"], wanted, atol=1e-6)


def test_a_pickle_of_scikit_learn_runs_only_where_it_may(tmp_path: Path) -> None:
    sklearn = pytest.importorskip("sklearn.ensemble")
    joblib = pytest.importorskip("joblib")
    labels = np.array(["cold", "warm", "hot"])[Y]
    forest = sklearn.RandomForestClassifier(8, random_state=0).fit(X, labels)
    folder = tmp_path / "m"
    folder.mkdir()
    joblib.dump(forest, folder / "model.joblib")
    assert "--allow-code" in refused(folder, tmp_path / "cache")
    message = refused(folder, tmp_path / "cache", allow_code=True)
    assert "--allow-code" in message
    assert "a pickle, runs whatever it holds" in message
    subject = opened(folder, tmp_path / "cache", allow_code=True, server_allows=True)
    answer = subject.model.run({"input": ROWS})
    assert [word.decode() for word in answer["predict"]] == forest.predict(ROWS).tolist()
    np.testing.assert_allclose(answer["predict_proba"], forest.predict_proba(ROWS))


def test_trees_in_an_onnx_file_weigh_what_they_weigh(tmp_path: Path) -> None:
    """An ensemble keeps its trees as attributes of one node: then the graph itself is the image."""
    onnx = pytest.importorskip("onnx")
    helper, leaves = onnx.helper, 6000
    node = helper.make_node(
        "TreeEnsembleRegressor",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        n_targets=1,
        nodes_treeids=sorted([*range(leaves), *range(leaves), *range(leaves)]),
        nodes_nodeids=[0, 1, 2] * leaves,
        nodes_featureids=[0, 0, 0] * leaves,
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"] * leaves,
        nodes_values=[0.5, 0.0, 0.0] * leaves,
        nodes_truenodeids=[1, 0, 0] * leaves,
        nodes_falsenodeids=[2, 0, 0] * leaves,
        target_treeids=sorted([*range(leaves), *range(leaves)]),
        target_nodeids=[1, 2] * leaves,
        target_ids=[0, 0] * leaves,
        target_weights=[1.0, 2.0] * leaves,
    )
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 1]) for name in "xy"
    ]
    graph = helper.make_graph([node], "trees", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    folder = tmp_path / "trees"
    folder.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / "model.onnx")
    done = packed(folder, tmp_path / "cache")
    assert done.nbytes > 200_000
    answer = Opened(done).model.run({"x": np.array([[0.0], [1.0]], np.float32)})
    assert answer["y"].tolist() == [[leaves], [2 * leaves]]


def test_a_damaged_file_is_refused_by_its_library(tmp_path: Path) -> None:
    pytest.importorskip("xgboost")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.ubj").write_bytes(b"{L\x00nonsense")
    assert "xgboost cannot read" in refused(tmp_path / "m", tmp_path / "cache")
