"""Ensembles over a real server: through their steps, back as one answer."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from model_rig import ADD, ECHO, FAULTY, SLOW, add_model
from serving import Server

import overcommit
from overcommit.runtime.errors import BadRequest, DeadlineExceeded, NotFound, Unavailable
from overcommit.server.clients.exchange import ModelState, ServerError
from overcommit.server.limits import BULK_BYTES_MIN

STEPS = """
[[ensemble.step]]
model = "{0}"
inputs = {{ {1} }}
outputs = {{ {2} }}
"""


def add_ensemble(
    root: Path, name: str, inputs: str, outputs: str, *steps: tuple[str, str, str]
) -> None:
    folder = root / name
    folder.mkdir()
    tensors = "".join(
        f'[[{kind}]]\nname = "{each}"\ndatatype = "FP32"\nshape = [-1, -1]\n'
        for kind, names in (("input", inputs), ("output", outputs))
        for each in names.split()
    )
    (folder / "model.toml").write_text(tensors + "".join(STEPS.format(*step) for step in steps))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("ensembles")
    add_model(models, "echo", ECHO, {"x": "FP32"})
    add_model(models, "add", ADD, {"a": "FP32", "b": "FP32"})
    add_model(models, "faulty", FAULTY, {"x": "FP32"})
    add_model(models, "slow", SLOW, {"seconds": "FP32"})
    # (p + q) and (p - q), each through a model of its own, and added again: 2 p.
    diamond = (
        ("add", 'a = "left", b = "right"', 'sum = "twice"'),
        ("echo", 'x = "sums"', 'y = "left"'),
        ("echo", 'x = "differences"', 'y = "right"'),
        ("add", 'a = "p", b = "q"', 'sum = "sums", difference = "differences"'),
    )
    add_ensemble(models, "diamond", "p q", "twice differences", *diamond)
    twice = ('p = "one", q = "one"', 'twice = "middle"')
    again = ('p = "middle", q = "one"', 'twice = "four"')
    add_ensemble(models, "nested", "one", "four", ("diamond", *twice), ("diamond", *again))
    add_ensemble(models, "hot", "x", "y", ("faulty", 'x = "x"', 'y = "y"'))
    add_ensemble(models, "late", "x", "y", ("slow", 'seconds = "x"', 'y = "y"'))
    add_ensemble(models, "orphan", "x", "y", ("nobody", 'x = "x"', 'y = "y"'))
    add_ensemble(models, "circle", "x", "y", ("circle", 'x = "x"', 'y = "y"'))
    add_ensemble(models, "broken", "x", "y", ("echo", 'x = "nowhere"', 'y = "y"'))
    add_model(models, "whole", ECHO, {"x": "INT64"})
    typed = (("echo", 'x = "x"', 'y = "between"'), ("whole", 'x = "between"', 'y = "y"'))
    add_ensemble(models, "mistyped", "x", "y", *typed)
    add_ensemble(models, "hungry", "x", "y", ("add", 'a = "x"', 'sum = "y"'))
    add_ensemble(models, "greedy", "x", "y", ("echo", 'x = "x"', 'z = "y"'))
    add_model(models, "careless", ECHO, {"x": "FP32"})
    with (models / "careless" / "model.toml").open("a") as file:
        file.write(
            '[[output]]\nname = "y"\ndatatype = "FP32"\nshape = [-1, -1]\nlabels = "l.txt"\n'
        )
        file.write('[[warmup]]\nname = "w"\n[warmup.inputs.z]\ndatatype = "FP32"\nshape = [1]\n')
    return models


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    cache = tmp_path_factory.mktemp("cache")
    with Server(models, cache=cache, flags=("--allow-code",)) as running:
        running.wait_until(
            lambda: not any(row["state"] == "PACKING" for row in running.models().values())
        )
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[overcommit.Client]:
    with overcommit.Client(f"http://127.0.0.1:{server.port}") as client:
        yield client


def test_tensors_are_handed_on_from_step_to_step(client: overcommit.Client) -> None:
    p, q = np.array([[1.5, 2.0]]), np.array([[1.0, -7.0]])
    result = client.infer("diamond", {"p": p, "q": q}, id="mine")
    assert (result.model, result.version, result.id) == ("diamond", "1", "mine")
    assert list(result) == ["twice", "differences"]
    np.testing.assert_array_equal(result["twice"], 2 * p)
    np.testing.assert_array_equal(result["differences"], p - q)
    chosen = client.infer("diamond", {"p": p, "q": q}, outputs=["differences"])
    assert list(chosen) == ["differences"]


def test_an_ensemble_can_be_a_step(client: overcommit.Client) -> None:
    result = client.infer("nested", {"one": [[3.0]]})
    np.testing.assert_array_equal(result["four"], [[12.0]])


def test_many_at_a_time_get_their_own_answers(client: overcommit.Client) -> None:
    def ask(number: int) -> float:
        return float(client.infer("nested", {"one": [[float(number)]]})["four"][0, 0])

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(100))) == [4.0 * number for number in range(100)]


def test_an_ensemble_is_described_counted_and_taken_out_of_service(
    server: Server, client: overcommit.Client
) -> None:
    info = client.model("diamond")
    assert info.platform == "ensemble"
    assert [each.name for each in info.inputs] == ["p", "q"]
    client.infer("diamond", {"p": [[1.0]], "q": [[1.0]]})
    (row,) = server.get("/v2/overcommit/models/diamond").json()["versions"]
    assert row["success"] >= 1
    client.unload("diamond")
    with pytest.raises(NotFound):
        client.infer("diamond", {"p": [[1.0]], "q": [[1.0]]})
    reason = r"ensemble 'nested', step 1 \(model 'diamond'\): it is unloaded: POST .*/diamond/load"
    with pytest.raises(NotFound, match=reason):
        client.infer("nested", {"one": [[1.0]]})
    assert not client.is_ready("nested")
    client.load("diamond")
    assert client.infer("nested", {"one": [[1.0]]})["four"][0, 0] == 4.0


def test_grpc_and_long_binary_bodies_take_the_same_way(
    server: Server, client: overcommit.Client
) -> None:
    import tritonclient.grpc as triton

    values = np.arange(200_000, dtype=np.float32).reshape(2, -1)
    assert values.nbytes > BULK_BYTES_MIN
    found = client.infer("nested", {"one": values})["four"]
    np.testing.assert_array_equal(found, 4 * values)
    with triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as caller:
        tensor = triton.InferInput("one", list(values.shape), "FP32")
        tensor.set_data_from_numpy(values)
        answer = caller.infer("nested", [tensor], request_id="mine")
        assert answer.get_response().id == "mine"
        np.testing.assert_array_equal(answer.as_numpy("four"), 4 * values)
        small = triton.InferInput("x", [1, 1], "FP32")
        small.set_data_from_numpy(values[:1, :1])
        with pytest.raises(triton.InferenceServerException, match="ensemble 'circle', step 1"):
            caller.infer("circle", [small])


def test_what_fails_names_the_ensemble_and_the_step(client: overcommit.Client) -> None:
    assert client.infer("hot", {"x": [[1.0]]})["y"][0, 0] == 2.0
    with pytest.raises(ServerError, match=r"model 'hot', step 1: .*too hot"):
        client.infer("hot", {"x": [[1000.0]]})
    with pytest.raises(
        NotFound, match=r"ensemble 'orphan', step 1 \(model 'nobody'\): there is no"
    ):
        client.infer("orphan", {"x": [[1.0]]})
    with pytest.raises(Unavailable, match="in a circle"):
        client.infer("circle", {"x": [[1.0]]})


def test_the_time_of_a_request_is_that_of_all_its_steps(client: overcommit.Client) -> None:
    with pytest.raises(DeadlineExceeded):
        client.infer("late", {"x": [[5.0]]}, timeout_s=0.2)


def test_steps_that_cannot_run_are_said_in_the_index(client: overcommit.Client) -> None:
    (state,) = [each for each in client.models() if each.name == "broken"]
    assert state.state == "UNAVAILABLE"
    assert "'nowhere', which nothing gives" in state.reason


def state_of(client: overcommit.Client, name: str, version: str = "1") -> tuple[str, str]:
    """What the index says; of a version that is not there, nothing."""
    state = next(
        (e for e in client.models() if (e.name, e.version) == (name, version)), ModelState(name)
    )
    return state.state, state.reason


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("orphan", "step 1 (model 'nobody'): there is no model of this name: put it into"),
        ("circle", "its steps lead back to ensemble 'circle', in a circle"),
        ("mistyped", "output 'y' of step 1 is FP32 [-1, -1], its input 'x' takes INT64"),
        ("hungry", "step 1 (model 'add'): nothing is fed to its input 'b'"),
        ("greedy", "step 1 (model 'echo'): it has no output 'z', but 'y'"),
    ],
)
def test_an_ensemble_whose_steps_cannot_work_is_not_ready_and_says_why(
    server: Server, client: overcommit.Client, name: str, text: str
) -> None:
    state, reason = state_of(client, name)
    assert state == "UNAVAILABLE"
    assert reason.startswith(f"ensemble '{name}'")
    assert text in reason
    answer = server.get(f"/v2/models/{name}/ready")
    assert answer.status == 400
    assert reason in answer.json()["error"]
    given = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}
    refused_request = server.post(f"/v2/models/{name}/infer", {"inputs": [given]})
    assert refused_request.status == (404 if name == "orphan" else 503)
    assert reason in refused_request.json()["error"]
    with pytest.raises(BadRequest) as refused:
        client.load(name)
    assert reason in str(refused.value)
    assert sum(reason in line for line in server.log) == 1
    ready = server.post("/v2/repository/index", {"ready": True}).json()
    assert {row["name"] for row in ready} & {name, "diamond"} == {"diamond"}


def test_an_ensemble_is_ready_as_soon_as_its_step_is_there(
    server: Server, client: overcommit.Client, models: Path, tmp_path: Path
) -> None:
    add_ensemble(models, "early", "x", "y", ("late-step", 'x = "x"', 'y = "y"'))
    server.wait_until(lambda: "early/1" in server.models())
    assert state_of(client, "early")[0] == "UNAVAILABLE"
    add_model(tmp_path, "late-step", ECHO, {"x": "FP32"})
    (tmp_path / "late-step").rename(models / "late-step")
    server.wait_until(lambda: client.is_ready("early"))
    assert state_of(client, "early") == ("READY", "")
    assert client.infer("early", {"x": [[2.0]]})["y"][0, 0] == 2.0
    client.unload("late-step")
    assert not client.is_ready("early")
    assert "it is unloaded" in state_of(client, "early")[1]
    client.load("early")  # which brings its steps along
    assert client.is_ready("early")


@pytest.mark.parametrize("kind", ["edited", "another version"])
def test_what_served_before_serves_until_the_steps_of_a_new_ensemble_are_there(
    server: Server, client: overcommit.Client, models: Path, tmp_path: Path, kind: str
) -> None:
    name, step = ("edited", "unborn") if kind == "edited" else ("versioned", "unmade")
    version = "1" if kind == "edited" else "2"
    add_ensemble(tmp_path, "old", "x", "y", ("echo", 'x = "x"', 'y = "y"'))
    add_ensemble(tmp_path, "new", "x", "y", (step, 'x = "x"', 'y = "y"'))
    add_model(tmp_path, step, FAULTY, {"x": "FP32"})
    (tmp_path / name).mkdir()
    (tmp_path / "old").rename(tmp_path / name / "1")
    (tmp_path / name).rename(models / name)
    server.wait_until(lambda: f"{name}/1" in server.models())
    if kind == "edited":
        (tmp_path / "new" / "model.toml").rename(models / name / "1" / "model.toml")
        expected = "serving the version from before its last change: ensemble"
    else:
        (tmp_path / "new").rename(models / name / "2")
        expected = f"ensemble '{name}', step 1 (model '{step}'): there is no"
    server.wait_until(lambda: state_of(client, name, version)[1].startswith(expected))
    assert client.infer(name, {"x": [[2.0]]})["y"][0, 0] == 2.0
    assert client.is_ready(name)
    with pytest.raises(BadRequest, match=rf"model '{step}'\): there is no model"):
        client.load(name)
    state = "READY" if kind == "edited" else "UNAVAILABLE"
    page = server.get(f"/v2/overcommit/models?state={state}&reason=true").json()
    assert (name, version) in [(row["name"], row["version"]) for row in page["models"]]
    assert all(row["reason"] and row["state"] == state for row in page["models"])
    assert page["total"] == len(page["models"]) < sum(page["states"].values())
    (tmp_path / step).rename(models / step)
    server.wait_until(lambda: client.infer(name, {"x": [[2.0]]})["y"][0, 0] == 4.0)
    assert state_of(client, name, version) == ("READY", "")
    server.wait_for_log(f"{name} version {version} works: it takes over")
    said = [line for line in server.log if f" {name} version {version}" in line]
    assert ["it stays on trial" in line for line in said] == [True, False], said
    assert "works: it takes over" in said[1]


def test_a_load_looks_for_the_steps_of_what_is_new_and_brings_them_along(
    server: Server, client: overcommit.Client, models: Path, tmp_path: Path
) -> None:
    add_ensemble(models, "grown", "x", "y", ("echo", 'x = "x"', 'y = "y"'))
    server.wait_until(lambda: client.is_ready("grown"))
    add_ensemble(tmp_path, "grown", "x", "y", ("fresh", 'x = "x"', 'y = "y"'))
    add_model(models, "fresh", FAULTY, {"x": "FP32"})
    (tmp_path / "grown" / "model.toml").rename(models / "grown" / "model.toml")
    client.load("grown")
    assert client.infer("grown", {"x": [[2.0]]})["y"][0, 0] == 4.0
    # The next ones wait for a model that is unloaded: a load brings it back, and is told so.
    add_model(models, "asleep", ECHO, {"x": "FP32"})
    server.wait_until(lambda: client.is_ready("asleep"))
    client.unload("asleep")
    add_ensemble(tmp_path, "again", "x", "y", ("asleep", 'x = "x"', 'y = "y"'))
    (tmp_path / "again" / "model.toml").rename(models / "grown" / "model.toml")
    server.wait_until(lambda: "it is unloaded" in state_of(client, "grown")[1])
    assert client.infer("grown", {"x": [[2.0]]})["y"][0, 0] == 4.0
    client.load("grown")
    assert state_of(client, "grown") == ("READY", "")
    assert client.infer("grown", {"x": [[2.0]]})["y"][0, 0] == 2.0


def test_what_does_not_fit_a_model_that_is_served_is_logged(
    server: Server, client: overcommit.Client, models: Path
) -> None:
    assert state_of(client, "careless") == ("READY", "")
    log = "\n".join(server.log)
    file = models / "careless" / "model.toml"
    assert f"careless version 1: {file}: model_warmup ([[warmup]]) 'w', input 'z': the model" in log
    assert f"careless version 1: {file}: label_filename (labels) of output 'y': there is no" in log


def test_the_request_to_try_is_for_a_model_that_can_be_asked(server: Server) -> None:
    def shown() -> list[str]:
        return [line for line in server.log if line.lstrip().startswith("curl ")]

    server.wait_until(lambda: bool(shown()))
    (line,) = shown()
    # It comes before all others, and looks as if it took one row.
    assert "/v2/models/circle/" not in line
