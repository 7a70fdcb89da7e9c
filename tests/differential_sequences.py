"""Requests of sequences for Triton and for us: the same configuration, the same sums, the same words."""

from __future__ import annotations

import http.client
import json
import time
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0
SLOTS = 2
IDLE_S = 1.0
CONFIG = """
name: "%(name)s"
backend: "python"
max_batch_size: 2
input [{ name: "x" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "y" data_type: TYPE_INT32 dims: [1] }, { name: "said" data_type: TYPE_INT32 dims: [3] }]
instance_group [{ kind: KIND_CPU count: 1 }]
sequence_batching {
  max_sequence_idle_microseconds: 1000000
  %(strategy)s
  control_input [
    { name: "START" control [{ kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] }] },
    { name: "END" control [{ kind: CONTROL_SEQUENCE_END fp32_false_true: [0, 1] }] },
    { name: "READY" control [{ kind: CONTROL_SEQUENCE_READY bool_false_true: [false, true] }] },
    { name: "CORRID" control [{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }] }
  ]
}
"""
STRATEGIES = {"direct": "direct { }", "oldest": "oldest { max_candidate_sequences: 2 }"}
# What both do with a row.
_ROW = """
def row(sums, x, start, end, ready, key):
    if not ready:
        return 0, (0, 0, 0)
    if x > 1000:
        raise ValueError("too hot")
    if start:
        sums[key] = 0
    sums[key] += x
    return sums[key], (start, end, ready)
"""
TRITON_CODE = (
    """
import numpy as np
import triton_python_backend_utils as pb
"""
    + _ROW
    + """
class TritonPythonModel:
    def initialize(self, args):
        self.sums = {}

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        names = ("x", "START", "END", "READY", "CORRID")
        given = [pb.get_input_tensor_by_name(request, each).as_numpy() for each in names]
        try:
            y, said = row(self.sums, *(int(array.reshape(-1)[0]) for array in given))
        except ValueError as error:
            return pb.InferenceResponse([], pb.TritonError(str(error)))
        made = {"y": [[y]], "said": [said]}
        tensors = [pb.Tensor(each, np.array(rows, np.int32)) for each, rows in made.items()]
        return pb.InferenceResponse(tensors)
"""
)
OUR_CODE = (
    "import numpy as np\n"
    + _ROW
    + """
class Model:
    def load(self, folder, parameters):
        self.sums = {}

    def infer(self, inputs):
        names = ("x", "START", "END", "READY", "CORRID")
        columns = [inputs[each].reshape(-1).astype(np.uint64).tolist() for each in names]
        rows = [row(self.sums, *each) for each in zip(*columns)]
        y = np.array([[each] for each, _ in rows], np.int32)
        return {"y": y, "said": np.array([said for _, said in rows], np.int32)}
"""
)


def write_models(root: Path, code: str, more: str = "") -> None:
    """Write a repository; `more` goes into each model.toml."""
    for name, strategy in STRATEGIES.items():
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.py").write_text(code)
        (root / name / "config.pbtxt").write_text(CONFIG % {"name": name, "strategy": strategy})
        if more:
            (root / name / "model.toml").write_text(more)


Ask = tuple[str, str, Any, bool | None, bool | None, int]  # name, model, id, start, end, x
LONG = "a" * 129
# "-" waits until every sequence has been idle for too long.
ASKS: list[Ask | str] = [
    ("no id", "direct", None, None, None, 1),
    ("id 0", "direct", 0, True, None, 1),
    ("an empty id", "direct", "", True, None, 1),
    ("in the middle of nothing", "direct", 42, None, None, 1),
    ("a text in the middle of nothing", "direct", "abc", None, None, 1),
    ("the end of nothing", "direct", 44, None, True, 1),
    ("first", "direct", 42, True, None, 1),
    ("second", "direct", 42, None, None, 5),
    ("flags that say no", "direct", 42, False, False, 5),
    ("first again", "direct", 42, True, None, 7),
    ("it fails", "direct", 42, None, None, 2000),
    ("after it failed", "direct", 42, None, None, 1),
    ("last", "direct", 42, None, True, 1),
    ("after the last", "direct", 42, None, None, 1),
    ("first and last", "direct", 43, True, True, 9),
    ("the highest id", "direct", 2**64 - 1, True, True, 9),
    ("a text for a number", "direct", "abc", True, True, 1),
    ("a text that is too long", "direct", LONG, True, True, 1),
    ("an id that is no whole number", "direct", 1.5, True, True, 1),
    ("a negative id", "direct", -1, True, True, 1),
    ("a flag that is none", "direct", 50, "yes", True, 1),
    ("slot one", "direct", 1, True, None, 1),
    ("slot two", "direct", 2, True, None, 1),
    ("no slot", "direct", 3, True, None, 1),
    ("slot one goes on", "direct", 1, None, None, 1),
    "-",
    ("after it was idle", "direct", 2, None, None, 1),
    ("candidate one", "oldest", 1, True, None, 1),
    ("candidate two", "oldest", 2, True, None, 1),
    ("no candidate", "oldest", 3, True, None, 1),
    ("candidate one ends", "oldest", 1, None, True, 1),
    ("a candidate more", "oldest", 3, True, True, 1),
]


def ask_all(port: int) -> dict[str, dict[str, Any]]:
    """Ask everything in order; what counts of each answer."""
    answers: dict[str, dict[str, Any]] = {}
    for ask in ASKS:
        if isinstance(ask, str):
            time.sleep(2 * IDLE_S)
            continue
        name, model, key, start, end, x = ask
        given = {"sequence_id": key, "sequence_start": start, "sequence_end": end}
        parameters = {each: value for each, value in given.items() if value is not None}
        body = {
            "inputs": [{"name": "x", "datatype": "INT32", "shape": [1, 1], "data": [x]}],
            # Who waits for a slot is to be told before a sequence is idle for too long.
            "parameters": parameters | {"timeout": 300_000},
        }
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        connection.request("POST", f"/v2/models/{model}/infer", json.dumps(body))
        response = connection.getresponse()
        found = json.loads(response.read())
        connection.close()
        answers[name] = {"status": response.status, "error": found.get("error")}
        if "outputs" in found:
            answers[name]["data"] = {each["name"]: each["data"] for each in found["outputs"]}
    return answers
