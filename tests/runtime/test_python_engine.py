"""The python engine: a model's own class, in the worker and in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pack_rig import Opened, packed, refused
from safetensors.torch import save_file
from serving import Server, is_alive

from overcommit.runtime.config import PythonOptions, TensorSpec
from overcommit.runtime.errors import ModelError

X = TensorSpec(name="x", datatype="FP32", shape=(-1, 2))
PROCESS = PythonOptions(process=True)
SCALE = """
    import os
    import numpy as np

    class Model:
        def load(self, folder, parameters):
            self.factor = float((folder / "factor.txt").read_text()) * parameters["more"]

        def preprocess(self, inputs):
            return inputs["x"] + 1

        async def infer(self, x):
            if (x > 1000).any():
                os._exit(7)
            if (x > 100).any():
                raise ValueError("too hot")
            if (x < -100).any():
                raise SystemExit("enough")
            if (x < -10).any():
                raise KeyboardInterrupt("stop")
            return {"y": x * self.factor, "pid": np.full(len(x), os.getpid())}

        def postprocess(self, outputs):
            return {**outputs, "word": ["é"] * len(outputs["y"])}
"""


def write(folder: Path, code: str = SCALE) -> Path:
    folder.mkdir()
    (folder / "model.py").write_text(textwrap.dedent(code))
    (folder / "factor.txt").write_text("3")
    return folder


def options(**more: Any) -> dict[str, Any]:
    return {
        "engine": "python",
        "inputs": (X,),
        "parameters": {"more": 2},
        "allow_code": True,
        "server_allows": True,
        **more,
    }


def ones(value: float = 1.0) -> dict[str, Any]:
    return {"x": np.full((2, 2), value, np.float32)}


@pytest.mark.parametrize("where", [None, PROCESS])
def test_load_preprocess_infer_postprocess(tmp_path: Path, where: PythonOptions | None) -> None:
    done = packed(write(tmp_path / "scale"), tmp_path / "cache", **options(python=where))
    assert done.engine == "python"
    outputs = {spec.name: (spec.datatype, spec.shape) for spec in done.config.outputs}
    assert outputs == {"y": ("FP32", (-1, 2)), "pid": ("INT64", (-1,)), "word": ("BYTES", (-1,))}
    opened = Opened(done, allow_code=True)
    answer = opened.model.run(ones())
    assert answer["y"].tolist() == [[12.0, 12.0]] * 2
    assert answer["word"].tolist() == ["é".encode()] * 2
    assert (answer["pid"][0] == os.getpid()) == (where is None)
    for value, text in (
        (500, "ValueError: too hot"),
        (-500, "SystemExit: enough"),
        (-50, "KeyboardInterrupt: stop"),
    ):
        with pytest.raises(ModelError, match=text):
            opened.model.run(ones(value))
    assert opened.model.run(ones())["pid"][0] == answer["pid"][0], "its process goes on"
    assert opened.model.run(ones())["y"][0, 0] == 12


def test_code_runs_only_where_both_allow_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "scale", "raise SystemExit('it ran')")
    for either in ({"allow_code": False}, {"server_allows": False}):
        assert "--allow-code" in refused(folder, tmp_path / "cache", **options(**either))


def test_a_process_that_dies_fails_its_batch_and_is_started_again(tmp_path: Path) -> None:
    done = packed(write(tmp_path / "scale"), tmp_path / "cache", **options(python=PROCESS))
    opened = Opened(done, allow_code=True)
    first = int(opened.model.run(ones())["pid"][0])
    with pytest.raises(ModelError, match="exit status 7"):
        opened.model.run(ones(5000))
    second = int(opened.model.run(ones())["pid"][0])
    assert second != first
    os.kill(second, signal.SIGKILL)
    with pytest.raises(ModelError, match="signal 9"):
        opened.model.run(ones())
    third = int(opened.model.run(ones())["pid"][0])
    assert is_alive(third)
    big = np.ones((40_000, 2), np.float32)  # more memory than before, both ways
    assert opened.model.run({"x": big})["y"].shape == big.shape
    opened.program.hosted.close()
    assert not is_alive(third)


def test_weights_come_from_the_mapping_read_only(tmp_path: Path) -> None:
    code = """
        class Model:
            def bind(self, tensors):
                self.w = tensors["w"]
            def infer(self, inputs):
                return inputs["x"] @ self.w
            def write(self):
                self.w[0] = 1
    """
    folder = write(tmp_path / "mapped", code)
    weights = torch.arange(6.0).reshape(2, 3)
    save_file({"w": weights}, folder / "model.safetensors")
    opened = Opened(packed(folder, tmp_path / "cache", **options()), allow_code=True)
    assert opened.model.run(ones())["output"].tolist() == [[3.0, 5.0, 7.0]] * 2
    opened.memory[: 6 * 4] = np.full(6, 2, np.float32).tobytes()
    assert opened.model.run(ones())["output"].tolist() == [[4.0] * 3] * 2


def test_a_venv_brings_its_own_packages(tmp_path: Path) -> None:
    """A virtual environment, made here by hand: its one package is nowhere else."""
    code = """
        import sys
        import numpy as np
        import only_here
        class Model:
            def infer(self, inputs):
                return {"y": inputs["x"] * only_here.FACTOR, "ours": np.array(["overcommit" in sys.modules])}
    """
    folder = write(tmp_path / "own", code)
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True
    )
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "only_here.py").write_text("FACTOR = 5\n")
    (site / "numpy.pth").write_text(f"{Path(np.__file__).parent.parent}\n")
    at = PythonOptions(venv="venv")
    answer = Opened(
        packed(folder, tmp_path / "cache", **options(python=at)), allow_code=True
    ).model.run(ones())
    assert answer["y"].tolist() == [[5.0, 5.0]] * 2
    assert not answer["ours"].any()
    message = refused(folder, tmp_path / "other", **options(python=PythonOptions(venv="nowhere")))
    assert "no Python at" in message


def test_a_class_that_fails_to_load_says_why(tmp_path: Path) -> None:
    folder = write(tmp_path / "bad", "class Model:\n    def __init__(self): raise KeyError('w')\n")
    assert "no class" in refused(folder, tmp_path / "c1", **options(entry="model.py:Other"))
    code = (
        "class Model:\n    def __init__(self): raise KeyError('w')\n    def infer(self, x): ...\n"
    )
    (folder / "model.py").write_text(code)
    for where in (None, PROCESS):
        assert "KeyError" in refused(folder, tmp_path / "c2", **options(python=where))


def test_what_was_loaded_is_one_versions_at_a_time(tmp_path: Path) -> None:
    code = """
        class Model:
            def bind(self, tensors):
                self.w = tensors["w"]
            def infer(self, inputs):
                return {"y": inputs["x"] * self.w}
    """
    folder = write(tmp_path / "twice", code)
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    done = packed(folder, tmp_path / "cache", **options())
    first = Opened(done, allow_code=True)
    second = Opened(done, allow_code=True)
    assert second.program.hosted is not first.program.hosted
    # Each reads its own mapping.
    np.frombuffer(second.memory, np.float32)[:2] = 5
    assert first.model.run(ones())["y"].tolist() == [[1.0, 1.0]] * 2
    assert second.model.run(ones())["y"].tolist() == [[5.0, 5.0]] * 2
    hosted = second.program.hosted
    del first, second
    assert Opened(done, allow_code=True).program.hosted is hosted, (
        "it is loaded once for each version"
    )


def test_a_process_goes_with_its_worker(tmp_path: Path) -> None:
    folder = write(tmp_path / "models" / "scale") if (tmp_path / "models").mkdir() is None else None
    assert folder is not None
    (folder / "model.toml").write_text(
        'engine = "python"\nallow_code = true\nparameters.more = 2\n[python]\nprocess = true\n'
        '[[input]]\nname = "x"\ndatatype = "FP32"\nshape = [-1, 2]\n'
    )
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}]}

    def pid_of(answer: Any) -> int:
        outputs = {each["name"]: each["data"] for each in answer.json()["outputs"]}
        assert outputs["y"] == [12.0, 12.0]
        return int(outputs["pid"][0])

    with Server(tmp_path / "models", cache=tmp_path / "cache", flags=("--allow-code",)) as server:
        server.wait_until(lambda: server.models()["scale/1"]["state"] == "READY")
        first = pid_of(server.post("/v2/models/scale/infer", body))
        (worker,) = server.pids("worker")
        os.kill(worker, signal.SIGKILL)
        server.wait_until(lambda: not is_alive(first))
        server.wait_until(lambda: server.pids("worker") not in ([], [worker]))
        second = pid_of(server.post("/v2/models/scale/infer", body))
        server.stop()
    deadline = time.monotonic() + 60
    while is_alive(second):
        assert time.monotonic() < deadline
        time.sleep(0.02)
