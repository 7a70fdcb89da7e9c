"""Loads and unloads for Triton and for us, while the repository changes: one list of steps.

Of each step counts what a client sees: the status, which models are ready, what a model multiplies with.
Triton runs in its explicit mode, ours with a scan that never comes: what is loaded is what was asked for.
"""

from __future__ import annotations

import http.client
import json
import shutil
import time
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0
CONFIG = """
name: "%s"
backend: "python"
max_batch_size: %d
input [{ name: "x" data_type: TYPE_FP32 dims: [1] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [1] }]
instance_group [{ kind: KIND_CPU }]
"""
ENSEMBLE = """
name: "%s"
platform: "ensemble"
max_batch_size: 8
input [{ name: "x" data_type: TYPE_FP32 dims: [1] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [1] }]
ensemble_scheduling { step [
  { model_name: "%s" model_version: -1
    input_map { key: "x" value: "x" } output_map { key: "y" value: "between" } },
  { model_name: "%s" model_version: -1
    input_map { key: "x" value: "between" } output_map { key: "y" value: "y" } }
] }
"""
TRITON_CODE = """
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        given = [pb.get_input_tensor_by_name(each, "x").as_numpy() for each in requests]
        return [pb.InferenceResponse([pb.Tensor("y", x * %d)]) for x in given]
"""
OUR_CODE = """
class Model:
    def load(self, folder, parameters):
        pass

    def infer(self, inputs):
        return {"y": inputs["x"] * %d}
"""
MODELS = ("plain", "first", "second", "shared", "pair", "other")

Step = tuple[Any, ...]
STEPS: list[Step] = [
    *(("unload", name) for name in MODELS),
    ("ready", *MODELS),
    # A folder that is newer than the server, and what becomes of it.
    ("load", "nope"),
    ("write", "new", 7),
    ("load", "new"),
    ("infer", "new"),
    ("write", "new", 8),
    ("infer", "new"),
    ("load", "new"),
    ("infer", "new"),
    ("break", "new"),
    ("load", "new"),
    ("infer", "new"),
    ("remove", "new"),
    ("infer", "new"),
    ("unload", "new"),
    ("load", "new"),
    # A configuration that was changed.
    ("load", "plain"),
    ("configure", "plain", 4),
    ("batch", "plain"),
    ("load", "plain"),
    ("batch", "plain"),
    # What an ensemble brings along, and takes along.
    ("load", "pair"),
    ("ready", *MODELS),
    ("infer", "pair"),
    ("unload", "pair"),
    ("ready", *MODELS),
    ("load", "pair"),
    ("unload", "pair", True),
    ("ready", *MODELS),
    ("load", "pair"),
    ("load", "other"),
    ("unload", "pair", True),
    ("ready", *MODELS),
    ("unload", "other", True),
    ("ready", *MODELS),
    ("load", "first"),
    ("load", "pair"),
    ("unload", "pair", True),
    ("ready", *MODELS),
    ("unload", "first", True),
    ("load", "pair"),
    ("load", "first"),
    ("unload", "pair", True),
    ("ready", *MODELS),
    ("unload", "first"),
    # A step that is not there any more.
    ("load", "pair"),
    ("unload", "shared"),
    ("ready", *MODELS),
    ("infer", "pair"),
    ("load", "shared"),
    ("infer", "pair"),
    ("unload", "pair", True),
    ("ready", *MODELS),
    ("unload", "nope", True),
    # An ensemble whose steps are as new as itself.
    ("write", "late", 11),
    ("join", "whole", "late", "shared"),
    ("load", "whole"),
    ("infer", "whole"),
    ("unload", "whole", True),
    ("ready", "late", "shared", "whole"),
]


class World:
    """A repository and a server of it."""

    def __init__(self, root: Path, code: str, more: str = "", pause_s: float = 0.0) -> None:
        """`more` goes into each model.toml; `pause_s`: as long as a server needs to see a change."""
        self._root, self._code, self._more, self._pause_s = root, code, more, pause_s
        for name, factor in (("plain", 1), ("first", 2), ("second", 3), ("shared", 5)):
            self.write(name, factor)
        self.join("pair", "first", "shared")
        self.join("other", "second", "shared")

    # --- what somebody does to the folders ------------------------------------------------------
    def write(self, name: str, factor: int) -> None:
        self._put(name, "1/model.py", self._code % factor)
        self.configure(name, 8)

    def configure(self, name: str, batch: int) -> None:
        self._put(name, "config.pbtxt", CONFIG % (name, batch))
        if self._more:
            self._put(name, "model.toml", self._more)

    def join(self, name: str, first: str, second: str) -> None:
        (self._root / name / "1").mkdir(parents=True)
        self._put(name, "config.pbtxt", ENSEMBLE % (name, first, second))

    def _put(self, name: str, file: str, text: str) -> None:
        path = self._root / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    # --- what clients ask -----------------------------------------------------------------------
    def ask_all(self, port: int) -> dict[str, Any]:
        """Take every step; what counts of each answer, by number and step."""
        answers: dict[str, Any] = {}
        for number, (what, *arguments) in enumerate(STEPS):
            name = arguments[0]
            if what in ("write", "configure", "join"):
                time.sleep(self._pause_s)
                getattr(self, what)(*arguments)
            elif what == "break":
                time.sleep(self._pause_s)
                self._put(name, "1/model.py", "raise ValueError('broken')\n")
            elif what == "remove":
                shutil.rmtree(self._root / name)
            else:
                title = " ".join(
                    map(str, (number, what, *arguments[: 1 if what == "ready" else 9]))
                )
                answers[title] = self._ask(port, what, arguments)
        return answers

    def _ask(self, port: int, what: str, arguments: list[Any]) -> Any:
        name = arguments[0]
        if what == "ready":
            paths = {each: f"/v2/models/{each}/ready" for each in arguments}
            return [each for each, path in paths.items() if _ask(port, "GET", path)[0] == 200]
        if what == "batch":
            status, found = _ask(port, "GET", f"/v2/models/{name}/config")
            return {"status": status, "max_batch_size": found["max_batch_size"]}
        if what == "infer":
            given = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}
            status, found = _ask(port, "POST", f"/v2/models/{name}/infer", {"inputs": [given]})
            y = found["outputs"][0]["data"][0] if status == 200 else None
            return {"status": status, "y": y}
        body = {"parameters": {"unload_dependents": True}} if arguments[1:] else {}
        status, _ = _ask(port, "POST", f"/v2/repository/models/{name}/{what}", body)
        return {"status": status}


def _ask(port: int, method: str, path: str, value: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    connection.request(method, path, None if value is None else json.dumps(value))
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, json.loads(body or b"{}")
