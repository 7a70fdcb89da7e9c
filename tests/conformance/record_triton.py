"""Record what a real Triton answers to the differential tests' requests; needs no test run.

    python tests/conformance/record_triton.py [all|sequences|control] [WORK]

WORK is where the benches keep their peers (~/.cache/overcommit/bench): the environment with the package
nvidia-pytriton is made there the first time (80 MB, a minute).  Writes `triton_answers.json`, or
`triton_sequences.json`, or `triton_control.json`.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import tempfile
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import differential_control
import differential_sequences
from differential import ask_all

from overcommit.bench.peers import environments
from overcommit.bench.peers.process import PeerProcess
from overcommit.bench.peers.triton import PEER, command

RECORDING = Path(__file__).with_name("triton_answers.json")
CONTROL = Path(__file__).with_name("triton_control.json")
SEQUENCES = Path(__file__).with_name("triton_sequences.json")
WORK = Path("~/.cache/overcommit/bench").expanduser()
CODE = """
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        def get(name):
            return pb.get_input_tensor_by_name(request, name).as_numpy()

        {body}
"""
ECHO = 'return pb.InferenceResponse([pb.Tensor("y", get("x"))])'
ADD = (
    'return pb.InferenceResponse([pb.Tensor("sum", get("a") + get("b")), '
    'pb.Tensor("difference", get("a") - get("b"))])'
)
FAULTY = (
    'if (get("x") > 100).any():\n'
    '            return pb.InferenceResponse([], pb.TritonError("too hot"))\n'
    '        return pb.InferenceResponse([pb.Tensor("y", get("x") * 2)])'
)


def _model(
    root: Path, name: str, body: str, datatype: str, inputs: str, outputs: str, labels: str = ""
) -> None:
    folder = root / name
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(CODE.format(body=body))
    lines = [f'name: "{name}"', 'backend: "python"', "max_batch_size: 8", "dynamic_batching {}"]
    lines.append("instance_group [{ kind: KIND_CPU }]")
    label = ' label_filename: "labels.txt"' if labels else ""
    for kind, names, more in (("input", inputs, ""), ("output", outputs, label)):
        for each in names.split():
            lines.append(
                f'{kind} [{{ name: "{each}" data_type: TYPE_{datatype} dims: [-1]{more} }}]'
            )
    (folder / "config.pbtxt").write_text("\n".join(lines) + "\n")
    if labels:
        (folder / "labels.txt").write_text(labels)


def write_models(root: Path) -> None:
    """Write Triton's form of `model_rig.add_extended_models`."""
    for name, datatype in (
        *(("fp32", "FP32"), ("int64", "INT64"), ("fp16", "FP16"), ("bool", "BOOL")),
        ("bytes", "STRING"),
    ):
        _model(root, f"echo-{name}", ECHO, datatype, "x", "y")
    _model(root, "add", ADD, "INT32", "a b", "sum difference")
    _model(root, "faulty", FAULTY, "FP32", "x", "y")
    _model(root, "labelled", ECHO, "FP32", "x", "y", "cat\ndog\nbird\n")


def main(what: str, work: Path) -> None:
    """Start Triton, ask it everything, write it down."""
    environment = environments.ensure(work, PEER.name, PEER.requirements, print)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(tempfile.mkdtemp(prefix="overcommit-triton-"))
    ask, recorded = ask_all, RECORDING
    if what == "sequences":
        ask, recorded = differential_sequences.ask_all, SEQUENCES
        differential_sequences.write_models(root / "models", differential_sequences.TRITON_CODE)
    elif what == "control":
        # It tells a file's states apart by whole seconds.
        world = differential_control.World(
            root / "models", differential_control.TRITON_CODE, pause_s=1.1
        )
        ask, recorded = world.ask_all, CONTROL
    else:
        write_models(root / "models")
    argv, variables = command(environment, root / "models")
    argv += ["--http-address", "127.0.0.1", "--http-port", str(port), "--allow-grpc", "false"]
    argv += ["--model-control-mode", "explicit", "--load-model", "*"]

    def is_ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=1):
                return True
        except OSError:
            return False

    try:
        with PeerProcess("triton", argv, root / "log", variables, is_ready):
            answers = ask(port)
    finally:
        shutil.rmtree(root)
    recording = {"server": f"triton {PEER.requirements.version}", "answers": answers}
    recorded.write_text(json.dumps(recording, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(answers)} answers in {recorded}")


if __name__ == "__main__":
    arguments = dict(enumerate(sys.argv))
    main(arguments.get(1, "all"), Path(arguments.get(2, WORK)))
