"""A repository of Triton's as it is, with models of its Python backend, served by us.

It is the one that Triton was recorded with (`record_triton.py`): the same files, the same requests, the same
answers but for what `test_differential.py` says of the same requests to models of our own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from differential import ASKS, ask_all
from record_triton import write_models
from serving import Server
from test_differential import DIFFERENCES, EXTRA, MISSING, RECORDING, TENSORS

Answers = dict[str, dict[str, Any]]

MODEL = """
import json
import logging

import helper
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.config = json.loads(args["model_config"])
        self.scale = float(self.config["parameters"]["scale"]["string_value"])
        output = pb_utils.get_output_config_by_name(self.config, "y")
        self.kind = pb_utils.triton_string_to_numpy(output["data_type"])
        self.names = [args["model_name"], args["model_version"], args["model_instance_kind"]]
        pb_utils.Logger.log_info("ready")

    async def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            assert pb_utils.get_input_tensor_by_name(request, "nothing") is None
            assert request.requested_output_names() == ["y", "who"]
            if (x > 100).any():
                error = pb_utils.TritonError("too hot", pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse([], error))
                continue
            if (x < 0).any():
                asked = pb_utils.InferenceRequest(model_name="other", inputs=[])
                responses.append(asked.exec())
            who = np.array([self.names] * len(x), dtype=object)
            responses.append(pb_utils.InferenceResponse(output_tensors=[
                pb_utils.Tensor("y", (x * self.scale + helper.MORE).astype(self.kind)),
                pb_utils.Tensor("who", who),
            ]))
        return responses

    def finalize(self):
        logging.info("gone")
"""
CONFIG = """
name: "scaled"
backend: "python"
max_batch_size: 8
input [{ name: "x" data_type: TYPE_FP32 dims: [ 2 ] }]
output [{ name: "y" data_type: TYPE_FP64 dims: [ 2 ] }, { name: "who" data_type: TYPE_STRING dims: [ 3 ] }]
parameters { key: "scale" value: { string_value: "3" } }
instance_group [{ kind: KIND_CPU }]
optimization { execution_accelerators { } }
dynamic_batching { }
"""

JOINED = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        given = [[pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in "ab"]
                 for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", np.concatenate(each))])
                for each in given]
"""
JOINED_CONFIG = """
name: "joined"
backend: "python"
max_batch_size: 0
input [{ name: "a" data_type: TYPE_FP32 dims: [ -1 ] }, { name: "b" data_type: TYPE_FP32 dims: [ -1 ] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [ -1 ] }]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("triton")
    write_models(root)
    (root / "scaled" / "7").mkdir(parents=True)
    (root / "scaled" / "config.pbtxt").write_text(CONFIG)
    (root / "scaled" / "helper.py").write_text("MORE = 0.5\n")
    (root / "scaled" / "7" / "model.py").write_text(MODEL)
    (root / "joined" / "1").mkdir(parents=True)
    (root / "joined" / "config.pbtxt").write_text(JOINED_CONFIG)
    (root / "joined" / "1" / "model.py").write_text(JOINED)
    flags = ("--allow-code", "--client-shared-memory")
    with Server(root, cache=tmp_path_factory.mktemp("cache"), flags=flags) as running:
        running.wait_until(
            lambda: not any(row["state"] == "PACKING" for row in running.models().values())
        )
        reasons = {name: row["reason"] for name, row in running.models().items()}
        assert not any(reasons.values()), reasons
        yield running


def test_a_model_of_the_python_backend_gets_what_triton_gives_it(server: Server) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        for rows in (1, 3):
            given = triton.InferInput("x", [rows, 2], "FP32")
            given.set_data_from_numpy(np.full((rows, 2), 2, np.float32))
            answer = client.infer("scaled", [given])
            assert answer.as_numpy("y").dtype == np.float64
            assert answer.as_numpy("y").tolist() == [[6.5, 6.5]] * rows
            assert answer.as_numpy("who").tolist() == [[b"scaled", b"7", b"CPU"]] * rows
        for value, text in ((200.0, "too hot"), (-1.0, "make an ensemble of both")):
            given = triton.InferInput("x", [1, 2], "FP32")
            given.set_data_from_numpy(np.full((1, 2), value, np.float32))
            with pytest.raises(triton.InferenceServerException, match=text):
                client.infer("scaled", [given])


def test_dims_of_a_model_that_does_not_batch_are_independent(server: Server) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        for sizes in ((1, 2), (5, 1), (2, 2)):
            values = [np.arange(size, dtype=np.float32) for size in sizes]
            inputs = [
                triton.InferInput(name, [size], "FP32")
                for name, size in zip("ab", sizes, strict=True)
            ]
            for each, value in zip(inputs, values, strict=True):
                each.set_data_from_numpy(value)
            answer = client.infer("joined", inputs).as_numpy("y")
            assert answer.tolist() == np.concatenate(values).tolist()


@pytest.fixture(scope="module")
def answers(server: Server) -> tuple[Answers, Answers]:
    theirs: Answers = json.loads(Path(RECORDING).read_text())["answers"]
    return theirs, json.loads(json.dumps(ask_all(server.port)))


@pytest.mark.parametrize("name", [ask.name for ask in ASKS])
def test_an_answer_is_as_tritons(name: str, answers: tuple[Answers, Answers]) -> None:
    theirs, mine = answers[0][name], answers[1][name]
    assert mine["status"] == DIFFERENCES.get(name, theirs["status"])
    missing = set(theirs["keys"]) - set(mine["keys"])
    extra = set(mine["keys"]) - set(theirs["keys"])
    assert {key for key in missing if not key.startswith(MISSING.get(name, ("?",)))} == set()
    assert {key for key in extra if not key.startswith(EXTRA.get(name, ("?",)))} == set()
    if name not in TENSORS:
        assert mine.get("tensors") == theirs.get("tensors")
