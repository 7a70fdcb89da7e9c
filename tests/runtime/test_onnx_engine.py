"""The onnx engine: weights in the image and read in place, signatures as graphs have them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_rig import Opened, packed, refused

from overcommit.runtime.config import Batching, OnnxOptions, TensorSpec
from overcommit.runtime.engines.private_copies import Ledger, PrivateCopy
from overcommit.runtime.errors import BadRequest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
FLOAT, INT64, STRING = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.STRING
RNG = np.random.default_rng(7)
WEIGHTS = RNG.standard_normal((32, 64)).astype(np.float32)
BIAS = RNG.standard_normal(64).astype(np.float32)


def write(
    folder: Path,
    nodes: list[Any],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any] | None]],
    weights: dict[str, np.ndarray] | None = None,
    **save: Any,
) -> Path:
    """Write a graph to `folder/model.onnx`."""
    values = [
        [helper.make_tensor_value_info(name, *spec) for name, spec in specs.items()]
        for specs in (inputs, outputs)
    ]
    kept = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", *values, kept)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(folder / "model.onnx"), **save)
    return folder / "model.onnx"


def write_dense(folder: Path, **save: Any) -> Path:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["y"]),
    ]
    return write(
        folder,
        nodes,
        {"x": (FLOAT, ["N", 32])},
        {"y": (FLOAT, ["N", 64])},
        {"w": WEIGHTS, "b": BIAS},
        **save,
    )


def by_itself(path: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def test_weights_are_read_where_the_mapping_has_them(tmp_path: Path) -> None:
    path = write_dense(tmp_path / "dense")
    done = packed(path.parent, tmp_path / "cache")
    assert done.engine == "onnx"
    assert done.config.inputs[0].axes == ("batch", None)
    assert done.config.batching.max_batch_size == 32
    opened = Opened(done)
    start = np.frombuffer(opened.memory, np.uint8).ctypes.data
    assert opened.model.addresses
    assert all(start <= each < start + opened.header.nbytes for each in opened.model.addresses)
    x = RNG.standard_normal((5, 32)).astype(np.float32)
    np.testing.assert_allclose(
        opened.model.run({"x": x})["y"], by_itself(path, {"x": x})[0], atol=1e-5
    )
    # The session holds no copy: other bytes in the mapping are other answers.
    opened.memory[:] = bytes(opened.header.nbytes)
    assert not opened.model.run({"x": x})["y"][:, :].any() or np.allclose(
        opened.model.run({"x": x})["y"], BIAS, atol=1e-5
    )
    opened.memory[:] = bytes(opened.payload)
    np.testing.assert_allclose(
        opened.model.run({"x": x})["y"], by_itself(path, {"x": x})[0], atol=1e-5
    )


@pytest.mark.parametrize(
    ("named", "axes"),
    [("N", ("batch", None)), (None, ("a.0", None))],
    ids=["named", "unnamed"],
)
def test_sizes_that_a_graph_gives_one_name_are_equal_though_nothing_batches(
    tmp_path: Path, named: str | None, axes: tuple[str | None, ...]
) -> None:
    write(
        tmp_path / "m",
        [helper.make_node("Concat", ["a", "b"], ["y"], axis=0)],
        {name: (FLOAT, [named, 2]) for name in "ab"},
        {"y": (FLOAT, [None, 2])},
    )
    done = packed(tmp_path / "m", tmp_path / "cache", batching=Batching(max_batch_size=0))
    assert done.config.inputs[0].axes == axes


def test_the_graph_in_the_cache_holds_no_weights_and_serves_every_variant(tmp_path: Path) -> None:
    first = write_dense(tmp_path / "first")
    second = tmp_path / "second"
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["y"]),
    ]
    io = ({"x": (FLOAT, ["N", 32])}, {"y": (FLOAT, ["N", 64])})
    write(second, nodes, *io, {"w": WEIGHTS * 2, "b": BIAS})
    one, two = (packed(folder, tmp_path / "cache") for folder in (first.parent, second))
    assert one.program_key == two.program_key
    assert one.content_key != two.content_key
    graph = Path(Opened(one).header.program["file"])
    assert graph.stat().st_size < WEIGHTS.nbytes / 4
    x = np.ones((1, 32), np.float32)
    low, high = (Opened(done).model.run({"x": x})["y"] - BIAS for done in (one, two))
    np.testing.assert_allclose(high, 2 * low, atol=1e-4)


def test_weights_in_constant_nodes_and_in_bodies_of_if_go_to_the_image(tmp_path: Path) -> None:
    def branch(name: str, factor: float) -> Any:
        constant = helper.make_node(
            "Constant", [], ["k"], value=numpy_helper.from_array(WEIGHTS * factor, "k")
        )
        nodes = [constant, helper.make_node("MatMul", ["x", "k"], [f"{name}/out"])]
        return helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info(f"{name}/out", FLOAT, None)]
        )

    node = helper.make_node(
        "If", ["flag"], ["y"], then_branch=branch("yes", 1.0), else_branch=branch("no", -3.0)
    )
    folder = tmp_path / "if"
    write(
        folder,
        [node],
        {"x": (FLOAT, ["N", 32]), "flag": (onnx.TensorProto.BOOL, [])},
        {"y": (FLOAT, None)},
    )
    done = packed(folder, tmp_path / "cache")
    assert done.nbytes >= 2 * WEIGHTS.nbytes
    assert done.config.batching.max_batch_size == 0  # a scalar has no rows
    x = np.ones((1, 32), np.float32)
    model = Opened(done).model
    yes = model.run({"x": x, "flag": np.array(True)})["y"]
    no = model.run({"x": x, "flag": np.array(False)})["y"]
    np.testing.assert_allclose(yes, x @ WEIGHTS, atol=1e-4)
    np.testing.assert_allclose(no, -3 * (x @ WEIGHTS), atol=1e-4)


def test_external_weights_of_the_file_are_taken_and_others_are_refused(tmp_path: Path) -> None:
    path = write_dense(
        tmp_path / "external",
        save_as_external_data=True,
        location="dense.bin",
        size_threshold=0,
    )
    done = packed(path.parent, tmp_path / "cache")
    x = np.ones((1, 32), np.float32)
    np.testing.assert_allclose(Opened(done).model.run({"x": x})["y"], x @ WEIGHTS + BIAS, atol=1e-4)
    model = onnx.load(str(path), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../cache/secret"
    path.write_bytes(model.SerializeToString())
    assert "not in the model's folder" in refused(path.parent, tmp_path / "other")


def test_texts_odd_names_and_sizes_that_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    nodes = [
        helper.make_node("Identity", ["in/0:text"], ["1"]),
        helper.make_node("Add", ["a.b", "a.b"], ["sum:0"]),
    ]
    write(
        folder,
        nodes,
        {"in/0:text": (STRING, ["n", 2]), "a.b": (FLOAT, ["n", 3])},
        {"1": (STRING, ["n", 2]), "sum:0": (FLOAT, ["n", 3])},
    )
    done = packed(folder, tmp_path / "cache")
    assert [spec.name for spec in done.config.outputs] == ["1", "sum:0"]
    model = Opened(done).model
    texts = np.array([["é".encode(), b""]], object)
    answer = model.run({"in/0:text": texts, "a.b": np.ones((1, 3), np.float32)})
    assert answer["1"].tolist() == [["é", ""]]
    assert answer["sum:0"].tolist() == [[2.0, 2.0, 2.0]]
    with pytest.raises(BadRequest, match="UTF-8"):
        model.run({"in/0:text": np.array([[b"\xff", b""]], object), "a.b": np.ones((1, 3), "f4")})
    with pytest.raises(BadRequest, match=r"a\.b"):
        model.run({"in/0:text": texts, "a.b": np.ones((1, 4), np.float32)})


def test_a_configuration_that_contradicts_the_graph_is_refused(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense").parent
    for shape in ((-1, 7), (32,), (-1, 1, 32)):
        given = (TensorSpec(name="x", datatype="FP32", shape=shape),)
        message = refused(folder, tmp_path / "cache", inputs=given)
        assert f"is {list(shape)} in its configuration" in message
        assert "[-1, 32]" in message
    fixed = (TensorSpec(name="x", datatype="FP32", shape=(2, 32)),)
    assert packed(folder, tmp_path / "cache", inputs=fixed).config.inputs[0].shape == (2, 32)


def test_a_list_of_dictionaries_becomes_the_tensor_it_was_made_of(tmp_path: Path) -> None:
    source = Path(ort.__file__).parent / "datasets" / "logreg_iris.onnx"
    folder = tmp_path / "iris"
    folder.mkdir()
    (folder / "logreg_iris.onnx").write_bytes(source.read_bytes())
    done = packed(folder, tmp_path / "cache")
    assert [(s.name, s.datatype, s.shape) for s in done.config.outputs] == [
        ("label", "INT64", (3,)),
        ("probabilities", "FP32", (3, 3)),
    ]
    x = RNG.random((3, 2)).astype(np.float32)
    label, rows = by_itself(source, {"float_input": x})
    got = Opened(done).model.run({"float_input": x})
    assert got["label"].tolist() == label.tolist()
    np.testing.assert_array_equal(
        got["probabilities"], np.array([list(row.values()) for row in rows], np.float32)
    )


def test_outputs_that_are_no_tensors_are_refused_when_nothing_else_is_there(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "sequence"
    node = helper.make_node("SequenceConstruct", ["x"], ["s"])
    sequence = helper.make_tensor_sequence_value_info("s", FLOAT, None)
    value = helper.make_tensor_value_info("x", FLOAT, ["n", 2])
    graph = helper.make_graph([node], "graph", [value], [sequence])
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(folder / "model.onnx"))
    assert "no tensors" in refused(folder, tmp_path / "cache")


def test_a_damaged_file_and_an_unknown_operator_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"\xff\xfe not a graph")
    assert "is no ONNX file" in refused(folder, tmp_path / "cache")
    write(
        folder,
        [helper.make_node("Teleport", ["x"], ["y"])],
        {"x": (FLOAT, ["n"])},
        {"y": (FLOAT, ["n"])},
    )
    assert "Teleport" in refused(folder, tmp_path / "cache")


def test_prepacked_weights_answer_the_same_and_are_counted(tmp_path: Path) -> None:
    path = write_dense(tmp_path / "dense")
    done = packed(path.parent, tmp_path / "cache", onnx=OnnxOptions(prepack=True))
    opened = Opened(done)
    assert int(opened.header.program["prepacked_bytes"]) == WEIGHTS.nbytes
    x = np.ones((2, 32), np.float32)
    np.testing.assert_allclose(opened.model.run({"x": x})["y"], x @ WEIGHTS + BIAS, atol=1e-4)


def test_the_batch_is_what_every_input_has_first(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["a", "b"], ["y"])]
    same = tmp_path / "same"
    write(same, nodes, {"a": (FLOAT, ["N", 2]), "b": (FLOAT, ["N", 2])}, {"y": (FLOAT, ["N", 2])})
    assert packed(same, tmp_path / "cache").config.batching.max_batch_size == 32
    none = tmp_path / "none"
    write(none, nodes, {"a": (FLOAT, ["N", 2]), "b": (FLOAT, [1, 2])}, {"y": (FLOAT, ["N", 2])})
    assert packed(none, tmp_path / "cache").config.batching.max_batch_size == 0
    # Where the model says so, it is not batched whatever the graph could do.
    off = packed(same, tmp_path / "cache", batching=Batching(max_batch_size=0))
    assert off.config.batching.max_batch_size == 0


def test_private_copies_are_bounded_and_made_again() -> None:
    books = Ledger(bytes_max=100)
    made: list[str] = []

    def copy(name: str, nbytes: int) -> PrivateCopy[str]:
        def make() -> str:
            made.append(name)
            return name

        return PrivateCopy(nbytes, make, books)

    one, two, three = copy("one", 40), copy("two", 40), copy("three", 40)
    assert [one.get(), two.get(), one.get()] == ["one", "two", "one"]
    assert three.get() == "three"  # two was used longest ago
    assert (one.is_held, two.is_held, three.is_held) == (True, False, True)
    assert books.nbytes == 80
    assert two.get() == "two"
    assert made == ["one", "two", "three", "two"]
    assert not copy("giant", 101).fits
    del three, one, two
    gc.collect()
    assert books.nbytes == 0
