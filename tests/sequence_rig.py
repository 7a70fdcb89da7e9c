"""Models with state: they add up what the requests of a sequence bring, so every answer tells its past."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

# Keeps the sums itself, by correlation id; `wide` numbers of each answer say the sum.
COUNTER = """
import os
import numpy as np

class Counter:
    def load(self, folder, parameters):
        self.sums = {}

    def infer(self, inputs):
        x, start, end = inputs["x"], inputs["START"], inputs["END"]
        ready, ids = inputs["READY"], inputs["CORRID"]
        y = np.zeros((len(x), int(np.abs(x).max()) if x.max() > 1000 else 1), np.int32)
        for row in range(len(x)):
            if not ready[row, 0]:
                assert not start[row, 0] and not end[row, 0], "nobody's row"
                continue
            if x[row, 0] == -1:
                os._exit(1)
            if x[row, 0] == -2:
                raise ValueError("too cold")
            key = ids[row, 0]
            if start[row, 0]:
                self.sums[key] = 0
            self.sums[key] += int(x[row, 0])
            y[row] = self.sums[key]
            if end[row, 0]:
                del self.sums[key]
        return {"y": y, "row": np.arange(len(x), dtype=np.int32)[:, None]}
"""
COUNTER_TOML = """
engine = "python"
allow_code = true
[batching]
max_batch_size = {batch}
[[input]]
name = "x"
datatype = "INT32"
shape = [-1, 1]
[[output]]
name = "y"
datatype = "INT32"
shape = [-1, -1]
[[output]]
name = "row"
datatype = "INT32"
shape = [-1, 1]
[sequence]
strategy = "{strategy}"
idle_us = {idle_us}
candidates = {batch}
[[sequence.controls]]
kind = "start"
name = "START"
datatype = "INT32"
[[sequence.controls]]
kind = "end"
name = "END"
datatype = "FP32"
[[sequence.controls]]
kind = "ready"
name = "READY"
datatype = "BOOL"
[[sequence.controls]]
kind = "corrid"
name = "CORRID"
datatype = "{id_type}"
[python]
process = {process}
"""
# As the same model has it for Triton.
ADDER_PBTXT = """
backend: "onnxruntime"
max_batch_size: 4
input [{ name: "x" data_type: TYPE_FP32 dims: [2] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [2] }]
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  direct { }
  control_input [
    { name: "start" control [{ kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] }] }
  ]
  state [{
    input_name: "sum_in" output_name: "sum_out" data_type: TYPE_FP32 dims: [2]
    INITIAL
  }]
}
"""
FIRST = np.array([100, 200], np.float32)


def add_counter(root: Path, name: str, **more: Any) -> None:
    """Write a model that keeps its state itself."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(COUNTER)
    values = {"batch": 4, "strategy": "direct", "idle_us": 60_000_000, "id_type": "UINT64"}
    values |= {"process": "false"} | more
    (folder / "model.toml").write_text(COUNTER_TOML.format(**values))


def add_adder(root: Path, name: str, *, from_file: bool = False) -> None:
    """Write an ONNX model whose sums are an implicit state; `start` is added to the answer."""
    from onnx import TensorProto, helper, save

    nodes = [
        helper.make_node("Add", ["x", "sum_in"], ["sum_out"]),
        helper.make_node("Add", ["sum_out", "start"], ["y"]),
    ]

    def value(name: str, columns: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", columns])

    graph = helper.make_graph(
        nodes,
        "adder",
        [value("x", 2), value("start", 1), value("sum_in", 2)],
        [value("y", 2), value("sum_out", 2)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (root / name / "1").mkdir(parents=True)
    save(model, str(root / name / "1" / "model.onnx"))
    initial = ""
    if from_file:
        (root / name / "initial_state").mkdir()
        (root / name / "initial_state" / "first").write_bytes(FIRST.tobytes())
        initial = 'initial_state: { data_type: TYPE_FP32 dims: [2] data_file: "first" name: "f" }'
    (root / name / "config.pbtxt").write_text(ADDER_PBTXT.replace("INITIAL", initial))
