"""Archives of torch.jit: weights from the mapping; code that does more than compute is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pack_rig import Opened, packed, refused
from real_models import SILERO, take

from overcommit.runtime.config import TensorSpec

X = TensorSpec(name="x", datatype="FP32", shape=(-1, 4))
ROWS = np.random.default_rng(2).standard_normal((3, 4)).astype(np.float32)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 300)
        self.register_buffer("shift", torch.arange(300.0))

    def forward(self, x: torch.Tensor, times: int = 1) -> torch.Tensor:
        for _ in range(times):
            x = x + 1
        return self.linear(x) + self.shift


class Writing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return x * 2


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last: torch.Tensor = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.last + 1
        return x + self.last


class Saving(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "/tmp/overcommit-was-here")
        return x


def script(folder: Path, module: torch.nn.Module) -> Any:
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(module.eval())
        torch.jit.save(scripted, str(folder / "model.pt"))
    return scripted


def test_it_answers_as_torch_jit_does_over_mapped_weights(tmp_path: Path) -> None:
    module = Net()
    script(tmp_path / "net", module)
    done = packed(tmp_path / "net", tmp_path / "cache", inputs=(X,))
    assert done.engine == "torchscript"
    opened = Opened(done)
    names = {entry.name for entry in opened.header.tensors}
    assert names == {"linear.weight", "linear.bias", "shift"}
    with torch.inference_mode():
        wanted = module(torch.tensor(ROWS)).numpy()
    np.testing.assert_array_equal(opened.model.run({"x": ROWS})["output"], wanted)
    opened.memory[:] = bytes(opened.header.nbytes)
    assert not opened.model.run({"x": ROWS})["output"].any()


def test_numbers_are_given_as_scalars(tmp_path: Path) -> None:
    module = Net()
    script(tmp_path / "net", module)
    times = TensorSpec(name="times", datatype="INT64", shape=())
    opened = Opened(packed(tmp_path / "net", tmp_path / "cache", inputs=(X, times)))
    with torch.inference_mode():
        wanted = module(torch.tensor(ROWS), 3).numpy()
    got = opened.model.run({"x": ROWS, "times": np.array(3)})
    np.testing.assert_array_equal(got["output"], wanted)


def test_what_it_takes_must_be_said(tmp_path: Path) -> None:
    script(tmp_path / "net", Net())
    assert "['x', 'times']" in refused(tmp_path / "net", tmp_path / "cache")


def test_code_that_writes_is_refused(tmp_path: Path) -> None:
    script(tmp_path / "saving", Saving())
    message = refused(tmp_path / "saving", tmp_path / "cache", inputs=(X,))
    assert "torch.save" in message
    assert not Path("/tmp/overcommit-was-here").exists()
    script(tmp_path / "writing", Writing())
    message = refused(tmp_path / "writing", tmp_path / "cache", inputs=(X,))
    assert "writes to its tensor 'seen'" in message


def test_a_module_that_keeps_state_would_mix_up_its_clients_and_is_refused(tmp_path: Path) -> None:
    script(tmp_path / "counting", Counting())
    assert "keeps state" in refused(tmp_path / "counting", tmp_path / "cache", inputs=(X,))


def test_silero_in_torch_script_is_refused_with_what_it_remembers(tmp_path: Path) -> None:
    """Whatever rate it gets: what one client says would be heard in another's. Its ONNX file is served."""
    take(SILERO, "silero_vad/data/silero_vad.jit", tmp_path / "silero", "silero_vad.jit")
    x = TensorSpec(name="x", datatype="FP32", shape=(1, 512))
    rate = TensorSpec(name="sr", datatype="INT64", shape=())
    message = refused(tmp_path / "silero", tmp_path / "cache", inputs=(x, rate))
    assert "keeps state between requests" in message
    assert "'_state'" in message
