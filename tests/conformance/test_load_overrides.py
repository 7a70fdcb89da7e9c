"""Loads that bring a configuration or files, by Triton's clients: they hold for this load alone."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http
from serving import Server
from tritonclient.utils import InferenceServerException

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT
Client = Any
X = np.array([[1, 2]], np.float32)


def graph(factor: float) -> bytes:
    """An ONNX model: y = factor * x."""
    values = [helper.make_tensor_value_info(name, FLOAT, ["N", 2]) for name in "xy"]
    weight = helper.make_tensor("w", FLOAT, [1], [factor])
    made = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"])], "g", [values[0]], [values[1]], [weight]
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def add(root: Path, name: str, factors: dict[str, float], toml: str = "") -> None:
    for version, factor in factors.items():
        (root / name / version).mkdir(parents=True)
        (root / name / version / "model.onnx").write_bytes(graph(factor))
    (root / name / "model.toml").write_text(toml)


STEPS = """
[[input]]
name = "x"
datatype = "FP32"
shape = [-1, 2]
[[output]]
name = "y"
datatype = "FP32"
shape = [-1, 2]
"""
STEP = '[[ensemble.step]]\nmodel = "%s"\ninputs = { x = "%s" }\noutputs = { y = "%s" }\n'


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def server(root: Path, cache: Path) -> Iterator[Server]:
    add(root, "scale", {"1": 1, "2": 2})
    add(root, "keep", {"1": 3, "3": 5})
    for name in ("first", "second", "shared"):
        add(root, name, {"1": 2})
    (root / "pair").mkdir()
    (root / "pair" / "model.toml").write_text(
        STEPS + STEP % ("first", "x", "a") + STEP % ("shared", "a", "y")
    )
    (root / "other").mkdir()
    (root / "other" / "model.toml").write_text(
        STEPS + STEP % ("second", "x", "a") + STEP % ("shared", "a", "y")
    )
    (cache / "overrides" / "left-by-a-dead-server").mkdir(parents=True)
    flags = ("--load-overrides", "--front-ends", "2")
    with Server(root, cache=cache, flags=flags) as running:
        running.wait_until(
            lambda: all(row["state"] == "READY" for row in running.models().values())
        )
        yield running


def over_http(server: Server) -> Client:
    return http.InferenceServerClient(f"127.0.0.1:{server.port}", network_timeout=60)


def over_grpc(server: Server) -> Client:
    return grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")


@pytest.fixture(params=[over_http, over_grpc])
def client(server: Server, request: pytest.FixtureRequest) -> Iterator[Client]:
    with request.param(server) as made:
        yield made


def ask(client: Client, name: str, version: str = "") -> tuple[str, float]:
    """Return the version that answered, and what it multiplies with."""
    module = http if isinstance(client, http.InferenceServerClient) else grpc
    given = module.InferInput("x", [1, 2], "FP32")
    given.set_data_from_numpy(X)
    result = client.infer(name, [given], version)
    response = result.get_response()
    answered = response["model_version"] if module is http else response.model_version
    return answered, float(result.as_numpy("y")[0, 0])


def folders(cache: Path) -> list[Path]:
    home = cache / "overrides"
    places = (Path(place) for place, _, _ in os.walk(home))  # which may be going just now
    return [place for place in places if len(place.relative_to(home).parts) == 3]


def test_a_configuration_holds_until_the_model_is_loaded_plainly(
    server: Server, client: Client
) -> None:
    assert ask(client, "scale") == ("2", 2.0)
    config = {"backend": "onnxruntime", "versionPolicy": {"specific": {"versions": ["1"]}}}
    client.load_model("scale", config=json.dumps({**config, "maxBatchSize": 4}))
    server.wait_until(lambda: ask(client, "scale") == ("1", 1.0))
    server.wait_until(lambda: "scale/2" not in server.models())
    assert server.get("/v2/models/scale/config").json()["max_batch_size"] == 4
    client.load_model("scale")
    server.wait_until(lambda: ask(client, "scale") == ("2", 2.0))
    assert server.get("/v2/models/scale/config").json()["max_batch_size"] != 4


def test_files_take_the_place_of_all_versions_and_are_removed_afterwards(
    server: Server, client: Client, cache: Path
) -> None:
    assert not list((cache / "overrides").glob("left-*"))
    files = {"file:2/model.onnx": graph(7), "file:2/notes/about.txt": b"hello"}
    client.load_model("keep", config="{}", files=files)
    assert ask(client, "keep", "2") == ("2", 7.0)
    server.wait_until(lambda: ask(client, "keep") == ("2", 7.0))
    server.wait_until(lambda: not {"keep/1", "keep/3"} & server.models().keys())
    (kept,) = folders(cache)
    assert kept.name == "keep"
    assert (kept / "2" / "notes" / "about.txt").read_bytes() == b"hello"
    client.load_model("keep")
    server.wait_until(lambda: ask(client, "keep") == ("3", 5.0))
    server.wait_until(lambda: not folders(cache))


def test_files_make_a_model_of_a_new_name_that_goes_when_it_is_unloaded(
    server: Server, client: Client, cache: Path
) -> None:
    client.load_model("visitor", config="{}", files={"file:1/model.onnx": graph(11)})
    assert ask(client, "visitor") == ("1", 11.0)
    client.unload_model("visitor")
    server.wait_until(lambda: "visitor/1" not in server.models())
    server.wait_until(lambda: not folders(cache))
    with pytest.raises(InferenceServerException, match="unknown model"):
        ask(client, "visitor")


@pytest.mark.parametrize("client", [over_grpc], indirect=True)
def test_what_fails_leaves_serving_what_served(server: Server, client: Client, cache: Path) -> None:
    before = ask(client, "scale")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"config": "{}", "files": {"file:9/model.onnx": b"no graph"}}, "failed to load 'scale'"),
        ({"files": {"file:9/model.onnx": graph(1)}, "config": None}, "failed to poll"),
        ({"config": "{"}, "no JSON"),
        ({"config": '{"maxBatchSize": "many"}'}, "maxBatchSize|max_batch_size"),
        ({"config": '{"backend": "tensorrt"}'}, "'tensorrt' is not served"),
        ({"config": '{"input": [{"name": "z", "data_type": "TYPE_FP32", "dims": [2]}]}'}, "'z'"),
        ({"config": '{"version_policy": {"specific": {"versions": [8]}}}'}, "no version"),
        ({"config": "{}", "files": {"file:../x": b""}}, "names no file of a version"),
        ({"config": "{}", "files": {"file:1/../../x": b""}}, "names no file of a version"),
        ({"config": "{}", "files": {"file:1/model.toml": b""}}, "is said by 'config'"),
    )
    for arguments, message in wrong:
        with pytest.raises(InferenceServerException, match=message):
            client.load_model("scale", **arguments)
        assert ask(client, "scale") == before
    server.wait_until(lambda: not folders(cache))
    reasons = [row.get("reason") for row in server.post("/v2/repository/index", {}).json()]
    assert not any(reasons)
    # One that serves is what a failing one leaves, too.
    client.load_model("scale", config="{}", files={"file:1/model.onnx": graph(13)})
    with pytest.raises(InferenceServerException, match="failed to load"):
        client.load_model("scale", config="{}", files={"file:1/model.onnx": b"no graph"})
    server.wait_until(lambda: ask(client, "scale") == ("1", 13.0))
    client.load_model("scale")
    server.wait_until(lambda: ask(client, "scale") == before)


def test_a_clients_files_never_run_code(server: Server) -> None:
    code = base64.b64encode(b"raise SystemExit").decode()
    parameters = {"config": '{"backend": "python"}', "file:1/model.py": code}
    answer = server.post("/v2/repository/models/mine/load", {"parameters": parameters})
    assert answer.status == 400
    assert "allow_code" in answer.json()["error"]


def test_without_the_flag_nothing_is_taken(extended: Server) -> None:
    parameters = {"config": "{}", "file:1/model.onnx": ""}
    answer = extended.post("/v2/repository/models/add/load", {"parameters": parameters})
    assert (answer.status, "--load-overrides" in answer.json()["error"]) == (403, True)


def test_a_plain_load_is_answered_when_the_model_is_ready_or_says_why_it_is_not(
    server: Server, root: Path, client: Client
) -> None:
    name = f"late-{type(client).__module__.split('.')[1]}"
    (root / name).mkdir()
    (root / name / "model.onnx").write_bytes(b"no graph")
    server.wait_until(lambda: f"{name}/1" in server.models())
    with pytest.raises(InferenceServerException, match=f"failed to load '{name}'"):
        client.load_model(name)
    client.unload_model("keep")
    assert not client.is_model_ready("keep")
    client.load_model("keep")
    assert client.is_model_ready("keep")


# --- ensembles ----------------------------------------------------------------------------------
def is_ready(server: Server, *names: str) -> list[bool]:
    return [server.get(f"/v2/models/{name}/ready").status == 200 for name in names]


@pytest.mark.parametrize("client", [over_http], indirect=True)
def test_an_ensemble_takes_along_what_nobody_else_has_or_loaded(
    server: Server, client: Client
) -> None:
    names = ("pair", "first", "shared", "other", "second")
    client.unload_model("pair", unload_dependents=False)
    assert is_ready(server, *names) == [False, True, True, True, True]
    client.load_model("pair")
    client.unload_model("pair", unload_dependents=True)
    assert is_ready(server, *names) == [False, False, True, True, True]
    client.unload_model("other", unload_dependents=True)
    assert is_ready(server, *names) == [False] * 5
    # A load brings the models of its steps along.
    client.load_model("pair")
    server.wait_until(lambda: is_ready(server, *names) == [True, True, True, False, False])
    assert ask(client, "pair")[1] == 4.0
    # What a client has loaded by name stays.
    client.load_model("other")
    client.load_model("second")
    server.wait_until(lambda: all(is_ready(server, *names)))
    client.unload_model("other", unload_dependents=True)
    assert is_ready(server, *names) == [True, True, True, False, True]
    client.unload_model("second")
    client.load_model("other")
    server.wait_until(lambda: all(is_ready(server, *names)))
