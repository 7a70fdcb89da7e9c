"""New versions while requests run: nobody waits, nobody fails, the old one leaves last."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from serving import Server

CODE = """
import torch
class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x):
        return {"y": x * self.factor}
"""
TOML = """
allow_code = true
[versions]
latest = %d
[[warmup]]
name = "zeros"
inputs.x = { datatype = "FP32", shape = [1, 2] }
[[input]]
name = "x"
datatype = "FP32"
shape = [-1, 2]
"""


def add_version(root: Path, version: int, code: str = CODE) -> None:
    """Copy a version in, whole from the beginning, as a rename does."""
    made = root.parent / f"made-{version}"
    made.mkdir()
    (made / "model.py").write_text(code)
    save_file({"factor": torch.full((1,), float(version))}, made / "model.safetensors")
    shutil.move(made, root / "scale" / str(version))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollout") / "models"
    (folder / "scale").mkdir(parents=True)
    (folder / "scale" / "model.toml").write_text(TOML % 1)
    add_version(folder, 1)
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    flags = ("--allow-code", "--front-ends", "2")
    with Server(root, cache=root.parent / "cache", flags=flags) as running:
        yield running


BODY = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}]}'


def answer(server: Server, path: str = "scale", **headers: str) -> tuple[str, float]:
    got = server.request("POST", f"/v2/models/{path}/infer", BODY, headers)
    assert got.status == 200, got.body
    body = got.json()
    value = body["outputs"][0]["data"][0]
    assert value == float(body["model_version"])
    return body["model_version"], value


def test_the_configuration_shows_the_version_policy_and_the_warm_up(server: Server) -> None:
    config = server.get("/v2/models/scale/config").json()
    assert config["version_policy"] == {"latest": {"num_versions": 1}}
    assert config["model_warmup"] == [
        {
            "name": "zeros",
            "batch_size": 1,
            "inputs": {"x": {"data_type": "TYPE_FP32", "dims": [1, 2], "zero_data": True}},
            "count": 1,
        }
    ]


def index(server: Server) -> dict[str, Any]:
    return {row["version"]: row for row in server.post("/v2/repository/index", {}).json()}


class Asking(threading.Thread):
    """Asks all the time; keeps the versions that answered, in order."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.versions: list[str] = []
        self.failure: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        try:
            while not self.done.is_set():
                version, _ = answer(self.server)
                if version not in self.versions[-1:]:
                    self.versions.append(version)
        except BaseException as error:
            self.failure = error

    def wait_for(self, version: str) -> None:
        """Until this version has answered."""
        self.server.wait_until(lambda: version in self.versions or self.failure is not None)

    def __enter__(self) -> Asking:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.done.set()
        self.join()
        assert self.failure is None, self.failure


def test_a_new_version_takes_over_without_a_failed_request_and_the_old_one_leaves(
    server: Server, root: Path
) -> None:
    with Asking(server) as asking:
        asking.wait_for("1")
        add_version(root, 2)
        asking.wait_for("2")
        server.wait_until(lambda: "1" not in index(server))
    # Two front ends hear of it one after the other.
    assert asking.versions[0] == "1"
    assert asking.versions[-1] == "2"


def test_a_version_that_fails_leaves_the_old_one_serving_and_says_why(
    server: Server, root: Path
) -> None:
    with Asking(server) as asking:
        add_version(root, 3, CODE.replace("return", "raise ValueError('too hot')\n        return"))
        server.wait_until(lambda: "too hot" in index(server).get("3", {}).get("reason", ""))
        assert index(server)["2"]["state"] == "READY"
        server.wait_until(lambda: answer(server)[0] == "2")
    assert asking.versions == ["2"]


def test_names_shares_and_headers_choose_versions_while_it_runs(server: Server, root: Path) -> None:
    (root / "scale" / "model.toml").write_text(TOML % 3)
    (root / "scale" / "3" / "model.py").write_text(CODE)
    server.wait_until(lambda: answer(server)[0] == "3")
    said = {"aliases": {"stable": "2", "size": "latest"}, "weights": {"3": 30}}
    assert server.post("/v2/overcommit/models/scale/rollout", said).json() == {
        "weights": {"3": 30.0},
        "aliases": {"stable": "2", "size": ""},
    }
    got = [answer(server, "size")[0] for _ in range(100)]
    assert 5 < got.count("3") < 70
    for _ in range(3):  # from the second on the head is known
        assert answer(server, **{"x-overcommit-canary": "always"})[0] == "3"
        assert answer(server, **{"x-overcommit-canary": "never"})[0] == "2"
        assert answer(server, "stable")[0] == "2"
        assert answer(server, "scale/versions/3")[0] == "3"
    assert server.post("/v2/overcommit/models/scale/rollout", {"weights": {"3": 101}}).status == 400
    assert server.post("/v2/overcommit/models/none/rollout", {}).status == 404
    server.post("/v2/overcommit/models/scale/rollout", {"weights": None, "aliases": None})
    assert {answer(server)[0] for _ in range(20)} == {"3"}
    assert server.get("/v2/models/stable").status == 404
